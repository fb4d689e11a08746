"""Search a task's hyperparameters with Optuna: ``python -m lightning_glue.tune --task SST-2``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue import config as configuration
from lightning_glue.config import Config, TuneConfig
from lightning_glue.console import Parser, program
from lightning_glue.errors import UserError, run_main, suggest
from lightning_glue.tasks import TRAINABLE, get_task

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from lightning_glue.controller import Running
    from lightning_glue.scoreboard import Scoreboard
    from lightning_glue.space import Space
    from lightning_glue.study import SharedStudy
    from lightning_glue.study_tracking import StudyTracking
    from lightning_glue.trial import Job
    from lightning_glue.workers import Place


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
    parser.add_argument("--storage", metavar="URL", default="sqlite:///optuna.db", help="default: %(default)s; also "
                        "postgresql://..., grpc://host:port, or the path of a journal file")  # fmt: skip
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
    return args


@dataclass(frozen=True)
class Search:
    """What is searched, and from where.

    Attributes:
        given: keys and values of the command line that a recipe keeps.
        choices, overrides: what every trial composes its configuration from.
    """

    config: Config
    tune: TuneConfig
    space: Space
    places: list[Place]
    choices: dict[str, str | None]
    given: dict[str, Any]
    overrides: list[str]

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
    overrides = [entry for entry in args.overrides if not entry.startswith("tune.")]
    gpus = _gpus(args.gpus)
    model = args.model or ("roberta.base" if gpus and not args.experiment else None)
    choices = {"task": args.task, "model": model, "data": args.data, "experiment": args.experiment}
    config, tune = configuration.compose_tune(tuning + overrides, **choices)

    from lightning_glue.space import make_space
    from lightning_glue.workers import places

    if gpus and args.gpus_per_trial > gpus:
        raise UserError(f"--gpus-per-trial {args.gpus_per_trial}: this machine gives {gpus} GPUs to the study")
    fixed = {entry.lstrip("+~").partition("=")[0] for entry in overrides}
    where = places(
        workers=args.workers, gpus=gpus, gpus_per_trial=args.gpus_per_trial,
        trials_per_gpu=args.trials_per_gpu, procs=args.procs,
    )  # fmt: skip
    devices = [f"trainer.gpus={args.gpus_per_trial if gpus else 0}", f"trainer.procs={1 if gpus else args.procs}"]
    kept = [] if "tracking.checkpoints" in fixed else ["tracking.checkpoints=false"]
    flat = configuration.flatten(config)
    given = {key: flat[key] for key in fixed & flat.keys() if not key.startswith("tracking.")}
    space = make_space(tune.parameters, fixed)
    return Search(config, tune, space, where, choices, given, overrides + devices + kept)


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
    from lightning_glue.space import describe, first_trials
    from lightning_glue.study import SharedStudy, make_pruner, make_sampler, open_storage

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
    total = min(tune.trials, len(first)) if tune.sampler == "grid" else tune.trials
    study.fill_queue(total, first)
    return study


def default_name(search: Search) -> str:
    """``SST-2-minilm``, with ``-sample`` or the space's name where they are not the usual ones."""
    config, tune = search.config, search.tune
    parts = [config.task.name, config.model.name]
    parts += ["sample"] if config.data.source == "sample" else []
    parts += [tune.space] if tune.space != "wide" else []
    return "-".join(parts)


def make_job(search: Search, study: str, parent: str, running: Running, seed: int, checkpoints: Path) -> Job:
    """The training of a trial with its ``seed``-th seed."""
    from lightning_glue.trial import Job

    several = search.tune.seeds > 1
    name = f"{study} trial {running.number}" + (f" seed {search.config.seed + seed}" if several else "")
    values = [f"{key}={_literal(value)}" for key, value in running.parameters.items()]
    own = [f"seed={search.config.seed + seed}", f"tracking.run_name={configuration.quote(name)}"]
    tags = {"mlflow.parentRunId": parent, "optuna.study": study, "optuna.trial": str(running.number)}
    return Job(search.choices, search.overrides + values + own, tags, str(checkpoints), search.tune.collapse_margin)


