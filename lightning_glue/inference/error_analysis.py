"""Where a model errs: what it says of each row of a split, the worst rows, and slices with their metric."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lightning_glue.inference import calibration
from lightning_glue.tasks import Task

WORST = 50
_WORDS = re.compile(r"\w+")
_NEGATION = re.compile(
    r"n['\u2019]t\b|\b(?:no|not|never|none|nobody|nothing|neither|nor|nowhere|cannot|without)\b", re.I
)
_OVERLAPS = (0.0, 0.25, 0.5, 0.75)
_SHOWN = 2000  # characters of a text in what is shown


@dataclass(frozen=True)
class Rows:
    """What a model says of the rows of a split.

    Attributes:
        lines: (rows,) where each stands in its file, from 1; of a Parquet file the row.
        texts: one or two columns.
        lengths: (rows,) tokens.
        outputs: (rows, classes) head outputs, finite.
        targets: (rows,) classes or label / scale; with several labels a row (rows, classes).
        loss: (rows,)
    """

    task: Task
    lines: Sequence[int]
    texts: Sequence[Sequence[str]]
    lengths: np.ndarray
    outputs: np.ndarray
    targets: np.ndarray
    loss: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """(rows, classes); (rows, 0) for regression."""
        if self.task.is_regression:
            return np.empty((len(self.loss), 0))
        return calibration.probabilities(self.outputs, several=self.task.multilabel)

    @property
    def right(self) -> np.ndarray:
        """(rows,) 1 where the prediction is right, else 0; the absolute error of a regression."""
        if self.task.is_regression:
            return np.abs(self.outputs[:, 0] - self.targets) * self.task.label_scale
        if self.task.multilabel:
            return ((self.probabilities > 0.5) == (self.targets > 0.5)).all(-1).astype(float)
        return (self.outputs.argmax(-1) == self.targets).astype(float)


def said(task: Task, values: np.ndarray) -> list[Any]:
    """Labels by name (several: lists of them), or scores on the task's scale, of targets or predictions."""
    if task.is_regression:
        return (values.astype(np.float64) * task.label_scale + task.label_offset).tolist()
    if task.multilabel:
        return [[task.labels[i] for i in np.flatnonzero(row)] for row in values]
    return [task.labels[i] for i in values]


def table(rows: Rows) -> dict[str, list[Any]]:
    """A column each: line, texts, label, predicted, the probability of each class, loss."""
    task, shares = rows.task, rows.probabilities
    predicted = rows.outputs[:, 0] if task.is_regression else shares > 0.5 if task.multilabel else shares.argmax(-1)
    columns: dict[str, list[Any]] = {"line": list(rows.lines)}
    columns |= {name: list(column) for name, column in zip(("text", "text_pair"), rows.texts)}
    columns |= {"label": said(task, rows.targets), "predicted": said(task, predicted)}
    columns |= {f"probability_{label}": shares[:, i].tolist() for i, label in enumerate(task.labels)}
    return columns | {"loss": rows.loss.astype(np.float64).tolist()}


def worst(rows: Rows, columns: dict[str, list[Any]], count: int) -> list[list[Any]]:
    """The rows of :func:`table` with the greatest loss, the worst first, their texts cut to 2000 characters."""
    order = np.argsort(-rows.loss, kind="stable")[:count]
    return [[value[:_SHOWN] if isinstance(value := column[i], str) else value for column in columns.values()]
            for i in order]  # fmt: skip


def confident_and_wrong(rows: Rows, columns: dict[str, list[Any]], count: int) -> list[list[Any]]:
    """The rows that are wrong with the greatest probability, as :func:`worst`; none of a regression."""
    if rows.task.is_regression or rows.task.multilabel:
        return []
    sure = np.where(rows.right > 0, -1.0, rows.probabilities.max(-1))
    order = [int(i) for i in np.argsort(-sure, kind="stable")[:count] if sure[i] >= 0.5]
    return [[value[:_SHOWN] if isinstance(value := column[i], str) else value for column in columns.values()]
            for i in order]  # fmt: skip


