"""A training that a library's caller asks for: in the caller's process, or as the job of a group of workers."""

from __future__ import annotations

from collections.abc import Callable

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.execution.job import Fitted, Job, Report
from lightning_glue.execution.train_job import preload as preload
from lightning_glue.training.resuming_caller import ResumingCaller
from lightning_glue.training.run import Training, train


class FitCaller(ResumingCaller):
    """Finds the run to go on with, and keeps the training for its caller to look at, however it ends.

    Args:
        resume: a run id, a ``last.ckpt``, ``auto``, or None.
    """

    def __init__(self, resume: str | None, shows: bool, tell_run: Callable[[str], None] = lambda run_id: None) -> None:
        super().__init__(resume, shows)
        self.tell_run = tell_run
        self.training: Training | None = None

    def built(self, training: Training) -> None:
        self.training, training.preemption.exits = training, False
        super().built(training)

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
