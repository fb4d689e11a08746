"""How far probabilities say how often a model is right (Guo et al. 2017), and the temperature that mends them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BINS = 15
_LEAST, _MOST = 0.05, 20.0  # temperatures; beyond them a dev set says nothing
_HALVINGS = 50


@dataclass(frozen=True)
class Bin:
    """Attributes: confidence, right: means over the rows of the bin; 0 where it has none."""

    rows: int
    confidence: float
    right: float


def probabilities(outputs: np.ndarray, *, several: bool, temperature: float = 1.0) -> np.ndarray:
    """Of head outputs (rows, classes): softmax, or with ``several`` labels a row the sigmoid of each."""
    z = outputs.astype(np.float64) / temperature
    if several:
        return 1 / (1 + np.exp(-z))
    shares = np.exp(z - z.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def fit_temperature(outputs: np.ndarray, targets: np.ndarray, *, several: bool) -> float:
    """The temperature with the least mean negative log likelihood, from 0.05 to 20.

    The loss is convex in its inverse, so that halving finds where the slope changes its sign.

    Args:
        outputs: (rows, classes) logits, finite.
        targets: (rows,) classes, or with ``several`` labels a row (rows, classes) of 0 and 1.
    """
    z = outputs.astype(np.float64)
    true = targets.astype(np.float64) if several else np.eye(z.shape[1])[targets]
    low, high = 1 / _MOST, 1 / _LEAST
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        slope = float(((probabilities(z, several=several, temperature=1 / middle) - true) * z).sum())
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / (low * high) ** 0.5


def at_bound(temperature: float) -> bool:
    """Whether a fitted temperature is one of the two that end the search."""
    return not _LEAST * 1.001 < temperature < _MOST / 1.001


def confidence(shares: np.ndarray, targets: np.ndarray, *, several: bool) -> tuple[np.ndarray, np.ndarray]:
    """The probability of what is predicted, and whether it is right; with ``several`` labels, of each label."""
    if several:
        said = shares >= 0.5
        return np.where(said, shares, 1 - shares).ravel(), (said == targets.astype(bool)).ravel()
    return shares.max(-1), shares.argmax(-1) == targets


def reliability(sure: np.ndarray, right: np.ndarray) -> list[Bin]:
    """Fifteen bins of equal width from 0 to 1."""
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    found = []
    for i in range(BINS):
        inside = place == i
        rows = int(inside.sum())
        found.append(Bin(rows, float(sure[inside].mean()), float(right[inside].mean())) if rows else Bin(0, 0.0, 0.0))
    return found


def expected_error(bins: list[Bin]) -> float:
    """The expected calibration error: the mean distance of confidence and share of right ones, weighted by rows."""
    rows = sum(one.rows for one in bins)
    return sum(one.rows * abs(one.confidence - one.right) for one in bins) / rows if rows else 0.0
