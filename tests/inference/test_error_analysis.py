"""Error analysis and calibration, from arrays to tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lightning_glue.errors import DataError
from lightning_glue.inference import calibration
from lightning_glue.inference.diagnostic import read_diagnostic
from lightning_glue.inference.error_analysis import Rows, analyse, has_negation, overlap, table
from lightning_glue.tasks import TASKS, Task

MANY = Task("own", ("ä b", "c", "d"), ("f1",), None, (), (), multilabel=True)


def rows(task: Task, outputs: list, targets: list, texts: list | None = None) -> Rows:
    found, true = np.array(outputs, dtype=np.float32), np.array(targets)
    columns = texts or [[f"text {i}" for i in range(len(true))]] * task.num_texts
    lines, lengths = range(11, 11 + len(true)), np.arange(1, len(true) + 1)
    return Rows(task, lines, columns, lengths, found, true, np.arange(len(true), dtype=float))


def right(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float((outputs.argmax(-1) == targets).mean())


@given(st.integers(0, 10**6), st.booleans())
def test_the_temperature_has_the_least_loss(seed: int, several: bool) -> None:
    generator = np.random.default_rng(seed)
    outputs = generator.normal(size=(60, 3)) * generator.uniform(0.5, 6)
    targets = generator.integers(0, 2, (60, 3)) if several else generator.integers(0, 3, 60)

    def loss(log: float) -> float:
        shares = calibration.probabilities(outputs, several=several, temperature=np.exp(log)).clip(1e-300, 1)
        if several:
            return float(-np.where(targets == 1, np.log(shares), np.log((1 - shares).clip(1e-300))).mean())
        return float(-np.log(shares[np.arange(60), targets]).mean())

    expected = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded", options={"xatol": 1e-9})
    found = calibration.fit_temperature(outputs, targets, several=several)
    assert loss(float(np.log(found))) <= expected.fun + 1e-9


def test_calibration_error_by_hand() -> None:
    sure, good = np.array([0.9, 0.92, 0.61, 1.0]), np.array([True, False, True, True])
    bins = calibration.reliability(sure, good)
    assert sum(one.rows for one in bins) == 4
    assert calibration.expected_error(bins) == pytest.approx((2 * abs(0.91 - 0.5) + abs(0.61 - 1) + abs(1.0 - 1.0)) / 4)
    assert calibration.expected_error(calibration.reliability(np.empty(0), np.empty(0, bool))) == 0


def test_worst_confident_and_slices() -> None:
    found = rows(TASKS["SST-2"], [[4, 0], [0, 4], [0.2, 0], [0, 9]], [0, 0, 1, 1],
                 [["fine", "it does n't work", "never", "long " * 900]])  # fmt: skip
    page = analyse(found, right, 2.0)
    assert page["columns"] == ["line", "text", "label", "predicted", "probability_0", "probability_1", "loss"]
    assert [row[0] for row in page["worst"]] == [14, 13, 12, 11]
    assert len(page["worst"][0][1]) == 2000
    assert [row[0] for row in page["confident"]] == [12, 13]
    parts = {one["slice"]: one for one in page["slices"]}
    assert (parts["all"]["rows"], parts["all"]["metric"]) == (4, 0.5)
    assert (parts["negation"]["rows"], parts["negation"]["right"]) == (2, 0.0)
    assert (parts["class 1"]["rows"], parts["class 1"]["loss"]) == (2, 2.5)
    assert sum(one["rows"] for name, one in parts.items() if name.startswith("tokens")) == 4
    assert page["calibrated"]["ece"] != page["calibration"]["ece"]


def test_pairs_scores_and_several_labels() -> None:
    pairs = rows(TASKS["STS-B"], [[0.2], [0.9]], [0.4, 1.0], [["a b", "c"], ["a c", "C"]])
    page = analyse(pairs, lambda outputs, targets: 0.0, None)
    parts = {one["slice"]: one for one in page["slices"]}
    assert parts["all"]["right"] == pytest.approx(0.75)  # the mean absolute error of 1.0 and 0.5
    assert parts["words in common 25% to 50%"]["rows"] == parts["words in common 75% to 100%"]["rows"] == 1
    assert parts["score 4 to 5"]["rows"] == 1
    assert "calibration" not in page
    several = rows(MANY, [[5, -5, 5], [-5, -5, -5]], [[1, 0, 0], [0, 0, 0]], [["x", "y"]])
    assert table(several)["predicted"] == [["ä b", "d"], []]
    assert analyse(several, lambda outputs, targets: 0.0, 1.0)["slices"][0]["right"] == 0.5


@pytest.mark.parametrize(("text", "expected"), [("does n't", True), ("Not so", True), ("knot", False), ("isn't", True)])
def test_negation(text: str, expected: bool) -> None:
    assert has_negation(text) is expected


def test_overlap_of_texts_without_words() -> None:
    assert overlap("...", "") == 0
    assert overlap("a b", "B a!") == 1


HEADER = "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain\tPremise\tHypothesis\tLabel\n"


def test_the_diagnostic_set_by_phenomenon(tmp_path: Path) -> None:
    assert read_diagnostic(tmp_path) is None
    file = tmp_path / "diagnostic" / "diagnostic-full.tsv"
    file.parent.mkdir()
    file.write_text(HEADER + "Factivity;Quantifiers\t\tNegation\t\tNews\tA b.\tC.\tentailment\r\n"
                    + "\t\tNegation\t\tNews\t\"D\tE.\tneutral\n")  # fmt: skip
    found = read_diagnostic(tmp_path)
    assert found is not None
    assert found.texts == (["A b.", '"D'], ["C.", "E."])
    assert found.labels == [2, 1]
    assert found.phenomena == {
        "Lexical Semantics": [0], "Lexical Semantics: Factivity": [0], "Lexical Semantics: Quantifiers": [0],
        "Logic": [0, 1], "Logic: Negation": [0, 1],
    }  # fmt: skip
    file.write_text(HEADER + "a\tb\n")
    with pytest.raises(DataError, match="diagnostic-full.tsv:2"):
        read_diagnostic(tmp_path)
    file.write_text("index\tsentence1\n")
    with pytest.raises(DataError, match="diagnostic-full.tsv:1: no column 'Lexical Semantics'"):
        read_diagnostic(tmp_path)


def test_a_model_that_knows_nothing_has_a_temperature_at_the_bound() -> None:
    outputs = np.array([[3.0, -3.0], [-3.0, 3.0]] * 20)
    knows, ignores = np.array([0, 1] * 20), np.array([1, 0] * 20)
    for targets in (knows, ignores):
        assert calibration.at_bound(calibration.fit_temperature(outputs, targets, several=False))
