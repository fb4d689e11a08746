"""The training of a job, as ``python -m lightning_glue.train`` does it, with its reports."""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.errors import Diverged, OutOfMemory, UserError
from lightning_glue.execution.job import Job, Outcome, Report, TrainingFailed
from lightning_glue.training.build import Warm
from lightning_glue.training.run import Caller, Training, train
from lightning_glue.utils.logs import log
from lightning_glue.utils.quick_imports import quick_imports

if TYPE_CHECKING:
    from lightning_glue.data.binarize import SplitInfo
    from lightning_glue.training.callbacks import BestEvaluation
    from lightning_glue.training.resume import Resume

_warm = Warm()  # of the last job in this process


def preload() -> None:
    """Import before the first job what takes seconds."""
    with quick_imports():
        importlib.import_module("lightning_glue.training.module")


class WorkerCaller(Caller):
    """Attributes: begun: whether model and data were there: an error since then is of the machine."""

    begun = False


class JobCaller(WorkerCaller):
    """Reports a job's evaluations, and goes on with what a process that died left in the job's folder."""

    def __init__(self, job: Job, report: Report, tell_run: Callable[[str], None], start: float) -> None:
        self.job, self.report, self.tell_run, self.start = job, report, tell_run, start
        self.tags, self.parent, self.checkpoints, self.warm = job.tags, job.parent, Path(job.checkpoints), _warm

    def built(self, training: Training) -> None:
        from lightning_glue.execution.reporting import Reporting

        self.reporting = Reporting(training.module.task.selection_metric, self.report, self.start)
        self.callbacks = [self.reporting]
        assert self.checkpoints
        splits = training.data.prepared.splits
        training.found = interrupted(self.checkpoints, training.config, splits, self.parent)
        self.begun = True

    def started(self, training: Training) -> None:
        self.tell_run(training.tracker.run_id)

    def ending(self, training: Training, best: BestEvaluation) -> None:
        collapsed, pruned = self.has_collapsed(training, best), self.reporting.pruned
        tags = {"optuna.pruned": str(pruned).lower(), "collapsed": str(collapsed).lower()}
        training.tracker.set_tags(tags | {"optuna.state": "PRUNED" if pruned else "COMPLETE"})

    def has_collapsed(self, training: Training, best: BestEvaluation) -> bool:
        """Whether the best evaluation is hardly better than saying the majority class."""
        from lightning_glue.training.metrics import majority_value

        task = training.module.task
        level = majority_value(task, best.evaluations[task.dev[0].name].targets)
        return best.values[task.selection_metric] <= level + self.job.collapse_margin


def attempt(config: Config, caller: WorkerCaller) -> Training:
    """One training, as a worker tells how it ended.

    Raises:
        UserError: nothing can be trained with this configuration on this machine.
        Diverged, OutOfMemory: so it would end with these parameters again.
        TrainingFailed: something hindered one that had begun.
    """
    try:
        return train(config, caller)
    except (Diverged, OutOfMemory):
        raise
    except UserError as error:
        if not caller.begun:
            raise
        raise TrainingFailed(str(error)) from error  # a full disk, a database that is locked


def train_job(job: Job, report: Report, tell_run: Callable[[str], None]) -> Outcome:
    """Train in an MLflow run of its own.

    Raises:
        UserError: nothing can be trained with this configuration on this machine.
        Diverged, OutOfMemory: so it would end with these parameters again.
        TrainingFailed: something else hindered it.
    """
    from lightning_glue.training.resume import split_digests

    caller = JobCaller(job, report, tell_run, time.perf_counter())
    training = attempt(configuration.unflatten(job.config), caller)
    best = training.best
    assert best
    digests = split_digests(training.data.prepared.splits)
    value, first_step = best.values[training.module.task.selection_metric], caller.reporting.first_step_seconds
    collapsed = caller.has_collapsed(training, best)
    return Outcome(value, training.tracker.run_id, caller.reporting.pruned, collapsed, first_step, digests)


def interrupted(
    checkpoints: Path, config: Config, splits: Mapping[str, SplitInfo], parent: Mapping[str, str] | None
) -> Resume | None:
    """The training that a process left in this folder when it died, unless it had come to its end.

    What cannot be read there, or is of another configuration, other data or another study, is removed: the training
    begins anew.
    """
    from lightning_glue.tracking.journal import Journal
    from lightning_glue.tracking.journals import find_journal
    from lightning_glue.training.resume import check_config, check_data, read_checkpoint

    path = checkpoints / "last.ckpt"
    if not path.is_file():
        return None
    try:
        found = read_checkpoint(path)
        check_config(found, config)
        check_data(found, dict(splits))
        journal = find_journal(Path(config.tracking.journal), found.run_id)
        of = (Journal(journal).start() or {}).get("parent") if journal else None
        if of and of != parent:
            raise UserError(f"run {found.run_id} is of another study")
    except UserError as error:
        log.warning("%s is removed, the training begins anew: %s", path, error)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return None
    return None if journal and Journal(journal).status() == "FINISHED" else found
