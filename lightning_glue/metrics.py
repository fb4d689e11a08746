"""GLUE's metrics over the whole split, equal to the last digit for any number of DDP processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import (
    accuracy,
    f1_score,
    matthews_corrcoef,
    pearson_corrcoef,
    spearman_corrcoef,
)

from lightning_glue.tasks import Task

# Predictions are label ids, or scores in float64 for regression. F1 is that of class "1" (id 1), as GLUE defines it.
_FUNCTIONS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "accuracy": lambda p, t, k: accuracy(p, t, "multiclass", num_classes=k, average="micro"),
    "f1": lambda p, t, _: f1_score(p, t, "binary"),
    "matthews": lambda p, t, k: matthews_corrcoef(p, t, "multiclass", num_classes=k),
    "pearson": lambda p, t, _: pearson_corrcoef(p, t),
    "spearman": lambda p, t, _: spearman_corrcoef(p, t),
}


def compute(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """The task's metrics from outputs (examples, classes) and targets (examples,), by metric name."""
    if task.is_regression:
        predictions, targets = outputs.squeeze(-1).double(), targets.double()
    else:
        predictions = outputs.argmax(-1)
    values = {name: float(_FUNCTIONS[name](predictions, targets, task.num_outputs)) for name in task.metrics}
    # A constant prediction has no correlation; GLUE's scripts count it as 0, and a NaN would win no comparison.
    return {name: 0.0 if value != value else value for name, value in values.items()}


def majority_value(task: Task, targets: Tensor) -> float:
    """The selection metric of predicting the most frequent class for every example; 0 for a correlation."""
    name = task.metrics[0]
    if task.is_regression:
        return 0.0
    constant = torch.zeros(len(targets), task.num_outputs)
    constant[:, targets.mode().values] = 1.0
    return compute(task, constant, targets)[name]


class SplitOutputs(Metric):
    """Collects a split's outputs from all processes and hands them back once each, in the order of the rows."""

    full_state_update = False
    ids: list[Tensor]
    outputs: list[Tensor]
    targets: list[Tensor]

    def __init__(self, num_outputs: int, regression: bool) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.target_type = torch.float32 if regression else torch.int64
        for state in ("ids", "outputs", "targets"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def start(self) -> None:
        """Forget the last epoch. A first, empty piece lets a process without batches take part in the gathering."""
        self.reset()
        self.update(
            torch.empty(0, dtype=torch.int64, device=self.device),
            torch.empty(0, self.num_outputs, device=self.device),
            torch.empty(0, dtype=self.target_type, device=self.device),
        )

    def update(self, ids: Tensor, outputs: Tensor, targets: Tensor) -> None:
        self.ids.append(ids)
        self.outputs.append(outputs.float())
        self.targets.append(targets)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Outputs (examples, classes) and targets (examples,), sorted by row, on the CPU."""
        ids, outputs, targets = (
            torch.cat(state).cpu() if isinstance(state, list) else state.cpu()
            for state in (self.ids, self.outputs, self.targets)
        )
        order = torch.argsort(ids)
        if len(torch.unique(ids)) != len(ids):
            raise RuntimeError(f"{len(ids) - len(torch.unique(ids))} examples were evaluated more than once")
        return outputs[order], targets[order] if len(targets) else targets
