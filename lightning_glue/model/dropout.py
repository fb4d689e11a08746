"""Dropout with torch's law and, on the CPU, less than half of its cost."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEVELS = 1 << 16
_SEEDS = 2**31 - 1


def draw_seed(device: torch.device) -> Tensor:
    """One for a kernel that draws by itself, of torch's generator of the device: (1,) int64."""
    return torch.randint(_SEEDS, (1,), device=device)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability ``p`` and scale the others so that the mean stays.

    torch draws one Bernoulli variable an element on the CPU, which takes as long as the matrix products around it. Here
    each 64-bit draw of the same generator decides four elements; ``p`` is rounded to the nearest 1/65536.
    """
    if not training or p == 0.0:
        return x
    dropped = round(p * _LEVELS)
    if x.is_cuda or not 0 < dropped < _LEVELS:
        return F.dropout(x, p, training)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    uniform = draws.view(torch.int16)[: x.numel()].view(x.shape)  # each of -32768 ... 32767 equally often
    keep = torch.ge(uniform, dropped - _LEVELS // 2, out=torch.empty_like(x, requires_grad=False))
    return x * keep.mul_(_LEVELS / (_LEVELS - dropped))
