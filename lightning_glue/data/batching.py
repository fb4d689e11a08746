"""Which examples form a batch, and how it travels.

Batches are deterministic in (seed, epoch) and the same for any number of processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch.utils.data import Sampler

from lightning_glue.data.tokenizer import PAD
from lightning_glue.errors import ConfigError
from lightning_glue.utils.processor import usable_cores


@dataclass(frozen=True)
class MicroBatch:
    """Examples one process puts through the model at once.

    Attributes:
        indices: rows of the split, (examples,) int64; never empty.
        loss_weight: factor on the sum of the per-example losses that makes the gradient, averaged over processes and
            accumulated micro-batches, that of the mean over the whole batch.
    """

    indices: np.ndarray
    loss_weight: float


class Packed(TypedDict):
    """Token ids of some examples, one after the other without padding.

    tokens: (sum of lengths,) int64. lengths: (examples,) int64, none of them 0. longest: the greatest of them, which
    the host so knows without asking the device.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    longest: int


def moved(batch: Packed, device: torch.device) -> Packed:
    """The same on a device, whose copy the host does not wait for."""
    tokens, lengths = (batch[key].to(device, non_blocking=True) for key in ("tokens", "lengths"))
    return Packed(tokens=tokens, lengths=lengths, longest=batch["longest"])


def split_rows(batch: Packed, count: int) -> list[Packed]:
    """``count`` runs of neighbouring rows with about as many tokens each; fewer, where rows are few."""
    ends = batch["lengths"].cumsum(0)
    wanted = ends[-1] * torch.arange(1, count) // count
    cuts = [0, *(torch.searchsorted(ends, wanted) + 1).tolist(), len(ends)]
    return [_rows(batch, ends, begin, end) for begin, end in itertools.pairwise(cuts) if begin < end]


def _rows(batch: Packed, ends: torch.Tensor, begin: int, end: int) -> Packed:
    lengths = batch["lengths"][begin:end]
    tokens = batch["tokens"][int(ends[begin] - lengths[0]) : int(ends[end - 1])]
    return Packed(tokens=tokens, lengths=lengths, longest=int(lengths.max()))


def padded(batch: Packed) -> torch.Tensor:
    """Token ids (examples, longest), right-padded."""
    lengths = batch["lengths"]
    real = torch.arange(batch["longest"], device=lengths.device) < lengths[:, None]
    return torch.full_like(real, PAD, dtype=torch.int64).masked_scatter(real, batch["tokens"])


def padded_size(batch: Packed) -> int:
    """Tokens of the batch if it were padded."""
    return len(batch["lengths"]) * batch["longest"]


def train_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int, pool: int) -> list[np.ndarray]:
    """Shuffle rows and cut them into batches of ``batch_size`` (the last of the epoch may be smaller).

    With ``pool`` > 1, batches of similar length are formed within groups of ``pool`` batches and shuffled again,
    which saves padding and leaves the number of updates and the examples in each of them as they were.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), batch_size * pool):
        group = order[start : start + batch_size * pool]
        if pool > 1:
            group = group[np.argsort(lengths[group], kind="stable")]
        cut = [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        batches.extend(cut[i] for i in (generator.permutation(len(cut)) if pool > 1 else range(len(cut))))
    return batches


def split_batch(batch: np.ndarray, lengths: np.ndarray, parts: int) -> list[MicroBatch]:
    """Deal a batch, longest example first, to ``parts`` micro-batches of equal size and similar token counts.

    A part without examples, possible in the last batch of an epoch, repeats one example with weight 0, since every
    DDP process must take every step.
    """
    ordered = batch[np.argsort(-lengths[batch], kind="stable")]
    weight = parts / len(batch)
    dealt = (ordered[part::parts] for part in range(parts))
    return [MicroBatch(indices, weight) if len(indices) else MicroBatch(ordered[-1:], 0.0) for indices in dealt]


def check_batch_size(batch_size: int, world: int, accumulate: int) -> None:
    """Raise UserError where a batch has fewer examples than the micro-batches it is dealt to."""
    if batch_size < world * accumulate:
        raise ConfigError(
            f"data.batch_size={batch_size} examples a step cannot be shared by {world} processes x "
            f"trainer.accumulate={accumulate}; raise the batch size to at least {world * accumulate}"
        )


class TrainSampler(Sampler[MicroBatch]):
    """Micro-batches of one process, epoch after epoch (Lightning calls :meth:`set_epoch`).

    Args:
        start: epoch and micro-batches done in it, where training is resumed: these are left out.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        *,
        seed: int = 1,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        pool: int = 1,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        check_batch_size(batch_size, world, accumulate)
        self.lengths, self.batch_size, self.seed, self.pool = lengths, batch_size, seed, pool
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.epoch, self.start = 0, start

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def updates(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __len__(self) -> int:
        return self.updates * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        done = self.start[1] // self.accumulate if self.epoch == self.start[0] else 0
        for batch in train_batches(self.lengths, self.batch_size, self.seed, self.epoch, self.pool)[done:]:
            parts = split_batch(batch, self.lengths, self.world * self.accumulate)
            yield from parts[self.rank :: self.world]


def evaluation_tokens(accelerator: str) -> int:
    """Padding included, of a batch: some for each of a CPU's cores, however many processes they have, or a GPU full."""
    return 16384 if accelerator == "cuda" else max(4096, 256 * usable_cores())


class EvalSampler(Sampler[MicroBatch]):
    """Every row exactly once, longest first, in batches that do not depend on the number of processes.

    Process r takes batches r, r + world, ...: a row meets the same neighbours, hence the same padding and the same
    logits, however many processes share the work. A process left without a batch, possible on a small split, gets one
    row with weight 0, which does not count: Lightning wants every process in every evaluation.
    """

    def __init__(self, lengths: np.ndarray, max_tokens: int, *, rank: int = 0, world: int = 1) -> None:
        order = np.argsort(-lengths, kind="stable")
        self.batches: list[np.ndarray] = []
        start = 0
        while start < len(order):
            count = max(1, max_tokens // int(lengths[order[start]]))
            self.batches.append(order[start : start + count])
            start += count
        self.mine = [MicroBatch(indices, 1.0 / len(indices)) for indices in self.batches[rank::world]]
        self.mine = self.mine or [MicroBatch(order[-1:], 0.0)]

    def __len__(self) -> int:
        return len(self.mine)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.mine)
