"""A search from its configuration to its report: what is searched, the trials' jobs, the best recipe."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue import config as configuration
from lightning_glue.config import Config, TuneConfig
from lightning_glue.errors import UserError, suggest
from lightning_glue.tasks import TRAINABLE, get_task
from lightning_glue.utils.console import command
from lightning_glue.utils.logs import log
from lightning_glue.utils.quick_imports import quick_imports
from lightning_glue.utils.redact import hide_secrets

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from lightning_glue.execution.job import Job
    from lightning_glue.execution.place import Place
    from lightning_glue.tuning.controller import Controller, Running
    from lightning_glue.tuning.scoreboard import Scoreboard
    from lightning_glue.tuning.space import Space
    from lightning_glue.tuning.study import SharedStudy
    from lightning_glue.tuning.study_run import StudyTracking

DEFAULT_STORAGE = "sqlite:///optuna.db"
OBJECTIVE = "lightning_glue.execution.train_job:train_job"
_NAME_LIMIT = 512  # characters of a study's name: the storages' tables hold no more
_LOOK_SECONDS = 0.5  # between two pictures of the study on a terminal


@dataclass(frozen=True)
class Search:
    """What is searched, and from where.

    Attributes:
        config: what every trial's configuration is made from.
        asked: trials that the command line asks for; None: as many as the study is to have.
    """

    config: Config
    tune: TuneConfig
    space: Space
    places: list[Place]
    asked: int | None

    @property
    def metric(self) -> str:
        return get_task(self.config.task.name).selection_metric


@dataclass(frozen=True)
class Request:
    """A search as it is asked for; None leaves it to ``conf/`` or to what the machine has.

    Attributes:
        trials: of the whole study.
        storage: of the study, an address of Optuna's or the path of a journal file.
        workers: trials at a time on this machine.
        overrides: ``key=value``, also of ``tune.``; a key of the search space is then fixed.
    """

    task: str
    model: str | None = None
    data: str | None = None
    experiment: str | None = None
    trials: int | None = None
    study: str | None = None
    storage: str = DEFAULT_STORAGE
    workers: int | None = None
    gpus: int | None = None
    gpus_per_trial: int = 1
    trials_per_gpu: int = 1
    procs: int = 1
    retries: int | None = None
    overrides: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise UserError where a number or a name cannot be meant."""
        for name in ("trials", "workers", "gpus_per_trial", "trials_per_gpu", "procs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}; expected at least 1")
        if len(self.study or "") > _NAME_LIMIT:
            raise UserError(f"--study: a name of {len(self.study or '')} characters; expected at most {_NAME_LIMIT}")


def compose(request: Request) -> Search:
    """The search that is asked for.

    Raises:
        UserError: a mistake in it or in ``conf/tune/``.
    """
    if request.task not in TRAINABLE:
        raise UserError(f"unknown task {request.task!r}{suggest(request.task, TRAINABLE)}")
    flags = {"tune.trials": request.trials, "tune.retries": request.retries}
    tuning = [f"{key}={value}" for key, value in flags.items() if value is not None]
    tuning += [entry for entry in request.overrides if entry.startswith("tune.")]
    asked = request.trials is not None or any(entry.startswith("tune.trials=") for entry in tuning)
    overrides = [entry for entry in request.overrides if not entry.startswith("tune.")]
    gpus = _gpus(request.gpus)
    model = request.model or ("roberta.base" if gpus and not request.experiment else None)
    choices = {"task": request.task, "model": model, "data": request.data, "experiment": request.experiment}
    fixed = {entry.lstrip("+~").partition("=")[0] for entry in overrides}
    overrides += [
        f"trainer.gpus={request.gpus_per_trial if gpus else 0}",
        f"trainer.procs={1 if gpus else request.procs}",
    ]
    overrides += [] if "tracking.checkpoints" in fixed else ["tracking.checkpoints=false"]
    config, tune = configuration.compose_tune(tuning + overrides, **choices)

    from lightning_glue.execution.place import places
    from lightning_glue.tuning.space import make_space

    if gpus and request.gpus_per_trial > gpus:
        raise UserError(f"--gpus-per-trial {request.gpus_per_trial}: this machine gives {gpus} GPUs to the study")
    where = places(
        workers=request.workers, gpus=gpus, gpus_per_trial=request.gpus_per_trial,
        trials_per_gpu=request.trials_per_gpu, procs=request.procs,
    )  # fmt: skip
    space = make_space(tune.parameters, fixed)
    return Search(config, tune, space, where, tune.trials if asked else None)


def _gpus(asked: int | None) -> int:
    import torch

    there = torch.cuda.device_count()
    if asked is not None and asked > there:
        raise UserError(f"--gpus {asked}: this machine shows {there} CUDA devices")
    return there if asked is None else asked


