"""Figures of a run: confusion matrix, precision-recall curve, regression scatter, learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_glue.tasks import Task
from lightning_glue.tracking.logger import History
from lightning_glue.training import metrics
from lightning_glue.training.module import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_FEW = 12  # labels, up to which a matrix has its counts written into it
_UPRIGHT = 6  # labels, up to which their names fit beside one another
_MANY = 40  # labels, above which the rare ones are put together
_CURVES = 10
_LONGEST = 30  # characters of a label
_SHORT = 15  # characters of a label that has room in usual margins


def _new(title: str, *, fits: bool = True) -> Figure:
    """An empty figure.

    Args:
        fits: whether what is beside the axes has room in usual margins; to look for others takes as long as to draw.
    """
    from matplotlib.figure import Figure  # no pyplot: it keeps every figure alive and wants a backend

    figure = Figure(figsize=(5.5, 4.5), layout=None if fits else "constrained", dpi=120)
    if fits:
        figure.subplots_adjust(left=0.14, right=0.96, bottom=0.12, top=0.91, hspace=0.08)
    figure.suptitle(title)
    return figure


def _shown(label: str) -> str:
    """A label as matplotlib is to write it: no formula, no hidden entry of a legend, and not endless."""
    text = label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"
    return text.replace("$", "\\$") if not text.startswith("_") else "\u200b" + text.replace("$", "\\$")


def confusion_matrix(task: Task, split: str, evaluation: Evaluation) -> Figure:
    """Counts of true against predicted labels, coloured by the share of the true label; NaN is no prediction.

    Of very many labels the most frequent are shown, and the others together.
    """
    classes = len(task.labels)
    predictions = metrics.predicted_labels(evaluation.outputs).numpy()
    counts = metrics.confusion_matrix(predictions, evaluation.targets.numpy(), classes)
    lost = int(counts[:, classes].sum())
    counts, labels = _most_frequent(counts[:, :classes], task.labels)
    title = f"{task.name} {split}: confusion matrix" + (f" without {lost} rows of NaN" if lost else "")
    figure = _new(title, fits=len(labels) <= _UPRIGHT and max(map(len, labels)) <= _SHORT)
    if len(labels) > _FEW:
        figure.set_size_inches(12, 10)
    axes = figure.subplots()
    share = counts / counts.sum(1, keepdims=True).clip(min=1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true label")
    if len(labels) <= _FEW:
        for row, column in np.ndindex(counts.shape):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=colour)
    many = len(labels) > _UPRIGHT
    names = [_shown(label) for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=90 if many else 0, fontsize="x-small" if many else "medium")
    axes.set_yticks(
        range(len(labels)), names, rotation=0 if many else 90, va="center", fontsize="x-small" if many else "medium"
    )
    axes.set(xlabel="predicted label", ylabel="true label")
    return figure


def _most_frequent(counts: np.ndarray, labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """At most ``_MANY`` rows and columns: those of the most frequent true labels in the task's order, then the rest."""
    if len(labels) <= _MANY:
        return counts, list(labels)
    kept = np.sort(np.argsort(-counts.sum(1), kind="stable")[: _MANY - 1])
    places = np.full(len(labels), _MANY - 1)
    places[kept] = np.arange(_MANY - 1)
    small = np.zeros((_MANY, _MANY), dtype=np.int64)
    np.add.at(small, (places[:, None], places[None]), counts)
    return small, [*(labels[i] for i in kept), f"{len(labels) - len(kept)} others"]


def _precision_recall(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall at every threshold, the highest first, behind the point (1, 0); some row is positive."""
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of the rows with the same score
    return np.append(1.0, found[last] / (last + 1)), np.append(0.0, found[last] / found[-1])


def precision_recall(task: Task, split: str, evaluation: Evaluation) -> Figure | None:
    """A precision-recall curve per label, that label against the others; class "1" alone for 0/1 tasks.

    A label that no row has has no curve, and of very many labels the most frequent have one. None where no curve is
    left, or where an output is NaN.
    """
    outputs, targets = evaluation.outputs.double(), evaluation.targets.numpy()
    probabilities = (outputs.sigmoid() if task.multilabel else outputs.softmax(-1)).numpy()
    true = targets > 0.5 if task.multilabel else targets[:, None] == np.arange(len(task.labels))
    shown = [1] if task.labels == ("0", "1") else range(len(task.labels))
    shown = [label for label in shown if true[:, label].any()]
    shown = sorted(sorted(shown, key=lambda label: -int(true[:, label].sum()))[:_CURVES])
    if not shown or np.isnan(probabilities).any():
        return None
    figure = _new(f"{task.name} {split}: precision-recall curve")
    axes = figure.subplots()
    for label in shown:
        precision, recall = _precision_recall(probabilities[:, label], true[:, label])
        average = float(np.sum(np.diff(recall) * precision[1:]))
        name = f"{_shown(task.labels[label])} (AP {average:.3f})"
        (line,) = axes.step(recall, precision, where="pre", label=name)
        axes.axhline(float(true[:, label].mean()), color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(title="label (dotted: its share)", loc="lower left")
    return figure


def regression_scatter(task: Task, split: str, evaluation: Evaluation) -> Figure:
    """Predicted against true scores on the task's own scale."""
    true, predicted = (
        part.flatten().double().numpy() * task.label_scale + task.label_offset
        for part in (evaluation.targets, evaluation.outputs)
    )
    ends = [task.label_offset, task.label_offset + task.label_scale]
    figure = _new(f"{task.name} {split}: predicted and true scores", fits=max(map(abs, ends)) < 1000)
    axes = figure.subplots()
    axes.plot(ends, ends, color="grey", linewidth=1)
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
    figures = {} if task.multilabel else {f"{split}_confusion_matrix.png": confusion_matrix(task, split, evaluation)}
    curve = precision_recall(task, split, evaluation)
    return figures if curve is None else {**figures, f"{split}_precision_recall.png": curve}
