"""Losses of tasks of one's own against torch's modules, whose weights mean the same."""

from __future__ import annotations

import pytest
import torch

from lightning_glue.model.roberta import task_loss
from lightning_glue.tasks import TASKS, Split, Task
from lightning_glue.training.loss import example_losses


def task(labels: int, weights: tuple[float, ...] = (), *, multilabel: bool = False) -> Task:
    names = tuple(f"label {i}" for i in range(labels))
    return Task("own", names, (), None, (Split("dev"),), (), multilabel=multilabel, class_weights=weights)


@pytest.mark.parametrize("name", ["RTE", "MNLI", "STS-B"])
def test_without_weights_nothing_changes(name: str) -> None:
    outputs = torch.randn(9, TASKS[name].num_outputs)
    targets = torch.rand(9) if name == "STS-B" else torch.arange(9) % TASKS[name].num_outputs
    assert torch.equal(example_losses(TASKS[name], outputs, targets, weighted=True), task_loss(outputs, targets))


def test_weights_of_classes_are_torchs() -> None:
    outputs, targets, weights = torch.randn(30, 3), torch.arange(30) % 3, (0.5, 2.0, 0.0)
    ours = example_losses(task(3, weights), outputs, targets, weighted=True)
    assert torch.allclose(ours, torch.nn.CrossEntropyLoss(torch.tensor(weights), reduction="none")(outputs, targets))
    mean = torch.nn.CrossEntropyLoss(torch.tensor(weights))(outputs, targets)  # torch's is by the sum of the weights
    assert ours.sum() / torch.tensor(weights)[targets].sum() == pytest.approx(float(mean))
    unweighted = example_losses(task(3, weights), outputs, targets, weighted=False)
    assert torch.equal(unweighted, task_loss(outputs, targets))


@pytest.mark.parametrize("labels", [1, 4])
def test_any_number_of_labels_is_torchs_binary_cross_entropy(labels: int) -> None:
    outputs, targets = torch.randn(20, labels), torch.randint(0, 2, (20, labels)).float()
    ours = example_losses(task(labels, multilabel=True), outputs, targets, weighted=True)
    assert ours.shape == (20,)
    assert torch.allclose(ours.mean(), torch.nn.BCEWithLogitsLoss()(outputs, targets))
    weights = tuple(float(i + 2) for i in range(labels))
    ours = example_losses(task(labels, weights, multilabel=True), outputs, targets, weighted=True)
    assert torch.allclose(ours.mean(), torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))(outputs, targets))