def open_study(request: Request, search: Search) -> SharedStudy:
    """Make or join the study, its queue filled.

    Raises:
        UserError: the storage cannot be reached, or holds a study of that name made with another configuration.
    """
    from lightning_glue.tuning.space import describe, first_trials
    from lightning_glue.tuning.storage import open_storage
    from lightning_glue.tuning.strategy import make_pruner, make_sampler
    from lightning_glue.tuning.study import SharedStudy

    config, tune = search.config, search.tune
    first = first_trials(tune, config, search.space)
    searched = set(search.space)
    base = {key: value for key, value in configuration.identity(config).items() if key not in searched}
    same = {"space": describe(search.space), "configuration": base, "seeds": tune.seeds, "metric": search.metric}
    study = SharedStudy(
        request.study or default_name(search),
        open_storage(request.storage),
        make_sampler(tune.sampler, config.seed),
        make_pruner(tune),
        same,
        heartbeat=tune.heartbeat_seconds,
        retries=tune.retries,
    )
    total = search.asked or max(tune.trials, study.asked_for())
    total = min(total, len(first)) if tune.sampler == "grid" else total
    planned = study.asked_for()
    if total < planned:
        log.info("study %r is to have %d trials; this one works for the first %d of them", study.name, planned, total)
    study.fill_queue(total, first, grows=total >= planned and tune.sampler != "grid")
    return study


def default_name(search: Search) -> str:
    """``SST-2-minilm``, with ``-sample`` or the space's name where they are not the usual ones."""
    config, tune = search.config, search.tune
    parts = [config.task.name, config.model.name]
    parts += ["sample"] if config.data.source == "sample" else []
    parts += [tune.space] if tune.space != "wide" else []
    return "-".join(parts)


def trial_config(search: Search, parameters: Mapping[str, Any]) -> Config:
    """The configuration of a trial, with its first seed."""
    from lightning_glue.tuning.space import with_parameters

    return configuration.unflatten(with_parameters(search.config, parameters))


def make_job(search: Search, study: SharedStudy, running: Running, seed: int, checkpoints: Path) -> Job:
    """The training of a trial with its ``seed``-th seed."""
    from lightning_glue.execution.job import Job
    from lightning_glue.tuning.space import with_parameters
    from lightning_glue.tuning.study_run import as_parent, run_name

    flat = with_parameters(search.config, running.parameters)
    several = search.tune.seeds > 1
    flat["seed"] += seed
    name = f"trial {running.number}" + (f" seed {flat['seed']}" if several else "")
    flat["tracking.run_name"] = run_name(study.name, name).replace("${", "{")  # no interpolation
    tags = {"optuna.study": study.name, "optuna.trial": str(running.number)}
    return Job(flat, tags, str(checkpoints), as_parent(study.id), search.tune.collapse_margin)


class Observer:
    """Passes what happens to the terminal, to MLflow and to the best recipe."""

    def __init__(self, search: Search, study: SharedStudy, board: Scoreboard, tracking: StudyTracking) -> None:
        self.search, self.study, self.board, self.tracking = search, study, board, tracking
        self.best: FrozenTrial | None = None  # the one in the recipe
        self._looked = 0.0

    def changed(self, running: list[Running]) -> None:
        from lightning_glue.tuning.slots import Slots

        if self.board.live and time.monotonic() - self._looked > _LOOK_SECONDS:
            trials = self.study.trials()
            self.board.update(trials, running, self.study.to_do(Slots(trials)))
            self._looked = time.monotonic()

    def finished(self, trial: FrozenTrial, runs: list[str]) -> None:
        self.board.finished(trial)
        self.tracking.finished(trial, runs)
        if trial.value is None or (self.best and trial.value <= self.best.value):
            return
        best = best_trial(self.study)  # another controller may have had a better one
        if best and (self.best is None or best.number != self.best.number):
            self.best = best
            keep_recipe(self.search, self.study, best)


def best_trial(study: SharedStudy) -> FrozenTrial | None:
    """The complete trial with the highest value, the first of equals; None where none is complete."""
    from optuna.trial import TrialState

    return max(study.trials(TrialState.COMPLETE), key=lambda trial: trial.value, default=None)


def keep_recipe(search: Search, study: SharedStudy, best: FrozenTrial) -> bool:
    """Write the recipe; where that cannot be, it is a warning, and False."""
    from lightning_glue.tuning.recipe import write_recipe

    done = sum(trial.state.is_finished() for trial in study.trials())
    try:
        write_recipe(
            trial_config(search, best.params), study=study.name, trial=best.number, metric=search.metric,
            value=best.value, trials=done,
        )  # fmt: skip
    except OSError as error:
        log.warning("the best recipe cannot be kept: %s: %s", error.filename, error.strerror)
        return False
    return True


