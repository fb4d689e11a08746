"""What several models say together: the mean of their probabilities, or of their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lightning_glue.errors import DataError
from lightning_glue.pipeline.outputs import Outputs
from lightning_glue.tasks import get_task


def ensemble(members: Sequence[Outputs]) -> Outputs:
    """The ensemble of several models' outputs for one split.

    Classification: logits whose softmax is the mean of the members' probabilities; the highest of a row is 0, so that
    rounding to float32 makes no two classes equal that were not. Regression: the mean of the scores. Computed in
    float64. A row that is NaN for one member is NaN.

    Raises:
        DataError: no members, or they are not of the same rows of the same split.
    """
    if not members:
        raise DataError("an ensemble of no models; expected at least one")
    first = members[0]
    for other in members[1:]:
        _check_same_rows(first, other)
    outputs = np.stack([member.outputs for member in members]).astype(np.float64)
    if get_task(first.task).is_regression:
        return replace(first, outputs=outputs.mean(0).astype(np.float32))
    with np.errstate(divide="ignore", invalid="ignore"):  # infinite logits: NaN, which is no prediction
        sums = _log_sum_exp(_log_softmax(outputs), axis=0)
        together = sums - sums.max(-1, keepdims=True)
    return replace(first, outputs=together.astype(np.float32))


def _check_same_rows(one: Outputs, other: Outputs) -> None:
    what = f"{one.task}'s {one.split}"
    if (one.task, one.split) != (other.task, other.split):
        raise DataError(f"an ensemble of {what} and {other.task}'s {other.split}; expected one split")
    if one.outputs.shape != other.outputs.shape:
        raise DataError(f"{what}: {len(one)} and {len(other)} rows; predict both with the same files")
    same_targets = one.targets is None or np.array_equal(one.targets, other.targets)  # type: ignore[arg-type]
    if not same_targets or (one.targets is None) != (other.targets is None) or one.index != other.index:
        raise DataError(f"{what}: the rows are not the same; predict all members with the same files")


def _log_softmax(values: np.ndarray) -> np.ndarray:
    return values - _log_sum_exp(values, axis=-1)[..., None]


def _log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    """Logarithm of the sum of exponentials along an axis, without overflow."""
    highest = values.max(axis, keepdims=True)
    return np.squeeze(highest, axis) + np.log(np.exp(values - highest).sum(axis))
