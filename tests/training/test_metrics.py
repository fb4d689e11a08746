"""GLUE's metrics against scikit-learn and scipy, on every kind of set that has little to count, too."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef, mean_squared_error

from lightning_glue.model.roberta import task_loss
from lightning_glue.tasks import TASKS, Task
from lightning_glue.training.metrics import SplitOutputs, compute, majority_value, mean_loss

pytestmark = pytest.mark.filterwarnings("ignore:A single label was found")
CLASSIFICATION = [name for name, task in TASKS.items() if not task.is_regression]
NO_LABEL = -1  # what scikit-learn is told for a row whose outputs are not numbers


def defined(value: float) -> float:
    """GLUE counts what is undefined as 0."""
    return 0.0 if math.isnan(value) else float(value)


def scikit_learn(metric: str, targets: list[int], predicted: list[int]) -> float:
    if metric == "f1":  # of class "1", whatever its frequency
        return f1_score(targets, predicted, labels=[1], average=None, zero_division=0)[0]
    return {"accuracy": accuracy_score, "matthews": matthews_corrcoef}[metric](targets, predicted)


def scipy(metric: str, outputs: np.ndarray, targets: np.ndarray) -> float:
    if len(targets) < 2:
        return 0.0  # pearsonr raises
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return defined({"pearson": pearsonr, "spearman": spearmanr}[metric](outputs, targets)[0])


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Task, list[int], list[int]]:
    """A task, true and predicted labels: few rows, often of one class, some without a prediction."""
    task = TASKS[draw(st.sampled_from(CLASSIFICATION))]
    labels = st.integers(0, len(task.labels) - 1)
    rows = draw(st.integers(1, 12))
    kinds = [st.lists(labels, min_size=rows, max_size=rows), labels.map(lambda label: [label] * rows)]
    targets = draw(st.one_of(kinds))
    lost = st.lists(labels | st.just(NO_LABEL), min_size=rows, max_size=rows)
    return task, targets, draw(st.one_of(*kinds, st.just(targets), lost))


def outputs_for(task: Task, predicted: list[int]) -> torch.Tensor:
    """Outputs whose largest is the predicted label's; NaN among them where there is none."""
    outputs = torch.nn.functional.one_hot(torch.tensor(predicted).clamp(min=0), len(task.labels)).float()
    outputs[torch.tensor(predicted) == NO_LABEL, 0] = math.nan
    return outputs


@given(labelled())
@example((TASKS["CoLA"], [1] * 721 + [0] * 322, [1] * 1043))
@example((TASKS["CoLA"], [1] * 12, [1] * 12))
@example((TASKS["CoLA"], [1] * 4, [1, 1, 1, 0]))
@example((TASKS["MRPC"], [0, 0], [0, 0]))
@settings(max_examples=150, deadline=None)
def test_classification_equals_scikit_learn(given: tuple[Task, list[int], list[int]]) -> None:
    task, targets, predicted = given
    values = compute(task, outputs_for(task, predicted), torch.tensor(targets))
    assert tuple(values) == task.metrics
    for metric, value in values.items():
        assert value == pytest.approx(scikit_learn(metric, targets, predicted), abs=1e-12)


