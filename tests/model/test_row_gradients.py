"""A table's gradient that is kept equals the one that autograd makes anew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_glue.model import row_gradients
from lightning_glue.training.optimizer import FairseqAdamW

_ROWS, _WIDTH = 11, 3
_ids = st.lists(st.integers(0, _ROWS - 1), min_size=1, max_size=9)


def tables(padding: int | None) -> tuple[nn.Embedding, nn.Embedding]:
    """Two of the same weights; the gradient of the first is kept."""
    torch.manual_seed(0)
    kept, usual = (nn.Embedding(_ROWS, _WIDTH, padding) for _ in range(2))
    usual.load_state_dict(kept.state_dict())
    row_gradients.keep(kept)
    return kept, usual


def step(table: nn.Embedding, adam: FairseqAdamW, micro_batches: list[list[int]]) -> torch.Tensor:
    """The gradient of an optimizer step, before it is cleared."""
    adam.zero_grad()
    for number, ids in enumerate(micro_batches):
        embedded = row_gradients.embedding(table, torch.tensor(ids))
        scale = torch.linspace(-1, 2, embedded.numel()).view_as(embedded) + number
        (embedded * scale).sin().sum().backward()
    assert table.weight.grad is not None
    gradient = table.weight.grad.clone()
    adam.step()
    return gradient


@pytest.mark.parametrize("padding", [None, 1])
@given(steps=st.lists(st.lists(_ids, min_size=1, max_size=3), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_gradients_and_weights_are_the_same_bits(padding: int | None, steps: list[list[list[int]]]) -> None:
    sides = [(table, FairseqAdamW(table.parameters(), lr=0.1, eps=1e-6, fused=True)) for table in tables(padding)]
    for micro_batches in steps:
        first, second = (step(table, adam, micro_batches) for table, adam in sides)
        if len(micro_batches) == 1:
            assert torch.equal(first, second)
        else:  # each micro-batch is summed by itself where autograd adds its gradient
            torch.testing.assert_close(first, second)
            return
    assert torch.equal(sides[0][0].weight, sides[1][0].weight)


def test_the_tensor_stays_and_is_cleared_where_it_was_filled() -> None:
    table, _ = tables(None)
    adam = FairseqAdamW(table.parameters(), lr=0.1, eps=1e-6)
    step(table, adam, [[3, 5, 3]])
    place = table.weight.grad.data_ptr()  # type: ignore[union-attr]
    adam.zero_grad()
    assert table.weight.grad is not None and not table.weight.grad.any()
    assert table.weight.grad.data_ptr() == place
    gradient = step(table, adam, [[2]])
    assert gradient.any(1).nonzero().flatten().tolist() == [2]
    table.weight.grad = None  # by somebody else
    assert step(table, adam, [[4]]).any(1).nonzero().flatten().tolist() == [4]


def test_where_no_gradient_is_wanted_it_is_the_table() -> None:
    table, _ = tables(None)
    with torch.no_grad():
        assert torch.equal(row_gradients.embedding(table, torch.tensor([1, 2])), table.weight[[1, 2]])
    table.weight.requires_grad_(False)
    assert not row_gradients.embedding(table, torch.tensor([1])).requires_grad


def test_a_gradient_of_other_origin_is_let_go() -> None:
    table, usual = tables(None)
    for one in (table, usual):  # a forward that does not ask for rows
        one(torch.tensor([1])).sum().backward()
        row_gradients.clear(one.weight)
        assert one.weight.grad is None
