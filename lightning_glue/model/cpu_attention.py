"""Scaled dot-product attention of padded rows on a CPU, where torch's kernel is slow in bf16 and knows no dropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_glue.model import dropout


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float = 0.0) -> Tensor:
    """Attention (rows, heads, queries, size); ``k`` and ``v`` are (rows, heads, length, size).

    torch's kernel is the faster one in float32. bf16 it multiplies through MKL, which on processors of another maker
    takes half as long again as oneDNN; with dropout it falls back to a slower sum.

    Args:
        mask: (rows, 1, 1, length) of the type of ``q``: 0, and -inf at padding.
        p: dropout of the attention weights.
    """
    if p == 0.0 and q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    rows, heads, length, size = k.shape
    q, k, v = (part.reshape(rows * heads, -1, size) for part in (q, k, v))
    before = mask.expand(-1, heads, -1, -1).reshape(rows * heads, 1, length)
    weights = torch.baddbmm(before, q, k.transpose(1, 2), alpha=size**-0.5).softmax(-1)
    return torch.bmm(dropout.dropout(weights, p, True), v).view(rows, heads, -1, size)
