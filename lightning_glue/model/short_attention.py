"""Attention within packed rows of at most 64 tokens, as kernels in Triton: one program for each row and head.

GLUE's rows are short. FlashAttention cuts queries and keys into squares of 128, most of which such rows leave empty:
its backward takes a fifth of a step. The kernels of xFormers, which torch has as well, cut squares of 64, but were seen
to draw the same mask of dropout for every row and head of a packed batch. Here a whole row is one square, of 16, 32 or
64; nothing of it is kept for the backward, which computes it again.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_glue.model.dropout import draw_seed

LONGEST = 64  # tokens of a row
_LEAST = 16  # of a square, and dimensions of a head: a matrix product's on the GPU
_LARGEST_HEAD = 128


def supports(dtype: torch.dtype, head: int, longest: int) -> bool:
    """Whether these kernels are for projections of this type, heads of ``head`` dimensions, rows of so many tokens."""
    return dtype in (torch.bfloat16, torch.float16) and head <= _LARGEST_HEAD and longest <= LONGEST


def short_attention(parts: Tensor, bounds: Tensor, heads: int, longest: int, p: float) -> Tensor:
    """(tokens, width) of projections ``parts`` (tokens, 3 * width): queries, keys and values one after the other.

    Args:
        bounds: (rows + 1,) int32, cumulative lengths; every token belongs to a row.
        longest: at least the tokens of the longest row.
        p: dropout of the attention weights. Its seed is drawn from torch's generator of the device.
    """
    block = max(_LEAST, triton.next_power_of_2(longest))
    found: Tensor = _ShortAttention.apply(parts, bounds, heads, block, p)
    return found


@triton.jit
def _weights(
    q, k, seed, row, head, heads, length, factor, p, BLOCK: tl.constexpr, DROPS: tl.constexpr
):  # fmt: skip
    """Of queries over keys (BLOCK, BLOCK), and which of them dropout leaves."""
    place = tl.arange(0, BLOCK)
    scores = tl.where((place < length)[None, :], tl.dot(q, tl.trans(k)) * factor, float("-inf"))
    raised = tl.exp(scores - tl.max(scores, 1)[:, None])
    weights = raised / tl.sum(raised, 1)[:, None]
    kept = weights >= 0.0
    if DROPS:
        quarter = place[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
        a, b, c, d = tl.rand4x(tl.load(seed), (row * heads + head) * (BLOCK * BLOCK // 4) + quarter)
        kept = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK, BLOCK)) >= p
    return weights, kept


@triton.jit
def _forward(
    parts, bounds, seed, out, heads, width, factor, p, SIZE: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(bounds + row)
    length = tl.load(bounds + row + 1) - start
    if length > 0:
        place, dims = tl.arange(0, BLOCK), tl.arange(0, HEAD)
        inside = (place < length)[:, None] & (dims < SIZE)[None, :]
        token = (start + place).to(tl.int64)[:, None]
        at = parts + token * (3 * width) + head * SIZE + dims[None, :]
        q, k = tl.load(at, mask=inside, other=0.0), tl.load(at + width, mask=inside, other=0.0)
        v = tl.load(at + 2 * width, mask=inside, other=0.0)
        weights, kept = _weights(q, k, seed, row, head, heads, length, factor, p, BLOCK, DROPS)
        if DROPS:
            weights = tl.where(kept, weights / (1.0 - p), 0.0)
        found = tl.dot(weights.to(v.dtype), v)
        tl.store(out + token * width + head * SIZE + dims[None, :], found.to(v.dtype), mask=inside)


@triton.jit
def _backward(
    parts, bounds, seed, grad, grad_parts, heads, width, factor, p, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    HEAD: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(bounds + row)
    length = tl.load(bounds + row + 1) - start
    if length > 0:
        place, dims = tl.arange(0, BLOCK), tl.arange(0, HEAD)
        inside = (place < length)[:, None] & (dims < SIZE)[None, :]
        token = (start + place).to(tl.int64)[:, None]
        offset = token * (3 * width) + head * SIZE + dims[None, :]
        at = parts + offset
        q, k = tl.load(at, mask=inside, other=0.0), tl.load(at + width, mask=inside, other=0.0)
        v = tl.load(at + 2 * width, mask=inside, other=0.0)
        g = tl.load(grad + token * width + head * SIZE + dims[None, :], mask=inside, other=0.0)
        weights, kept = _weights(q, k, seed, row, head, heads, length, factor, p, BLOCK, DROPS)
        used, of_used = weights, tl.dot(g, tl.trans(v))
        if DROPS:
            used = tl.where(kept, weights / (1.0 - p), 0.0)
            of_used = tl.where(kept, of_used / (1.0 - p), 0.0)
        of_scores = weights * (of_used - tl.sum(weights * of_used, 1)[:, None]) * factor
        half = of_scores.to(q.dtype)
        to = grad_parts + offset
        tl.store(to, tl.dot(half, k).to(q.dtype), mask=inside)
        tl.store(to + width, tl.dot(tl.trans(half), q).to(q.dtype), mask=inside)
        tl.store(to + 2 * width, tl.dot(tl.trans(used.to(q.dtype)), g).to(q.dtype), mask=inside)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, bounds: Tensor, heads: int, block: int, p: float) -> Tensor:
        parts = parts.contiguous()
        width = parts.shape[1] // 3
        out = parts.new_empty(len(parts), width)
        seed = draw_seed(parts.device) if p else bounds
        size = width // heads
        ctx.numbers = (heads, width, size**-0.5, p)
        ctx.shape = {
            "SIZE": size, "BLOCK": block, "HEAD": max(_LEAST, triton.next_power_of_2(size)), "DROPS": p > 0,
            "num_warps": 4 if block > 32 else 2,
        }  # fmt: skip
        ctx.grid = (len(bounds) - 1, heads)
        ctx.save_for_backward(parts, bounds, seed)
        _forward[ctx.grid](parts, bounds, seed, out, *ctx.numbers, **ctx.shape)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts, bounds, seed = ctx.saved_tensors
        of_parts = torch.empty_like(parts)
        _backward[ctx.grid](parts, bounds, seed, gradients[0].contiguous(), of_parts, *ctx.numbers, **ctx.shape)
        return of_parts, None, None, None, None