def test_classification_of_many_rows_equals_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    targets = generator.choice(2, 400_000, p=[0.63, 0.37])
    predicted = np.where(generator.random(400_000) < 0.9, targets, 1 - targets)
    for name in ("CoLA", "QQP"):
        values = compute(TASKS[name], outputs_for(TASKS[name], predicted.tolist()), torch.tensor(targets))
        for metric, value in values.items():
            assert value == pytest.approx(scikit_learn(metric, targets, predicted), rel=1e-12)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and targets in float32: few rows, ties, constants, huge offsets, tiny spreads."""
    rows = draw(st.integers(1, 12))

    def column() -> np.ndarray:
        ties = st.integers(0, 4).map(lambda n: n / 5)
        plain = st.floats(-5, 5, width=32)
        wide = st.floats(width=32, allow_nan=False, allow_infinity=False)
        values = draw(st.lists(draw(st.sampled_from([ties, plain, wide, st.just(0.7)])), min_size=rows, max_size=rows))
        offset, scale = draw(st.sampled_from([(0, 1), (3, 1e-6), (1e6, 1), (1, 1e-30)]))
        with np.errstate(over="ignore"):
            return np.nan_to_num((np.array(values) * scale + offset).astype(np.float32))

    return column(), column()


@given(scored())
@example((np.float32([1, 1 + 2**-23]), np.float32([0, 1])))
@example((np.float32([0.1, 0.1, 0.1]), np.float32([0.1, 0.2, 0.3])))
@example((np.float32([0.1]), np.float32([0.1])))
@settings(max_examples=150, deadline=None)
def test_regression_equals_scipy(given: tuple[np.ndarray, np.ndarray]) -> None:
    outputs, targets = given
    values = compute(TASKS["STS-B"], torch.tensor(outputs)[:, None], torch.tensor(targets))
    assert tuple(values) == TASKS["STS-B"].metrics
    for metric, value in values.items():
        assert value == pytest.approx(scipy(metric, outputs.astype(float), targets.astype(float)), abs=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers(value: float) -> None:
    outputs, targets = np.array([0.1, value, 0.3, 0.2]), np.array([0.1, 0.2, 0.3, 0.9])
    values = compute(TASKS["STS-B"], torch.tensor(outputs)[:, None], torch.tensor(targets))
    assert values == pytest.approx({name: scipy(name, outputs, targets) for name in values}, abs=1e-12)
    assert values["pearson"] == 0.0
    all_lost = compute(TASKS["STS-B"], torch.full((4, 1), math.nan), torch.tensor(targets))
    assert all_lost == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize("name", TASKS)
def test_no_rows_and_no_numbers_count_nothing(name: str) -> None:
    task = TASKS[name]
    nothing = dict.fromkeys(task.metrics, 0.0)
    no_targets = torch.zeros(0, dtype=torch.float32 if task.is_regression else torch.int64)
    assert compute(task, torch.zeros(0, task.num_outputs), no_targets) == nothing
    assert majority_value(task, no_targets) == 0.0
    assert math.isnan(mean_loss(torch.zeros(0)))
    targets = torch.zeros(3, dtype=no_targets.dtype)
    lost = torch.full((3, task.num_outputs), math.nan)
    assert compute(task, lost, targets) == nothing
    assert math.isnan(mean_loss(task_loss(lost, targets)))


@given(labelled())
@settings(max_examples=200, deadline=None)
def test_the_majoritys_value_is_that_of_its_constant_prediction(given: tuple[Task, list[int], list[int]]) -> None:
    task, targets, _ = given
    constant = [max(range(len(task.labels)), key=targets.count)] * len(targets)
    expected = scikit_learn(task.metrics[0], targets, constant)
    assert majority_value(task, torch.tensor(targets)) == pytest.approx(expected, abs=1e-12)
    assert majority_value(TASKS["STS-B"], torch.tensor(targets).float()) == 0.0


@given(labelled(), st.integers(0, 2**31 - 1))
@settings(max_examples=100, deadline=None)
def test_the_loss_equals_scikit_learns(given: tuple[Task, list[int], list[int]], seed: int) -> None:
    task, targets, _ = given
    outputs = torch.randn(len(targets), len(task.labels), generator=torch.Generator().manual_seed(seed))
    expected = log_loss(targets, outputs.double().softmax(-1), labels=range(len(task.labels)))
    assert mean_loss(task_loss(outputs, torch.tensor(targets))) == pytest.approx(expected, rel=1e-5)
    scores = torch.tensor(targets) / 5
    squared = mean_squared_error(scores, outputs[:, 0])
    assert mean_loss(task_loss(outputs[:, :1], scores)) == pytest.approx(squared, rel=1e-5)


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=50), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_mean_loss_does_not_depend_on_the_order(losses: list[float], random) -> None:
    first = mean_loss(torch.tensor(losses))
    random.shuffle(losses)
    assert mean_loss(torch.tensor(losses)) == first


@given(st.permutations(range(12)), st.sets(st.integers(1, 11), max_size=3))
@settings(max_examples=50, deadline=None)
def test_outputs_come_back_in_the_order_of_the_rows(order: list[int], cuts: set[int]) -> None:
    collector = SplitOutputs(2, regression=False)
    collector.start(torch.device("cpu"))
    for start, end in pairwise([0, *sorted(cuts), 12]):
        ids = torch.tensor(order[start:end])
        collector.update(ids, torch.stack([ids, -ids], 1), ids % 2)
    outputs, targets = collector.compute()
    assert outputs[:, 0].tolist() == list(range(12))
    assert targets.tolist() == [i % 2 for i in range(12)]


def test_a_repeated_example_is_an_error() -> None:
    collector = SplitOutputs(2, regression=False)
    collector.start(torch.device("cpu"))
    for _ in range(2):
        collector.update(torch.tensor([3]), torch.zeros(1, 2), torch.tensor([1]))
    with pytest.raises(RuntimeError, match="1 examples were evaluated more than once"):
        collector.compute()


@pytest.mark.parametrize("name", ["RTE", "MNLI", "STS-B"])
def test_one_row_keeps_its_dimensions(name: str) -> None:
    task = TASKS[name]
    collector = SplitOutputs(task.num_outputs, task.is_regression)
    collector.update(torch.tensor([0]), torch.zeros(1, task.num_outputs), torch.zeros(1, dtype=collector.target_type))
    outputs, targets = collector.compute()
    assert (outputs.shape, targets.shape) == ((1, task.num_outputs), (1,))
