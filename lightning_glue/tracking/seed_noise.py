"""Whether a published score lies within what the seeds alone scatter, by bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

METHOD = (
    "Seed noise: 95 % percentile interval of the median, from 10 000 bootstrap samples of the seeds' scores; of up to "
    "five seeds that is their range. Within: the published number, rounded as it is, lies in it."
)
_SAMPLES, _SHARE = 10_000, 0.95
_ROUNDED = 0.0005  # half of the last digit that is published, 0.1 %
_SLACK = 1e-9  # of binary fractions


def median_interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """Ends of the interval that holds 95 % of the medians of samples, drawn with replacement, of the scores.

    The samples are the same in every call. None for fewer than two scores, which say nothing of their scatter.
    """
    import numpy as np

    if len(scores) < 2:
        return None
    drawn = np.random.default_rng(0).integers(0, len(scores), (_SAMPLES, len(scores)))
    medians = np.median(np.asarray(sorted(scores))[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - _SHARE) / 2, (1 + _SHARE) / 2])
    return float(low), float(high)


def verdict(scores: Sequence[float], published: float) -> str:
    """Whether the scores' median is above, below or within seed noise of a published one, in words."""
    interval = median_interval(scores)
    if interval is None:
        return "cannot tell from one seed"
    low, high = interval
    where = "within"
    if low > published + _ROUNDED + _SLACK:
        where = "above"
    elif high < published - _ROUNDED - _SLACK:
        where = "below"
    return f"{where} ({low:.4f} to {high:.4f})"
