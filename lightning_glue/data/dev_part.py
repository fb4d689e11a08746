"""Which rows of a training file are its dev set, where there is no file for it: stratified, by digest of the texts."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

_BINS = 10  # of a regression's labels, equally full


def dev_rows(
    texts: Sequence[Sequence[str]], labels: Sequence[str] | Sequence[tuple[str, ...]], share: float, seed: int
) -> list[bool]:
    """:func:`chosen_rows` of texts.

    Args:
        texts: one or two lists with a text for each row.
    """
    return chosen_rows([row_digest(seed, row) for row in zip(*texts)], labels, share)


def row_digest(seed: int, texts: Sequence[str]) -> bytes:
    """By which rows are chosen: SHA-256 of the seed and the texts."""
    return hashlib.sha256("\0".join([str(seed), *texts]).encode("utf-8", "surrogatepass")).digest()


def chosen_rows(
    digests: Sequence[bytes], labels: Sequence[str] | Sequence[tuple[str, ...]], share: float
) -> list[bool]:
    """For each row whether it is of the dev set.

    Of each stratum (class; tenth of a regression's labels; the rarest of several labels) the rows with the smallest
    digests of seed and texts, so many that the shares of the strata are as equal as whole rows let them be. So neither
    the order of the rows nor the machine matters, and rows of a stratum with the same texts stay together. At least one
    row is of the dev set, and of each stratum at least one is not, unless none has two different texts.

    Args:
        digests: of each row, see :func:`row_digest`.
        labels: of each row; strings of numbers stand for numbers only in a list made by :func:`bins`.
    """
    strata: dict[object, list[int]] = defaultdict(list)
    for row, stratum in enumerate(_strata(labels)):
        strata[stratum].append(row)
    ordered = sorted(strata.items(), key=lambda item: str(item[0]))
    counts = _quotas([len(rows) for _, rows in ordered], share)
    chosen = [False] * len(labels)
    for (_, rows), count in zip(ordered, counts):
        rows = sorted(rows, key=lambda row: (digests[row], row))
        while 0 < count < len(rows) and digests[rows[count - 1]] == digests[rows[count]]:
            count += 1  # the same texts on one side
        if count == len(rows):
            count = 0
        for row in rows[:count]:
            chosen[row] = True
    if not any(chosen) and len(chosen) > 1:
        chosen[min(range(len(labels)), key=lambda row: digests[row])] = True
    return chosen


def bins(labels: Sequence[float]) -> list[str]:
    """The tenth of all labels that each lies in, the same for equal labels."""
    ordered = sorted(labels)
    first = {label: place for place, label in reversed(list(enumerate(ordered)))}
    return [str(first[label] * _BINS // len(labels)) for label in labels]


def _strata(labels: Sequence[str] | Sequence[tuple[str, ...]]) -> list[str]:
    counts = Counter(one for label in labels for one in (label if isinstance(label, tuple) else ()))
    return [
        min(label, key=lambda one: (counts[one], one), default="") if isinstance(label, tuple) else label
        for label in labels
    ]


def _quotas(sizes: list[int], share: float) -> list[int]:
    """How many of each stratum: ``share`` of it rounded down, and one more for the largest remainders."""
    wanted = [size * share for size in sizes]
    quotas = [min(int(number), size - 1) for number, size in zip(wanted, sizes)]
    missing = max(1, round(sum(sizes) * share)) - sum(quotas)
    by_remainder = sorted(range(len(sizes)), key=lambda i: (quotas[i] - wanted[i], i))
    for i in by_remainder[: max(missing, 0)]:
        quotas[i] += quotas[i] < sizes[i] - 1
    return quotas
