"""A dev set taken from the training file: stratified, the same whatever the order of the rows, never all of a class."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_glue.data.dev_part import bins, dev_rows

ROWS = st.lists(st.tuples(st.integers(0, 400).map(str), st.sampled_from("aaaab")), min_size=2, max_size=120)


@settings(deadline=None)
@given(rows=ROWS, share=st.sampled_from([0.05, 0.1, 0.3, 0.5]), seed=st.integers(0, 3))
def test_shares_are_those_of_the_classes(rows: list[tuple[str, str]], share: float, seed: int) -> None:
    texts, labels = [[f"text {i} {text}" for i, (text, _) in enumerate(rows)]], [label for _, label in rows]
    chosen = dev_rows(texts, labels, share, seed)
    assert any(chosen)
    every, dev = Counter(labels), Counter(label for label, is_dev in zip(labels, chosen) if is_dev)
    assert all(abs(dev[label] - count * share) <= 1 and dev[label] < max(count, 2) for label, count in every.items())
    assert abs(sum(dev.values()) - max(1, round(len(rows) * share))) <= len(every)

    order = random.Random(seed).sample(range(len(rows)), len(rows))
    again = dev_rows([[texts[0][row] for row in order]], [labels[row] for row in order], share, seed)
    assert [chosen[row] for row in order] == again


@settings(deadline=None)
@given(rows=ROWS)
def test_the_same_text_with_the_same_label_is_on_one_side(rows: list[tuple[str, str]]) -> None:
    chosen = dev_rows([[text for text, _ in rows]], [label for _, label in rows], 0.3, 1)
    sides: dict[tuple[str, str], set[bool]] = {}
    for row, is_dev in zip(rows, chosen):
        sides.setdefault(row, set()).add(is_dev)
    several = [row for row, found in sides.items() if len(found) > 1]
    assert len(several) <= (0 if sum(chosen) > 1 else 1)  # one row alone may have to be the dev set


def test_another_seed_takes_other_rows_and_these_stay() -> None:
    texts, labels = (
        [[f"text {i}" for i in range(60)], [f"pair {i}" for i in range(60)]],
        [str(i % 3) for i in range(60)],
    )
    first, second = (dev_rows(texts, labels, 0.1, seed) for seed in (1, 2))
    assert first != second
    assert [row for row, chosen in enumerate(first) if chosen] == [
        15,
        16,
        18,
        38,
        53,
        58,
    ]  # runs on it are resumed and compared


def test_several_labels_go_by_the_rarest_and_numbers_by_tenths() -> None:
    labels = [("rare", "common") if i % 10 == 0 else ("common",) if i % 3 else () for i in range(100)]
    chosen = dev_rows([[f"text {i}" for i in range(100)]], labels, 0.2, 1)
    assert sum("rare" in label for label, dev in zip(labels, chosen) if dev) == 2
    numbers = [float(i) for i in range(100)]
    assert Counter(bins(numbers)) == {str(tenth): 10 for tenth in range(10)}
    assert bins([1.0, 1.0, 1.0, 5.0]) == ["0", "0", "0", "7"]
