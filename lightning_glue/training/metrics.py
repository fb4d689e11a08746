"""GLUE's metrics over the whole split, equal to the last digit for any number of DDP processes.

They are scikit-learn's and scipy's, also where there is little to count: one row, one class, constant predictions. What
these leave undefined is 0, as in GLUE's own scripts: a correlation of something constant, an F1 without true or
predicted examples of its class; and so is every metric of no rows. A row with a NaN among its outputs has no
prediction: it equals no label, and a correlation with it is undefined. So a metric is always a number, that of a model
whose weights are NaN is 0, and only its loss is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_glue.errors import ConfigError
from lightning_glue.tasks import Task
from lightning_glue.training.named_metrics import check_metric, named_value

NO_PREDICTION = -1  # in place of a label id


def predicted_labels(outputs: Tensor) -> Tensor:
    """Label ids (examples,) from outputs (examples, classes); :data:`NO_PREDICTION` where one of them is NaN."""
    return torch.where(outputs.isnan().any(-1), NO_PREDICTION, outputs.argmax(-1))


def confusion_matrix(predictions: np.ndarray, targets: np.ndarray, classes: int) -> np.ndarray:
    """Counts (true label, predicted label) in int64; the last column holds the rows without a prediction."""
    columns = np.where(predictions == NO_PREDICTION, classes, predictions)
    cells = np.bincount(targets * (classes + 1) + columns, minlength=classes * (classes + 1))
    return cells.reshape(classes, classes + 1)


def _accuracy(counts: np.ndarray) -> float:
    return int(np.trace(counts)) / int(counts.sum())


def _f1(counts: np.ndarray) -> float:
    """F1 of class "1" (id 1), as GLUE defines it."""
    true, predicted = int(counts[1].sum()), int(counts[:, 1].sum())
    return 2 * int(counts[1, 1]) / (true + predicted) if true + predicted else 0.0


def _f1_macro(counts: np.ndarray) -> float:
    """Mean of the F1 of every class, as scikit-learn has it with all labels given."""
    classes = counts.shape[0]
    right = np.diag(counts)
    both = counts.sum(1) + counts[:, :classes].sum(0)
    return math.fsum(2 * int(r) / int(b) if b else 0.0 for r, b in zip(right, both)) / classes


def _matthews(counts: np.ndarray) -> float:
    """Matthews correlation (Gorodkin's, for any number of classes), in integers up to the last division."""
    rows, right = int(counts.sum()), int(np.trace(counts))
    true, predicted = [int(n) for n in counts.sum(1)] + [0], [int(n) for n in counts.sum(0)]
    covariance = right * rows - sum(t * p for t, p in zip(true, predicted))
    spread = (rows**2 - sum(p * p for p in predicted)) * (rows**2 - sum(t * t for t in true))
    return covariance / math.sqrt(spread) if spread else 0.0


def _pearson(first: np.ndarray, second: np.ndarray) -> float:
    """scipy's ``pearsonr`` of two float64 arrays; 0 where it is undefined.

    Sums are NumPy's, which adds in one thread and so always in the same order.
    """
    if len(first) < 2 or any(
        (values == values[0]).all() or not np.isfinite(values).all() for values in (first, second)
    ):
        return 0.0
    x, y = (values - values.mean() for values in (first, second))
    x, y = (values / np.abs(values).max() for values in (x, y))  # no square of it is out of range
    value = min(1.0, max(-1.0, float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))))
    return float(round(value)) if len(x) == 2 else value  # two points lie on a line


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    """scipy's ``spearmanr``: Pearson's correlation of the ranks; 0 where it is undefined."""
    if np.isnan(first).any() or np.isnan(second).any():
        return 0.0
    return _pearson(_ranks(first), _ranks(second))


def label_counts(outputs: Tensor, targets: Tensor) -> np.ndarray:
    """Of each label (labels, 3): rows that rightly have it, that have it in truth, and that are predicted to.

    A label is predicted where its probability is above 0.5, and none where an output of the row is NaN.
    """
    predicted = (outputs > 0) & ~outputs.isnan().any(-1, keepdim=True)
    true = targets > 0.5
    return torch.stack([(predicted & true).sum(0), true.sum(0), predicted.sum(0)], 1).numpy()


def _f1_of_each(counts: np.ndarray) -> float:
    shares = [2 * int(right) / int(true + said) if true + said else 0.0 for right, true, said in counts]
    return math.fsum(shares) / len(shares)


def _f1_of_all(counts: np.ndarray) -> float:
    right, true, said = (int(number) for number in counts.sum(0))
    return 2 * right / (true + said) if true + said else 0.0