def _literal(value: Any) -> str:
    return configuration.quote(value) if isinstance(value, str) else str(value)


class Observer:
    """Passes what happens to the terminal, to MLflow and to the best recipe."""

    def __init__(self, search: Search, study: SharedStudy, board: Scoreboard, tracking: StudyTracking) -> None:
        self.search, self.study, self.board, self.tracking = search, study, board, tracking
        self.best: int | None = None  # number of the trial in the recipe

    def changed(self, running: list[Running]) -> None:
        self.board.update(self.study.trials(), running)

    def finished(self, trial: FrozenTrial, runs: list[str]) -> None:
        self.board.finished(trial)
        self.tracking.finished(trial, runs)
        best = best_trial(self.study)
        if best and best.number != self.best:
            self.best = best.number
            keep_recipe(self.search, self.study, best)


def best_trial(study: SharedStudy) -> FrozenTrial | None:
    """The complete trial with the highest value, the first of equals; None where none is complete."""
    from optuna.trial import TrialState

    return max(study.trials(TrialState.COMPLETE), key=lambda trial: trial.value, default=None)


def keep_recipe(search: Search, study: SharedStudy, best: FrozenTrial) -> None:
    from lightning_glue.tuned import write_recipe

    done = sum(trial.state.is_finished() for trial in study.trials())
    write_recipe(
        search.config, search.given | best.params, study=study.name, trial=best.number, metric=search.metric,
        value=best.value, trials=done,
    )  # fmt: skip


def report(args: argparse.Namespace, search: Search, study: SharedStudy, tracking: StudyTracking) -> None:
    """Say what came out and what to do next."""
    from collections import Counter

    counts = Counter(trial.state.name.lower() for trial in study.trials())
    print(f"\nstudy {study.name}: " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    best = best_trial(study)
    task = search.config.task.name
    if best:
        print(f"best trial {best.number}: {search.metric} {best.value:.4f}")
        for key, value in best.params.items():
            print(f"  {key:<28}{value:.6g}" if isinstance(value, float) else f"  {key:<28}{value}")
    print(f"run: {tracking.run_id} at {tracking.client.tracking_uri}\nnext:")
    if best:
        keep_recipe(search, study, best)  # another study of the task may have written its own meanwhile
        command = f"{program('python')} -m lightning_glue.train --experiment tuned/{task}"
        print(f"  {command}\n      train with the best parameters")
    print(f"  {program('optuna-dashboard')} {args.storage}\n      look at the study")


def tune(args: argparse.Namespace) -> int:
    """Run this machine's share of a study; the exit code."""
    search = compose(args)

    import optuna

    from lightning_glue.controller import Controller
    from lightning_glue.scoreboard import Scoreboard
    from lightning_glue.study_tracking import StudyTracking

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = open_study(args, search)
    params = {f"tune.{key}": value for key, value in vars(search.tune).items() if key not in ("spaces", "first_trials")}
    params |= {f"space.{key}": str(value) for key, value in search.space.items()}
    experiment = search.config.tracking.experiment or get_task(search.config.task.name).experiment
    params |= configuration.flatten(search.config)
    tracking = StudyTracking(search.config.tracking.uri, experiment, study, params, search.metric)
    print(f"study {study.name} at {args.storage}: {len(search.space)} parameters, {len(search.places)} at a time")
    board = Scoreboard(search.metric, len(search.places))
    controller = Controller(
        study,
        search.space,
        lambda running, seed, folder: make_job(search, study.name, tracking.run_id, running, seed, folder),
        search.places,
        Observer(search, study, board, tracking),
        seeds=search.tune.seeds,
        warm=search.tune.warm,
    )
    status = "FAILED"
    try:
        with board:
            controller.run()
        status = "KILLED" if controller.stopped_by else "FINISHED"
    finally:
        tracking.close(status)
    report(args, search, study, tracking)
    if controller.stopped_by:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + controller.stopped_by
    return 0


def main() -> None:
    sys.exit(tune(parse_arguments()))


if __name__ == "__main__":
    run_main(main)
