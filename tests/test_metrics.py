from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lightning_glue.metrics import SplitOutputs, compute
from lightning_glue.tasks import TASKS

seeds = st.integers(0, 2**31 - 1)


@given(seeds, st.sampled_from(["CoLA", "MRPC", "MNLI", "RTE"]))
@settings(max_examples=60, deadline=None)
def test_classification_equals_scikit_learn(seed: int, name: str) -> None:
    task = TASKS[name]
    generator = np.random.default_rng(seed)
    outputs = torch.tensor(generator.normal(size=(50, len(task.labels))), dtype=torch.float32)
    targets = generator.choice(len(task.labels), 50, p=[0.7, 0.3] if len(task.labels) == 2 else [0.5, 0.3, 0.2])
    predicted = outputs.argmax(-1).numpy()
    expected = {
        "accuracy": accuracy_score,
        "f1": partial(f1_score, pos_label=1),  # class "1", whatever its frequency
        "matthews": matthews_corrcoef,
    }
    values = compute(task, outputs, torch.tensor(targets))
    assert tuple(values) == task.metrics
    for metric, value in values.items():
        assert value == pytest.approx(expected[metric](targets, predicted), abs=1e-6)


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_regression_equals_scipy(seed: int) -> None:
    generator = np.random.default_rng(seed)
    targets = np.round(generator.uniform(0, 1, 60), 1)  # ties, as in STS-B
    outputs = targets + generator.normal(0, 0.3, 60)
    values = compute(TASKS["STS-B"], torch.tensor(outputs)[:, None], torch.tensor(targets))
    assert values["pearson"] == pytest.approx(pearsonr(outputs, targets)[0], abs=1e-9)
    assert values["spearman"] == pytest.approx(spearmanr(outputs, targets)[0], abs=1e-6)  # torchmetrics adds an eps


def test_a_constant_prediction_scores_zero() -> None:
    targets = torch.tensor([0, 1, 1, 0])
    assert compute(TASKS["CoLA"], torch.tensor([[1.0, 0.0]] * 4), targets) == {"matthews": 0.0}
    constant = compute(TASKS["STS-B"], torch.ones(4, 1), torch.tensor([0.1, 0.2, 0.3, 0.9]))
    assert constant == {"pearson": 0.0, "spearman": 0.0}


@given(st.permutations(range(12)), st.sets(st.integers(1, 11), max_size=3))
@settings(max_examples=50, deadline=None)
def test_outputs_come_back_in_the_order_of_the_rows(order: list[int], cuts: set[int]) -> None:
    collector = SplitOutputs(2, regression=False)
    collector.start()
    for start, end in pairwise([0, *sorted(cuts), 12]):
        ids = torch.tensor(order[start:end])
        collector.update(ids, torch.stack([ids, -ids], 1), ids % 2)
    outputs, targets = collector.compute()
    assert outputs[:, 0].tolist() == list(range(12))
    assert targets.tolist() == [i % 2 for i in range(12)]


def test_a_repeated_example_is_an_error() -> None:
    collector = SplitOutputs(2, regression=False)
    collector.start()
    for _ in range(2):
        collector.update(torch.tensor([3]), torch.zeros(1, 2), torch.tensor([1]))
    with pytest.raises(RuntimeError, match="1 examples were evaluated more than once"):
        collector.compute()
