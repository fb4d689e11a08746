"""Metrics of tasks of one's own against scikit-learn's, also where there is nothing to count."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from lightning_glue.errors import ConfigError
from lightning_glue.tasks import Split, Task
from lightning_glue.training.metrics import check_metrics, compute, majority_value
from lightning_glue.training.named_metrics import _classes


def task(labels: int, *names: str, multilabel: bool = False) -> Task:
    return Task(
        "own", tuple(f"label {i}" for i in range(labels)), names, None, (Split("dev"),), (), multilabel=multilabel
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data(), classes=st.integers(2, 6))
def test_of_classes(data: st.DataObject, classes: int) -> None:
    ids = st.lists(st.integers(0, classes - 1), min_size=1, max_size=30)
    targets = data.draw(ids)
    predicted = data.draw(st.lists(st.integers(0, classes - 1), min_size=len(targets), max_size=len(targets)))
    outputs = torch.nn.functional.one_hot(torch.tensor(predicted), classes).float() * 3
    found = compute(task(classes, "f1_macro", "cohen_kappa", "recall_macro"), outputs, torch.tensor(targets))
    labels = [*range(classes)]
    f1 = sklearn_metrics.f1_score(targets, predicted, labels=labels, average="macro", zero_division=0)
    assert found["f1_macro"] == pytest.approx(f1)
    if len(set(targets) | set(predicted)) > 1:
        kappa = sklearn_metrics.cohen_kappa_score(targets, predicted)
        assert found["cohen_kappa"] == pytest.approx(kappa, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), labels=st.integers(1, 5))
def test_of_any_number_of_labels(data: st.DataObject, labels: int) -> None:
    row = st.lists(st.booleans(), min_size=labels, max_size=labels)
    targets = data.draw(st.lists(row, min_size=1, max_size=20))
    predicted = data.draw(st.lists(row, min_size=len(targets), max_size=len(targets)))
    outputs = torch.tensor(predicted).float() - 0.5
    of = task(labels, "f1_micro", "f1_macro", multilabel=True)
    found = compute(of, outputs, torch.tensor(targets).float())
    for average in ("micro", "macro"):
        scores = sklearn_metrics.f1_score(
            torch.tensor(targets).int().numpy().reshape(-1, labels),
            torch.tensor(predicted).int().numpy().reshape(-1, labels),
            average=average if labels > 1 else "binary",
            zero_division=0,
        )
        assert found[f"f1_{average}"] == pytest.approx(scores)
    lost = outputs.clone()
    lost[0, 0] = torch.nan  # has no prediction
    nothing = outputs.clone()
    nothing[0] = -1
    without = compute(of, nothing, torch.tensor(targets).float())
    assert compute(of, lost, torch.tensor(targets).float()) == without
    assert compute(of, torch.empty(0, labels), torch.empty(0, labels)) == {"f1_micro": 0.0, "f1_macro": 0.0}


def test_probabilities_and_scores_are_what_torchmetrics_gets() -> None:
    outputs, targets = torch.randn(50, 2), torch.arange(50) % 2
    shares = outputs.double().softmax(-1)
    two = compute(task(2, "auroc", "MulticlassAveragePrecision"), outputs, targets)
    assert two["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(targets, shares[:, 1]), abs=1e-6)
    scores, truth = torch.rand(50, 1), torch.rand(50)
    of = dataclasses.replace(task(0, "r2_score", "mae", "pearson"), label_scale=10.0, label_offset=-5.0, bounded=False)
    found = compute(of, scores, truth)
    mean = sklearn_metrics.mean_absolute_error(truth * 10 - 5, scores[:, 0] * 10 - 5)
    assert found["mae"] == pytest.approx(mean, rel=1e-5)
    assert found["r2_score"] == pytest.approx(sklearn_metrics.r2_score(truth, scores[:, 0]), rel=1e-4)
    assert compute(of, torch.full((50, 1), torch.nan), truth) == {"r2_score": 0.0, "mae": 0.0, "pearson": 0.0}


@pytest.mark.parametrize("classes", [0, 2, 3])
def test_every_metric_is_a_number_of_one_row_and_of_one_class(classes: int) -> None:
    """Whatever torchmetrics' own say of it: of a constant prediction none that corrects for chance is above 0."""
    corrected = {"matthews", "cohenkappa"}
    for name in {*_classes(classes == 0), *corrected, "r2_score", "auroc"}:
        of = task(classes, name)
        try:
            check_metrics(of)
        except ConfigError:
            continue
        outputs = torch.tensor([[0.4]] * 5) if not classes else torch.eye(classes)[[1] * 5] * 3
        for targets in ([1], [0], [1] * 5, [0] * 5, [1, 0, 1, 1, 0]):
            truth = torch.tensor(targets) if classes else torch.tensor(targets) / 2
            value = compute(of, outputs[: len(targets)], truth)[name]
            assert math.isfinite(value), name
            assert value <= 0 or not any(one in name for one in corrected), name


def test_the_majority_of_several_labels_is_the_most_frequent_one_for_every_example() -> None:
    targets = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 0]])
    predicted = [[0, 1, 0]] * 3
    expected = sklearn_metrics.f1_score(targets.numpy(), predicted, average="micro")
    assert majority_value(task(3, "f1_micro", multilabel=True), targets) == pytest.approx(expected)


@pytest.mark.parametrize(
    "good",
    [
        task(2, "accuracy", "f1", "f1_macro", "matthews", "auroc", "BinaryCalibrationError", "precision_weighted"),
        task(5, "f1_macro", "macro f1", "MulticlassAUROC", "cohen_kappa", "MulticlassCalibrationError"),
        task(3, "f1_micro", "MultilabelHammingDistance", "average_precision", "exact_match", multilabel=True),
        task(0, "spearman", "r2_score", "mean_squared_error", "KendallRankCorrCoef", "concordance_corr_coef"),
    ],
)
def test_metrics_that_can_be_used(good: Task) -> None:
    check_metrics(good)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (task(3, "acuracy"), "no metric 'acuracy' for 3 classes; did you mean MulticlassAUROC or MulticlassAccuracy?"),
        (task(3, "f1"), "f1 is of two classes, own has 3; say f1_macro"),
        (task(3, "BinaryF1Score"), "'BinaryF1Score' is not for 3 classes; expected one of multiclass"),
        (task(3, "calibration_error"), "calibration_error is not better the higher it is; the first metric selects"),
        (task(3, "accuracy", "confusion_matrix"), "'confusion_matrix' is no single number"),
        (task(0, "accuracy"), "no metric 'accuracy' for a regression"),
        (task(0, "pearson", "f1_macro"), "no metric 'f1_macro' for a regression"),
        (task(3, "auroc_micro"), "'auroc_micro' cannot be used"),
        (task(2, "matthews_corrcoef"), "'matthews_corrcoef' of torchmetrics is not 0 for a constant prediction; say"),
        (task(2, "accuracy", "BinaryMatthewsCorrCoef"), "is not 0 for a constant prediction; say matthews"),
        (task(3, "matthews", multilabel=True), "no metric 'matthews' for any number of labels; "),
    ],
)
def test_metrics_that_cannot_be_used_are_named(wrong: Task, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_metrics(wrong)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
