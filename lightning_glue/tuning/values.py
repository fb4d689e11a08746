"""What the trials of a study have reached."""

from __future__ import annotations

from collections.abc import Iterable

from optuna.trial import FrozenTrial, TrialState


def value_of(trial: FrozenTrial) -> float:
    """The selection metric that a complete trial has reached."""
    assert trial.value is not None, f"trial {trial.number} is {trial.state.name}"
    return trial.value


def best_of(trials: Iterable[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial with the highest value, the first of equals; None where none is complete."""
    complete = (trial for trial in trials if trial.state == TrialState.COMPLETE)
    return max(complete, key=value_of, default=None)
