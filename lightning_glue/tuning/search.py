"""A search, run: the study, its trials' jobs, and what this machine's share of it came to."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue import config as configuration
from lightning_glue.tuning.request import Request, Search, compose_search, default_name
from lightning_glue.utils.logs import log
from lightning_glue.utils.quick_imports import quick_imports
from lightning_glue.utils.redact import hide_secrets

if TYPE_CHECKING:
    from lightning_glue.execution.engines import Engine
    from lightning_glue.execution.executor import Executor
    from lightning_glue.execution.job import Job
    from lightning_glue.tuning.controller import Running
    from lightning_glue.tuning.study import SharedStudy
    from lightning_glue.tuning.study_run import StudyTracking

OBJECTIVE = "lightning_glue.execution.train_job:train_job"


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


def make_groups(
    request: Request, search: Search, engine: Engine, folder: Path, *, shows: bool = False
) -> Sequence[Executor]:
    """The slots of the search."""
    from lightning_glue.execution.joining import Files
    from lightning_glue.execution.place import AUTO, Division
    from lightning_glue.execution.throughput import best_division

    config = search.config
    workers = None if isinstance(request.workers, str) else request.workers
    how = Division(workers, search.gpus, request.gpus_per_trial, request.trials_per_gpu, request.procs)
    if request.workers == AUTO:
        how = best_division(how, configuration.flatten(search.config), folder, shows=shows)
    folder_of_glue = config.data.glue_dir if config.data.source == "glue" else None
    own = tuple(str(file["path"]) for file in (config.task.description or {"files": {}})["files"].values())
    files = Files((config.task.name,) if folder_of_glue else (), folder_of_glue, own)
    return engine.groups(how, OBJECTIVE, folder, files)


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
    from lightning_glue.execution.engines import open_engine

    with open_engine(request.engine, request.address) as engine:
        return _run(request, compose_search(request, engine), engine, shows)


def _run(request: Request, search: Search, engine: Engine, shows: bool) -> Finished:
    import optuna

    from lightning_glue.model.fairseq_import import check_fairseq
    from lightning_glue.tracking.watcher import watch

    check_fairseq()  # else every trial would say so
    watch()  # it gets ready meanwhile
    with quick_imports():
        from lightning_glue.tuning.controller import Controller, study_folder
        from lightning_glue.tuning.observer import StudyObserver
        from lightning_glue.tuning.results import report_study, study_status
        from lightning_glue.tuning.scoreboard import Scoreboard

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = open_study(request, search)
    search.warn_of_unused_epochs()  # not before: a mistake is one line
    tracking = start_tracking(search, study)
    groups = make_groups(request, search, engine, study_folder(study.name, study.id), shows=shows)
    where = hide_secrets(request.storage)
    if shows:
        print(f"study {study.name} at {where}: {len(search.space)} parameters, {len(groups)} at a time")
    board = Scoreboard(search.metric, len(groups), shows=shows)
    controller = Controller(
        study,
        search.space,
        lambda running, seed, folder: make_job(search, study, running, seed, folder),
        groups,
        StudyObserver(search, study, board, tracking),
        seeds=search.tune.seeds,
        warm=search.tune.warm,
    )
    status, error = "FAILED", ""
    try:
        with board:
            controller.run()
        status, error = study_status(study, controller)
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracking.close(status)
    if shows:
        report_study(search, study, tracking, request.storage)
    return Finished(study, tracking.tracker.run_id, controller.stopped_by, error)
