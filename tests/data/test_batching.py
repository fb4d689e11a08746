from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_glue.data import batching
from lightning_glue.data.batching import (
    EvalSampler,
    Packed,
    TrainSampler,
    evaluation_tokens,
    split_rows,
    train_batches,
)
from lightning_glue.errors import UserError

lengths_of = st.lists(st.integers(1, 60), min_size=1, max_size=120).map(np.array)


@given(lengths_of, st.integers(1, 17), st.integers(0, 5), st.sampled_from([1, 4]))
@settings(max_examples=150, deadline=None)
def test_an_epoch_has_every_row_once_in_batches_of_the_recipe(
    lengths: np.ndarray, size: int, epoch: int, pool: int
) -> None:
    batches = train_batches(lengths, size, 1, epoch, pool)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert sum(len(batch) != size for batch in batches) <= 1
    assert len(batches) == -(-len(lengths) // size)


@given(lengths_of, st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_processes_share_every_batch_without_loss(lengths: np.ndarray, world: int, accumulate: int, epoch: int) -> None:
    size = world * accumulate * 2
    samplers = [
        TrainSampler(lengths, size, rank=rank, world=world, accumulate=accumulate, pool=4) for rank in range(world)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    streams = [list(sampler) for sampler in samplers]
    assert {len(stream) for stream in streams} == {len(samplers[0])}
    whole = train_batches(lengths, size, 1, epoch, 4)
    for update, batch in enumerate(whole):
        steps = range(update * accumulate, (update + 1) * accumulate)
        parts = [stream[step] for stream in streams for step in steps]
        weighted = [row for part in parts if part.loss_weight for row in part.indices]
        assert sorted(weighted) == sorted(batch)
        # averaged over processes and micro-batches, each row weighs 1 / len(batch)
        assert all(part.loss_weight in (0.0, pytest.approx(len(parts) / len(batch))) for part in parts)
        assert all(len(part.indices) for part in parts)


@given(lengths_of, st.integers(60, 500), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_evaluation_batches_do_not_depend_on_the_processes(lengths: np.ndarray, budget: int, world: int) -> None:
    alone = [batch.indices.tolist() for batch in EvalSampler(lengths, budget)]
    shared = [list(EvalSampler(lengths, budget, rank=rank, world=world)) for rank in range(world)]
    assert all(stream for stream in shared)
    dealt = [batch.indices.tolist() for stream in shared for batch in stream if batch.loss_weight]
    assert sorted(dealt) == sorted(alone)
    assert sorted(row for batch in alone for row in batch) == list(range(len(lengths)))
    assert all(lengths[batch].max() * len(batch) <= budget for batch in alone)


@given(lengths_of, st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_parts_of_a_batch_have_its_rows_in_order_and_like_numbers_of_tokens(lengths: np.ndarray, count: int) -> None:
    whole = Packed(tokens=torch.arange(lengths.sum()), lengths=torch.from_numpy(lengths), longest=int(lengths.max()))
    parts = split_rows(whole, count)
    assert 1 <= len(parts) <= count
    for name in ("tokens", "lengths"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    assert all(part["longest"] == part["lengths"].max() for part in parts)
    assert all(len(part["tokens"]) == part["lengths"].sum() for part in parts)
    assert max(len(part["tokens"]) for part in parts) < lengths.sum() / count + 2 * lengths.max()


@pytest.mark.parametrize("cores, tokens", [(2, 4096), (16, 4096), (64, 16384)])
def test_an_evaluation_batch_has_work_for_every_core(monkeypatch: pytest.MonkeyPatch, cores: int, tokens: int) -> None:
    monkeypatch.setattr(batching, "usable_cores", lambda: cores)
    assert evaluation_tokens("cpu") == tokens
    assert evaluation_tokens("cuda") == 16384


def test_epochs_differ_and_repeat_exactly() -> None:
    lengths = np.arange(1, 101)
    first, again, next_epoch = (train_batches(lengths, 8, 1, epoch, 4) for epoch in (0, 0, 1))
    assert [b.tolist() for b in first] == [b.tolist() for b in again]
    assert [b.tolist() for b in first] != [b.tolist() for b in next_epoch]


def test_pooling_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 4000)
    padded = {
        pool: sum(lengths[batch].max() * len(batch) for batch in train_batches(lengths, 16, 1, 0, pool))
        for pool in (1, 32)
    }
    assert padded[32] < 1.15 * lengths.sum() < padded[1]


def test_a_batch_smaller_than_its_parts_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.batch_size=4 .* 4 processes x trainer\.accumulate=2"):
        TrainSampler(np.ones(10, dtype=int), 4, world=4, accumulate=2)
