"""Figures of a run: confusion matrix, precision-recall curve, regression scatter, learning curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_glue.tasks import Task
from lightning_glue.tracking.logger import History
from lightning_glue.training import metrics
from lightning_glue.training.module import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _new(title: str) -> Figure:
    from matplotlib.figure import Figure  # no pyplot: it keeps every figure alive and wants a backend

    figure = Figure(figsize=(5.5, 4.5), layout="constrained", dpi=120)
    figure.suptitle(title)
    return figure


def confusion_matrix(task: Task, split: str, evaluation: Evaluation) -> Figure:
    """Counts of true against predicted labels, coloured by the share of the true label; NaN is no prediction."""
    classes = len(task.labels)
    predictions = metrics.predicted_labels(evaluation.outputs).numpy()
    counts = metrics.confusion_matrix(predictions, evaluation.targets.numpy(), classes)
    lost = int(counts[:, classes].sum())
    figure = _new(f"{task.name} {split}: confusion matrix" + (f" without {lost} rows of NaN" if lost else ""))
    axes = figure.subplots()
    share = counts / counts.sum(1, keepdims=True).clip(min=1)
    image = axes.imshow(share[:, :classes], cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true label")
    for row in range(classes):
        for column in range(classes):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour)
    axes.set_xticks(range(classes), task.labels)
    axes.set_yticks(range(classes), task.labels, rotation=90, va="center")
    axes.set(xlabel="predicted label", ylabel="true label")
    return figure


def _precision_recall(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall at every threshold, the highest first, behind the point (1, 0); some row is positive."""
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of the rows with the same score
    return np.append(1.0, found[last] / (last + 1)), np.append(0.0, found[last] / found[-1])


def precision_recall(task: Task, split: str, evaluation: Evaluation) -> Figure | None:
    """A precision-recall curve per label, that label against the others; class "1" alone for 0/1 tasks.

    A label that no row has has no curve. None where no curve is left, or where an output is NaN.
    """
    probabilities, targets = evaluation.outputs.double().softmax(-1).numpy(), evaluation.targets.numpy()
    shown = [1] if task.labels == ("0", "1") else range(len(task.labels))
    shown = [label for label in shown if (targets == label).any()]
    if not shown or np.isnan(probabilities).any():
        return None
    figure = _new(f"{task.name} {split}: precision-recall curve")
    axes = figure.subplots()
    for label in shown:
        precision, recall = _precision_recall(probabilities[:, label], targets == label)
        average = float(np.sum(np.diff(recall) * precision[1:]))
        name = f"{task.labels[label]} (AP {average:.3f})"
        (line,) = axes.step(recall, precision, where="pre", label=name)
        axes.axhline(float((targets == label).mean()), color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(title="label (dotted: its share)", loc="lower left")
    return figure


def regression_scatter(task: Task, split: str, evaluation: Evaluation) -> Figure:
    """Predicted against true scores on the task's own scale."""
    figure = _new(f"{task.name} {split}: predicted and true scores")
    axes = figure.subplots()
    true, predicted = (
        part.flatten().double().numpy() * task.label_scale for part in (evaluation.targets, evaluation.outputs)
    )
    axes.plot([0, task.label_scale], [0, task.label_scale], color="grey", linewidth=1)
    axes.scatter(true, predicted, s=8, alpha=0.4)
    axes.set(xlabel="true score", ylabel="predicted score")
    return figure


def learning_curves(task: Task, history: History) -> Figure:
    """Training loss and dev metrics over optimizer steps."""
    figure = _new(f"{task.name}: learning curves")
    loss_axes, dev_axes = figure.subplots(2, 1, sharex=True)
    for name in ("train/loss", *(f"{split.name}/loss" for split in task.dev)):
        if history.get(name):
            loss_axes.plot(*zip(*history[name]), label=name)
    for split in task.dev:
        for metric in task.metrics:
            if history.get(f"{split.name}/{metric}"):
                dev_axes.plot(*zip(*history[f"{split.name}/{metric}"]), marker="o", label=f"{split.name}/{metric}")
    loss_axes.set(ylabel="loss")
    dev_axes.set(xlabel="optimizer step", ylabel="dev metric")
    for axes in (loss_axes, dev_axes):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    return figure


def evaluation_figures(task: Task, split: str, evaluation: Evaluation) -> dict[str, Figure]:
    """Every figure of one evaluated split that there is something to draw for, by file name."""
    if task.is_regression:
        return {f"{split}_scatter.png": regression_scatter(task, split, evaluation)}
    figures = {f"{split}_confusion_matrix.png": confusion_matrix(task, split, evaluation)}
    curve = precision_recall(task, split, evaluation)
    return figures if curve is None else {**figures, f"{split}_precision_recall.png": curve}