def slices(rows: Rows, metric: Callable[[np.ndarray, np.ndarray], float]) -> list[dict[str, Any]]:
    """Parts of the split with their rows, share of right ones (mean absolute error of a regression), metric, loss.

    Args:
        metric: of outputs and targets.
    """
    masks = {"all": np.ones(len(rows.loss), dtype=bool)} | _by_length(rows) | _by_overlap(rows)
    masks |= _by_negation(rows) | _by_class(rows)
    return [
        {
            "slice": name,
            "rows": int(mask.sum()),
            "right": float(rows.right[mask].mean()),
            "metric": float(metric(rows.outputs[mask], rows.targets[mask])),
            "loss": float(rows.loss[mask].mean()),
        }
        for name, mask in masks.items()
        if mask.any()
    ]


def _by_length(rows: Rows) -> dict[str, np.ndarray]:
    """Quartiles of the number of tokens."""
    edges = [0, *np.quantile(rows.lengths, (0.25, 0.5, 0.75)).astype(int).tolist(), int(rows.lengths.max())]
    return {
        f"tokens {low + 1} to {high}": (rows.lengths > low) & (rows.lengths <= high)
        for low, high in pairwise(edges)
        if high > low
    }


def overlap(first: str, second: str) -> float:
    """Jaccard's index of the words of two texts, in small letters; 0 of two without words."""
    one, other = (set(_WORDS.findall(text.casefold())) for text in (first, second))
    return len(one & other) / len(one | other) if one | other else 0.0


def _by_overlap(rows: Rows) -> dict[str, np.ndarray]:
    if len(rows.texts) < 2:
        return {}
    found = np.array([overlap(*pair) for pair in zip(*rows.texts)])
    return {
        f"words in common {low:.0%} to {low + 0.25:.0%}": (found >= low) & ((found < low + 0.25) | (low == 0.75))
        for low in _OVERLAPS
    }


def has_negation(text: str) -> bool:
    """Whether an English text has a negating word."""
    return bool(_NEGATION.search(text))


def _by_negation(rows: Rows) -> dict[str, np.ndarray]:
    found = np.array([any(map(has_negation, pair)) for pair in zip(*rows.texts)])
    return {"negation": found, "no negation": ~found}


def _by_class(rows: Rows) -> dict[str, np.ndarray]:
    task = rows.task
    if task.is_regression:
        scores = rows.targets * task.label_scale + task.label_offset
        edges = np.linspace(0, task.label_scale, 6) + task.label_offset
        return {f"score {low:g} to {high:g}": (scores >= low) & ((scores < high) | (high == edges[-1]))
                for low, high in pairwise(edges)}  # fmt: skip
    if task.multilabel:
        return {f"label {label}": rows.targets[:, i] > 0.5 for i, label in enumerate(task.labels)}
    return {f"class {label}": rows.targets == i for i, label in enumerate(task.labels)}


def analyse(rows: Rows, metric: Callable[[np.ndarray, np.ndarray], float], temperature: float | None) -> dict[str, Any]:
    """Everything that a page shows of a split, as plain values.

    Args:
        temperature: fitted on the dev split that selects; None for a regression.
    """
    columns = table(rows)
    found: dict[str, Any] = {
        "columns": list(columns),
        "slices": slices(rows, metric),
        "worst": worst(rows, columns, WORST),
        "confident": confident_and_wrong(rows, columns, WORST),
    }
    if temperature is None:
        return found
    several = rows.task.multilabel
    for name, value in (("calibration", 1.0), ("calibrated", temperature)):
        shares = calibration.probabilities(rows.outputs, several=several, temperature=value)
        bins = calibration.reliability(*calibration.confidence(shares, rows.targets, several=several))
        found[name] = {"ece": calibration.expected_error(bins), "bins": [asdict(one) for one in bins]}
    return found
