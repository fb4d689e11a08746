"""The examples that made a loss or a gradient no number are named."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_glue.training.finite import FirstNonFinite, all_finite, in_words

ALONE: Any = SimpleNamespace(world_size=1)


def batch(*rows: int) -> Any:
    return {"rows": torch.tensor(rows)}


def test_the_first_loss_that_is_no_number_is_named() -> None:
    first = FirstNonFinite()
    for step, rows, loss in [(1, (4, 7), 0.5), (2, (1, 9), math.inf), (3, (0, 2), math.nan)]:
        first.add(step, batch(*rows), torch.tensor(loss))
        first.end_step(step)
    assert first.describe(ALONE, "RTE/train.tsv") == (
        "its loss was first no number at step 2, with rows 2, 10 of RTE/train.tsv"
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_that_is_no_number_is_named_with_all_rows_of_its_step(accumulate: int) -> None:
    """The loss of its step is a number still, that of the next one is not."""
    layer = torch.nn.Linear(2, 1)
    first = FirstNonFinite()
    for step in (1, 2, 3):
        for part in range(accumulate):
            if part == accumulate - 1:  # the hook comes before the batch's end
                layer.bias.grad = torch.tensor([math.nan if step >= 2 else 1.0])
                layer.weight.grad = torch.zeros(1, 2)
                first.add_gradient(step, layer)
            first.add(step, batch(10 * step + part), torch.tensor(math.nan if step == 3 else 1.0))
        first.end_step(step)
        if step == 2:
            first.forget()  # a point of the curves between the two
    said = first.describe(ALONE, "train.tsv")
    assert said.startswith("its gradient was first no number at step 2, with rows 21")
    assert ("22" in said) == (accumulate == 2)


def test_nothing_is_said_where_all_are_numbers_and_little_is_kept() -> None:
    first = FirstNonFinite()
    for step in range(1, 20):
        first.add(step, batch(step), torch.tensor(1.0))
        first.end_step(step)
    assert first.describe(ALONE, "train.tsv") == ""
    first.forget()
    assert [one.step for one in first._steps] == [19]


def test_many_rows_are_counted() -> None:
    said = in_words(3, list(range(40)), "loss", "t")
    assert said.startswith("its loss was first no number at step 3, with rows 1, 2, 3, ")
    assert said.endswith(", 31, 32 and 8 more of t")


def test_weights_are_looked_at_whole() -> None:
    layer = torch.nn.Linear(3, 3)
    assert all_finite(layer)
    with torch.no_grad():
        layer.weight[2, 1] = math.inf
    assert not all_finite(layer)