_OF_COUNTS: dict[str, Callable[[np.ndarray], float]] = {
    "accuracy": _accuracy, "f1": _f1, "f1_macro": _f1_macro, "matthews": _matthews,
}  # fmt: skip
_OF_LABELS: dict[str, Callable[[np.ndarray], float]] = {"f1_micro": _f1_of_all, "f1_macro": _f1_of_each}
_OF_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"pearson": _pearson, "spearman": _spearman}


def compute(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """The task's metrics from outputs (examples, classes) and targets (examples,) or (examples, labels), by name."""
    if not len(targets):
        return dict.fromkeys(task.metrics, 0.0)
    own = _own_functions(task, outputs, targets)
    return {name: own[name]() if name in own else named_value(task, name, outputs, targets) for name in task.metrics}


def _own_functions(task: Task, outputs: Tensor, targets: Tensor) -> dict[str, Callable[[], float]]:
    """The metrics that are counted here, not by torchmetrics, by name."""
    if task.is_regression:
        scores = outputs.squeeze(-1).double().numpy(), targets.double().numpy()
        return {name: partial(function, *scores) for name, function in _OF_SCORES.items()}
    if task.multilabel:
        found = label_counts(outputs, targets)
        return {name: partial(function, found) for name, function in _OF_LABELS.items()}
    counts = confusion_matrix(predicted_labels(outputs).numpy(), targets.numpy(), task.num_outputs)
    return {name: partial(function, counts) for name, function in _OF_COUNTS.items()}


def check_metrics(task: Task) -> None:
    """Raise ConfigError where a task's metric is unknown, cannot be computed for it, or cannot select a checkpoint."""
    table = _OF_SCORES if task.is_regression else _OF_LABELS if task.multilabel else _OF_COUNTS
    for name in task.metrics:
        if name == "f1" and name in table and len(task.labels) != 2:
            raise ConfigError(f"metrics: f1 is of two classes, {task.name} has {len(task.labels)}; say f1_macro")
        if name not in table:
            check_metric(task, name, selects=name == task.metrics[0])


def mean_loss(losses: Tensor) -> float:
    """Mean of per-example losses (examples,), correctly rounded: no order of adding them matters. NaN for none."""
    values = losses.double().tolist()
    if not all(map(math.isfinite, values)):
        return float(losses.double().mean())
    return math.fsum(values) / len(values) if values else math.nan


def majority_values(task: Task, targets: Tensor) -> dict[str, float]:
    """The task's metrics of predicting the most frequent class for every example; of a regression the mean."""
    if task.is_regression:
        mean = targets.double().mean() if len(targets) else torch.zeros(())
        return compute(task, mean.expand(len(targets), 1), targets)
    constant = torch.full((len(targets), task.num_outputs), -1.0 if task.multilabel else 0.0)
    counts = targets.sum(0) if task.multilabel else targets.bincount(minlength=1)
    constant[:, counts.argmax()] = 1.0
    return compute(task, constant, targets)


def majority_value(task: Task, targets: Tensor) -> float:
    """The selection metric of :func:`majority_values`."""
    return majority_values(task, targets)[task.metrics[0]]


class SplitOutputs:
    """Collects a split's outputs from all processes and hands them back once each, in the order of the rows."""

    def __init__(self, num_outputs: int, regression: bool, multilabel: bool = False) -> None:
        self.num_outputs = num_outputs
        self.target_type = torch.float32 if regression or multilabel else torch.int64
        self.target_shape = (0, num_outputs) if multilabel else (0,)
        self.start(torch.device("cpu"))

    def start(self, device: torch.device) -> None:
        """Forget the last epoch. A first, empty piece lets a process without batches take part in the gathering."""
        self.rows = [torch.empty(0, dtype=torch.int64, device=device)]
        self.outputs = [torch.empty(0, self.num_outputs, device=device)]
        self.targets = [torch.empty(self.target_shape, dtype=self.target_type, device=device)]

    def update(self, rows: Tensor, outputs: Tensor, targets: Tensor) -> None:
        self.rows.append(rows)
        self.outputs.append(outputs.float())
        self.targets.append(targets)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Outputs (examples, classes) and targets, sorted by row, on the CPU; called by all processes."""
        rows, outputs, targets = (_gathered(torch.cat(pieces)) for pieces in (self.rows, self.outputs, self.targets))
        repeated = len(rows) - len(torch.unique(rows))
        if repeated:
            raise RuntimeError(f"{repeated} examples were evaluated more than once")
        order = torch.argsort(rows)
        return outputs[order], targets[order]


def _gathered(values: Tensor) -> Tensor:
    """The values of all processes, one process after the other, on the CPU."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.cat(gather_all_tensors(values)).cpu() if several else values.cpu()
