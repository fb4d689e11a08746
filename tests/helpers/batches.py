"""Batches of token ids made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_glue.data.batching import Packed


def packed(*examples: Sequence[int] | torch.Tensor) -> Packed:
    """The token ids of some examples as they travel."""
    rows = [torch.as_tensor(example, dtype=torch.int64) for example in examples]
    lengths = torch.tensor([len(row) for row in rows])
    return Packed(tokens=torch.cat(rows), lengths=lengths, longest=int(lengths.max()))
