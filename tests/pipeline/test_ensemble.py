"""An ensemble says what the mean of probabilities says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_glue.errors import DataError
from lightning_glue.pipeline.ensemble import ensemble
from lightning_glue.pipeline.outputs import Outputs

FINITE = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-5, 5, width=32)


def of(outputs: np.ndarray, task: str = "MNLI") -> Outputs:
    return Outputs(task, "dev_matched" if task == "MNLI" else "dev", outputs, np.zeros(len(outputs), np.int64), None)


@settings(deadline=None, max_examples=50)
@given(arrays(np.float32, (3, 4, 3), elements=FINITE))
def test_probabilities_are_averaged(logits: np.ndarray) -> None:
    found = ensemble([of(member) for member in logits]).outputs
    expected = scipy.special.softmax(logits.astype(np.float64), axis=-1).mean(0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(scipy.special.softmax(found.astype(np.float64), axis=-1), expected, atol=1e-6)
    chosen = expected[np.arange(4), found.argmax(-1)]
    assert (chosen >= expected.max(-1) - 1e-15).all()


@settings(deadline=None, max_examples=50)
@given(arrays(np.float32, (5, 3), elements=FINITE))
def test_one_model_predicts_what_it_predicts(logits: np.ndarray) -> None:
    chosen = ensemble([of(logits)]).outputs.argmax(-1)
    most = logits.max(-1)  # as near as probabilities tell them apart
    assert (logits[np.arange(5), chosen] >= most - 1e-6 * np.abs(most) - 1e-7).all()


def test_scores_are_averaged_and_a_lost_row_stays_lost() -> None:
    members = [of(np.array([[0.1], [np.nan]], np.float32), "STS-B"), of(np.array([[0.3], [0.5]], np.float32), "STS-B")]
    np.testing.assert_array_equal(ensemble(members).outputs, np.array([[0.2], [np.nan]], np.float32))
    lost = [of(np.array([[np.nan, 0, 0]], np.float32)), of(np.zeros((1, 3), np.float32))]
    assert np.isnan(ensemble(lost).outputs).all()


def test_members_of_other_rows_are_refused() -> None:
    one = of(np.zeros((2, 3), np.float32))
    others = [
        of(np.zeros((3, 3), np.float32)), of(np.zeros((2, 1), np.float32), "STS-B"),
        replace(one, split="dev_mismatched"),
        replace(one, targets=np.array([0, 1])), replace(one, targets=None, index=["0", "1"]),
    ]  # fmt: skip
    for other in others:
        with pytest.raises(DataError):
            ensemble([one, other])
    unlabelled = replace(one, targets=None, index=["0", "1"])
    with pytest.raises(DataError, match="the rows are not the same"):
        ensemble([unlabelled, replace(unlabelled, index=["1", "0"])])
    with pytest.raises(DataError, match="no models"):
        ensemble([])
