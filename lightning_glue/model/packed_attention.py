"""Attention within each row of tokens that stand one after the other, without padding, on a GPU.

torch's own ``varlen_attn`` calls FlashAttention, but without dropout, which fairseq's recipe has in training.
"""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from torch import Tensor

from lightning_glue.utils.processor import has_triton

_LARGEST_HEAD = 256


def supports(x: Tensor, head: int) -> bool:
    """Whether there is a kernel for queries of ``x``'s type on its device, and heads of ``head`` dimensions.

    FlashAttention is for half precision on Ampere and later GPUs.
    """
    fits = head % 8 == 0 and head <= _LARGEST_HEAD
    return fits and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _is_ampere(x.device)


@cache
def _is_ampere(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def self_attention(parts: Tensor, bounds: Tensor, heads: int, longest: int, p: float) -> Tensor:
    """(tokens, width) of projections ``parts`` (tokens, 3 * width): queries, keys and values one after the other.

    Args:
        bounds: (rows + 1,) int32, cumulative lengths; every token belongs to a row.
        longest: at least the tokens of the longest row.
        p: dropout of the attention weights; FlashAttention, for long rows, rounds it to the next 1/256.
    """
    if has_triton():
        from lightning_glue.model import short_attention

        if short_attention.supports(parts.dtype, parts.shape[-1] // (3 * heads), longest):
            return short_attention.short_attention(parts, bounds, heads, longest, p)
    q, k, v = parts.chunk(3, -1)
    return attention(q, k, v, (bounds, bounds), (longest, longest), heads, p)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Tensor, Tensor], longest: tuple[int, int], heads: int, p: float
) -> Tensor:
    """(queries, width) of queries, keys and values (tokens, width): :func:`self_attention`, of queries of their own.

    Args:
        bounds, longest: of queries, and of keys.
    """
    split = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    found = torch.ops.aten._flash_attention_forward(*split, *bounds, *longest, p, False, False)
    return cast(Tensor, found[0]).flatten(1)
