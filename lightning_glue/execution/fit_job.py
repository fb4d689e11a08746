"""A training that a library's caller asks for: in the caller's process, or as the job of a group of workers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.execution.job import Fitted, Job, Report
from lightning_glue.training.messages import announce
from lightning_glue.training.run import Caller, Training, train
from lightning_glue.utils.launch import is_distributed_child
from lightning_glue.utils.quick_imports import quick_imports

if TYPE_CHECKING:
    from lightning_glue.training.resume import Resume


def preload() -> None:
    """Import before the job what takes seconds."""
    with quick_imports():
        importlib.import_module("lightning_glue.training.module")


class FitCaller(Caller):
    """Finds the run to go on with, and keeps the training for its caller to look at, however it ends.

    Args:
        resume: a run id, a ``last.ckpt``, ``auto``, or None.
    """

    def __init__(self, resume: str | None, shows: bool, tell_run: Callable[[str], None] = lambda run_id: None) -> None:
        self.resume, self.shows, self.tell_run = resume, shows, tell_run
        self.training: Training | None = None

    def find(self, config: Config) -> Resume | None:
        from lightning_glue.training.resume import check_config, find

        found = find(self.resume, config) if self.resume else None
        if found:
            check_config(found, config)
        return found

    def built(self, training: Training) -> None:
        from lightning_glue.training.resume import check_data

        self.training, training.preemption.exits = training, False
        if is_distributed_child():
            return
        if self.shows:
            announce(training.config, training.data, self.resume, training.found)
        if training.found and training.data.prepared:
            check_data(training.found, training.data.prepared.splits)

    def started(self, training: Training) -> None:
        self.tell_run(training.tracker.run_id)

    @property
    def run_id(self) -> str:
        """Of the run; empty as long as there is none."""
        return self.training.tracker.run_id if self.training else ""


def fit(config: Config, caller: FitCaller) -> Fitted:
    """Train in this process.

    Raises:
        UserError: nothing can be trained with this configuration on this machine.
        Diverged: the weights ceased to be numbers.
        SystemExit: it was asked to stop, and did so in order.
    """
    training = train(config, caller, register=config.tracking.register and config.tracking.checkpoints)
    assert training.best
    tracker = training.tracker
    folder = (tracker.artifacts / "fairseq").absolute()
    kept = folder.is_dir() and tracker.folder.absolute() not in folder.parents  # there it goes when it is delivered
    return Fitted(tracker.run_id, dict(training.best.values), str(folder) if kept else None)


def fit_job(job: Job, report: Report, tell_run: Callable[[str], None]) -> Fitted:
    """:func:`fit`, as a worker calls it."""
    return fit(configuration.unflatten(job.config), FitCaller(job.resume, job.shows, tell_run))
