"""Rows of options such that every two values of different options meet in one of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs(row: Mapping[str, Any]) -> set[Pair]:
    """The pairs of values that meet in a row."""
    return set(itertools.combinations(row.items(), 2))


def rows(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few rows that have every pair, the first ones the most pairs: greedy, the same in every process.

    Args:
        options: the values of each, at least two options.
    """
    wanted = dict.fromkeys(
        ((one, x), (other, y))
        for one, other in itertools.combinations(options, 2)
        for x, y in itertools.product(options[one], options[other])
    )
    found: list[dict[str, Any]] = []
    while wanted:
        seed = dict(next(iter(wanted)))  # one pair that is still missing, and what goes with it best
        for name, values in options.items():
            if name not in seed:
                seed[name] = max(values, key=lambda value: sum(_meets(seed, name, value, pair) for pair in wanted))
        row = {name: seed[name] for name in options}
        for pair in pairs(row):
            wanted.pop(pair, None)
        found.append(row)
    return found


def _meets(row: Mapping[str, Any], name: str, value: Any, pair: Pair) -> bool:
    """Whether ``value`` would make a pair with what the row has."""
    return (name, value) in pair and all(part == (name, value) or row.get(part[0]) == part[1] for part in pair)
