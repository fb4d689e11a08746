"""A training that is asked of a worker, and what came of it; both travel as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        config: the whole configuration, by dotted keys; nothing is read from ``conf/`` any more.
        tags: for the MLflow run.
        checkpoints: folder for them; if it has some, from a process that died, the training goes on from there.
        parent: what tells the run that is the parent of the training's, if any; see
            :class:`~lightning_glue.tracking.logger.MLflowTracker`.
        collapse_margin: a training not better than the majority class by this much has collapsed.
        resume: the run to go on with, as ``--resume`` names it.
        shows: evaluations and progress on standard output.
        todo: of a job of a benchmark, see :mod:`lightning_glue.pipeline.jobs`: its ``kind`` and what that needs.
    """

    config: dict[str, Any]
    tags: dict[str, str]
    checkpoints: str
    parent: dict[str, str] | None = None
    collapse_margin: float = 0.0
    resume: str | None = None
    shows: bool = True
    todo: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a training came to.

    Attributes:
        value: the highest selection metric of its evaluations; None where it was stopped before the first.
        collapsed: whether ``value`` is that of predicting the majority class.
        first_step_seconds: from the job's arrival to the end of the first optimizer step.
        data: digests of the splits, by name.
    """

    value: float | None
    run_id: str = ""
    pruned: bool = False
    collapsed: bool = False
    first_step_seconds: float | None = None
    data: dict[str, str] = field(default_factory=dict)


@dataclass
class Fitted:
    """What a training of a library's caller came to.

    Attributes:
        metrics: of the best evaluation, by name.
        folder: of the exported model on this machine; None where it is in a remote store, or was not kept.
    """

    run_id: str
    metrics: dict[str, float]
    folder: str | None


class TrainingFailed(Exception):
    """A training that had begun could not go on, for no reason that lies in the configuration."""


Report = Callable[[int, float], bool]  # (evaluation, value) -> whether to stop
Objective = Callable[[Job, Report, Callable[[str], None]], Outcome | Fitted]  # the last tells the MLflow run id
