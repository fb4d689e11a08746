"""Search a task's hyperparameters with Optuna: ``python -m lightning_glue.tune --task SST-2``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue import config as configuration
from lightning_glue.addresses import hide_secrets
from lightning_glue.config import Config, TuneConfig
from lightning_glue.console import Parser, command
from lightning_glue.errors import UserError, run_main, suggest
from lightning_glue.imports import quick_imports
from lightning_glue.tasks import TRAINABLE, get_task

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from lightning_glue.controller import Controller, Running
    from lightning_glue.scoreboard import Scoreboard
    from lightning_glue.space import Space
    from lightning_glue.study import SharedStudy
    from lightning_glue.study_tracking import StudyTracking
    from lightning_glue.trial import Job
    from lightning_glue.workers import Place

DEFAULT_STORAGE = "sqlite:///optuna.db"
_NAME_LIMIT = 512  # characters of a study's name: the storages' tables hold no more
_LOOK_SECONDS = 0.5  # between two pictures of the study on a terminal


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.tune",
        description="Search a GLUE task's hyperparameters with Optuna; every trial is a tracked training.",
        epilog="Run again, or on more machines, with the same --study and --storage: the study goes on, is shared.",
    )
    parser.add_argument("--task", metavar="TASK", required=True, help=f"one of {', '.join(TRAINABLE)}")
    parser.add_argument("--model", metavar="MODEL", help=f"one of {', '.join(configuration.options('model'))}, or the "
                        "path of a fairseq *.pt (default: minilm on CPU, roberta.base on GPUs)")  # fmt: skip
    parser.add_argument("--data", metavar="DATA", help="glue (default) or sample")
    parser.add_argument("--experiment", metavar="NAME", help="a recipe below experiments/ to start from")
    parser.add_argument("--trials", type=int, metavar="N", help="of the whole study (default: conf/tune/<task>.yaml)")
    parser.add_argument("--study", metavar="NAME", help="default: made of task, model, data and space")
    parser.add_argument("--storage", metavar="URL", default=os.environ.get("OPTUNA_STORAGE") or DEFAULT_STORAGE,
                        help="postgresql://..., grpc://host:port, or the path of a journal file (default: what "
                        "OPTUNA_STORAGE says, which no process list shows, "
                        f"else {DEFAULT_STORAGE})")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="trials at a time on this machine (default: as many "
                        "as its GPUs hold; 1 on CPU)")  # fmt: skip
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of this machine to use; 0: CPU (default: all)")
    parser.add_argument("--gpus-per-trial", type=int, default=1, metavar="N", help="DDP over N GPUs in every trial")
    parser.add_argument("--trials-per-gpu", type=int, default=1, metavar="N", help="trials that share a GPU")
    parser.add_argument("--procs", type=int, default=1, metavar="N", help="DDP over N CPU processes in every trial")
    parser.add_argument("--retries", type=int, metavar="N", help="times a trial whose process died starts again")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of conf/, tune.seeds=5 for example; "
                        "a key of the search space is then fixed")  # fmt: skip
    args = parser.parse_intermixed_args()
    for name in ("trials", "workers", "gpus_per_trial", "trials_per_gpu", "procs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected at least 1")
    if len(args.study or "") > _NAME_LIMIT:
        raise UserError(f"--study: a name of {len(args.study)} characters; expected at most {_NAME_LIMIT}")
    return args


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


def compose(args: argparse.Namespace) -> Search:
    """The search that the command line describes.

    Raises:
        UserError: a mistake in it or in ``conf/tune/``.
    """
    if args.task not in TRAINABLE:
        raise UserError(f"unknown task {args.task!r}{suggest(args.task, TRAINABLE)}")
    flags = {"tune.trials": args.trials, "tune.retries": args.retries}
    tuning = [f"{key}={value}" for key, value in flags.items() if value is not None]
    tuning += [entry for entry in args.overrides if entry.startswith("tune.")]
    asked = args.trials is not None or any(entry.startswith("tune.trials=") for entry in tuning)
    overrides = [entry for entry in args.overrides if not entry.startswith("tune.")]
    gpus = _gpus(args.gpus)
    model = args.model or ("roberta.base" if gpus and not args.experiment else None)
    choices = {"task": args.task, "model": model, "data": args.data, "experiment": args.experiment}
    fixed = {entry.lstrip("+~").partition("=")[0] for entry in overrides}
    overrides += [f"trainer.gpus={args.gpus_per_trial if gpus else 0}", f"trainer.procs={1 if gpus else args.procs}"]
    overrides += [] if "tracking.checkpoints" in fixed else ["tracking.checkpoints=false"]
    config, tune = configuration.compose_tune(tuning + overrides, **choices)

    from lightning_glue.space import make_space
    from lightning_glue.workers import places

    if gpus and args.gpus_per_trial > gpus:
        raise UserError(f"--gpus-per-trial {args.gpus_per_trial}: this machine gives {gpus} GPUs to the study")
    where = places(
        workers=args.workers, gpus=gpus, gpus_per_trial=args.gpus_per_trial,
        trials_per_gpu=args.trials_per_gpu, procs=args.procs,
    )  # fmt: skip
    space = make_space(tune.parameters, fixed)
    return Search(config, tune, space, where, tune.trials if asked else None)


def _gpus(asked: int | None) -> int:
    import torch

    there = torch.cuda.device_count()
    if asked is not None and asked > there:
        raise UserError(f"--gpus {asked}: this machine shows {there} CUDA devices")
    return there if asked is None else asked


def open_study(args: argparse.Namespace, search: Search) -> SharedStudy:
    """Make or join the study, its queue filled.

    Raises:
        UserError: the storage cannot be reached, or holds a study of that name made with another configuration.
    """
    from lightning_glue.sampling import make_pruner, make_sampler
    from lightning_glue.space import describe, first_trials
    from lightning_glue.storage import open_storage
    from lightning_glue.study import SharedStudy

    config, tune = search.config, search.tune
    first = first_trials(tune, config, search.space)
    searched = set(search.space)
    base = {key: value for key, value in configuration.identity(config).items() if key not in searched}
    same = {"space": describe(search.space), "configuration": base, "seeds": tune.seeds, "metric": search.metric}
    study = SharedStudy(
        args.study or default_name(search),
        open_storage(args.storage),
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
        print(f"study {study.name!r} is to have {planned} trials; this command works for the first {total} of them")
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
    from lightning_glue.space import with_parameters

    return configuration.unflatten(with_parameters(search.config, parameters))


def make_job(search: Search, study: SharedStudy, running: Running, seed: int, checkpoints: Path) -> Job:
    """The training of a trial with its ``seed``-th seed."""
    from lightning_glue.space import with_parameters
    from lightning_glue.study_tracking import run_name
    from lightning_glue.trial import Job

    flat = with_parameters(search.config, running.parameters)
    several = search.tune.seeds > 1
    flat["seed"] += seed
    name = f"trial {running.number}" + (f" seed {flat['seed']}" if several else "")
    flat["tracking.run_name"] = run_name(study.name, name).replace("${", "{")  # no interpolation
    tags = {"optuna.study": study.name, "optuna.trial": str(running.number)}
    return Job(flat, tags, str(checkpoints), study.id, search.tune.collapse_margin)


class Observer:
    """Passes what happens to the terminal, to MLflow and to the best recipe."""

    def __init__(self, search: Search, study: SharedStudy, board: Scoreboard, tracking: StudyTracking) -> None:
        self.search, self.study, self.board, self.tracking = search, study, board, tracking
        self.best: FrozenTrial | None = None  # the one in the recipe
        self._looked = 0.0

    def changed(self, running: list[Running]) -> None:
        from lightning_glue.slots import Slots

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
    from lightning_glue.tuned import write_recipe

    done = sum(trial.state.is_finished() for trial in study.trials())
    try:
        write_recipe(
            trial_config(search, best.params), study=study.name, trial=best.number, metric=search.metric,
            value=best.value, trials=done,
        )  # fmt: skip
    except OSError as error:
        print(f"warning: the best recipe cannot be kept: {error.filename}: {error.strerror}", file=sys.stderr)
        return False
    return True


def report(search: Search, study: SharedStudy, tracking: StudyTracking, storage: str) -> None:
    """Say what came out and what to do next."""
    from collections import Counter

    from lightning_glue.slots import Slots, is_surplus

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

    from lightning_glue.slots import is_surplus

    failed = [trial for trial in study.trials(TrialState.FAIL) if not is_surplus(trial)]
    return failed[-1].user_attrs.get("reason", "") if failed else ""


def start_tracking(search: Search, study: SharedStudy) -> StudyTracking:
    """The study's run, as this controller writes it."""
    from optuna.trial import TrialState

    from lightning_glue.study_tracking import StudyTracking, run_name
    from lightning_glue.tracking import MLflowTracker

    config = search.config
    params = {f"tune.{key}": value for key, value in vars(search.tune).items() if key not in ("spaces", "first_trials")}
    params |= {f"space.{key}": str(value) for key, value in search.space.items()}
    params |= configuration.flatten(config)
    experiment = config.tracking.experiment or get_task(config.task.name).experiment
    name = run_name(f"study {study.name}", "").strip()
    tracker = MLflowTracker(config.tracking.uri, experiment, name, config.tracking.journal)
    alone = study.created or not study.trials(TrialState.RUNNING)
    return StudyTracking(tracker, study, params, search.metric, alone=alone)


def tune(args: argparse.Namespace) -> int:
    """Run this machine's share of a study; the exit code."""
    search = compose(args)

    import optuna

    from lightning_glue.watcher import watch

    watch()  # it gets ready meanwhile
    with quick_imports():
        from lightning_glue.controller import Controller
        from lightning_glue.scoreboard import Scoreboard

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = open_study(args, search)
    tracking = start_tracking(search, study)
    where = hide_secrets(args.storage)
    print(f"study {study.name} at {where}: {len(search.space)} parameters, {len(search.places)} at a time")
    board = Scoreboard(search.metric, len(search.places))
    controller = Controller(
        study,
        search.space,
        lambda running, seed, folder: make_job(search, study, running, seed, folder),
        search.places,
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
    report(search, study, tracking, args.storage)
    if controller.stopped_by:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + controller.stopped_by
    if error:
        print(f"error: {hide_secrets(error)}", file=sys.stderr)
    return 1 if error else 0


def main() -> None:
    sys.exit(tune(parse_arguments()))


if __name__ == "__main__":
    run_main(main)