def report(search: Search, study: SharedStudy, tracking: StudyTracking, storage: str) -> None:
    """Say what came out and what to do next."""
    from collections import Counter

    from lightning_glue.tuning.slots import Slots, is_surplus

    trials = study.trials()
    counts = Counter(trial.state.name.lower() for trial in trials if not is_surplus(trial))
    counts["waiting"] = study.to_do(Slots(trials))
    print(f"\nstudy {study.name}: " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items()) if count))
    best = best_trial(study)
    if best:
        print(f"best trial {best.number}: {search.metric} {best.value:.4f}")
        for key, value in best.params.items():
            print(f"  {key:<28}{value:.6g}" if isinstance(value, float) else f"  {key:<28}{value}")
    print(f"run: {hide_secrets(tracking.tracker.describe())}\nnext:")
    # Another study of the task may have written its own recipe meanwhile.
    if best and keep_recipe(search, study, best):
        recipe = f"tuned/{search.config.task.name}"
        again = command("python", "-m", "lightning_glue.train", "--experiment", recipe)
        print(f"  {again}\n      train with the best parameters")
    print(f"  {command('optuna-dashboard', hide_secrets(storage))}\n      look at the study")


def outcome(study: SharedStudy, controller: Controller) -> tuple[str, str]:
    """The status of the study's run, RUNNING where others go on, and what to say of an error."""
    from optuna.trial import TrialState

    at_work = bool(study.trials(TrialState.RUNNING))  # this controller's own are given back
    if controller.stopped_by or at_work:
        return "RUNNING" if at_work else "KILLED", ""
    if study.trials(TrialState.COMPLETE):
        return "FINISHED", ""
    reason = controller.last_failure or last_failure(study)
    return "FAILED", "no trial completed" + (f"; the last failed: {reason}" if reason else "")


def last_failure(study: SharedStudy) -> str:
    """Why the last trial that failed did so; empty where none has."""
    from optuna.trial import TrialState

    from lightning_glue.tuning.slots import is_surplus

    failed = [trial for trial in study.trials(TrialState.FAIL) if not is_surplus(trial)]
    return failed[-1].user_attrs.get("reason", "") if failed else ""


def start_tracking(search: Search, study: SharedStudy) -> StudyTracking:
    """The study's run, as this controller writes it."""
    from optuna.trial import TrialState

    from lightning_glue.tracking.logger import MLflowTracker
    from lightning_glue.tuning.study_run import StudyTracking, run_name

    config = search.config
    params = {f"tune.{key}": value for key, value in vars(search.tune).items() if key not in ("spaces", "first_trials")}
    params |= {f"space.{key}": str(value) for key, value in search.space.items()}
    params |= configuration.flatten(config)
    experiment = config.experiment
    name = run_name(f"study {study.name}", "").strip()
    tracker = MLflowTracker(config.tracking.uri, experiment, name, config.tracking.journal)
    alone = study.created or not study.trials(TrialState.RUNNING)
    return StudyTracking(tracker, study, params, search.metric, alone=alone)


@dataclass(frozen=True)
class Finished:
    """What came of this machine's share of a study.

    Attributes:
        run_id: of the study's run.
        stopped_by: the signal that ended it, if one did.
        error: why no trial completed; empty otherwise.
    """

    study: SharedStudy
    run_id: str
    stopped_by: signal.Signals | None
    error: str


def run(request: Request, *, shows: bool = True) -> Finished:
    """Run this machine's share of a study.

    Args:
        shows: what is done and what came out, on the terminal.

    Raises:
        UserError: a mistake in the request or in a training's configuration, or the storage cannot be used.
    """
    search = compose(request)

    import optuna

    from lightning_glue.tracking.watcher import watch

    watch()  # it gets ready meanwhile
    with quick_imports():
        from lightning_glue.execution.local import groups
        from lightning_glue.tuning.controller import Controller, study_folder
        from lightning_glue.tuning.scoreboard import Scoreboard

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = open_study(request, search)
    tracking = start_tracking(search, study)
    where = hide_secrets(request.storage)
    if shows:
        print(f"study {study.name} at {where}: {len(search.space)} parameters, {len(search.places)} at a time")
    board = Scoreboard(search.metric, len(search.places), shows=shows)
    controller = Controller(
        study,
        search.space,
        lambda running, seed, folder: make_job(search, study, running, seed, folder),
        groups(search.places, OBJECTIVE, study_folder(study.name, study.id)),
        Observer(search, study, board, tracking),
        seeds=search.tune.seeds,
        warm=search.tune.warm,
    )
    status, error = "FAILED", ""
    try:
        with board:
            controller.run()
        status, error = outcome(study, controller)
    finally:
        tracking.close(status)
    if shows:
        report(search, study, tracking, request.storage)
    return Finished(study, tracking.tracker.run_id, controller.stopped_by, error)
