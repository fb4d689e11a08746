"""Gradients of an embedding table that is not cleared as a whole in each step.

autograd's gradient of a table is a new tensor of its size, cleared, of which a batch fills a few hundred of 50,000
rows: on a CPU a tenth of a step, where sentences are short. Here the tensor stays, the rows of the batch's tokens are
added to, and the same rows are cleared before the next step. The sums have the same terms in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_KEPT = "row_gradients"  # attribute of a table whose gradient is kept


class RowGradients:
    """The tokens whose rows of a table's gradient are not zero."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def add(self, weight: nn.Parameter, tokens: Tensor, gradient: Tensor) -> None:
        """Add ``gradient`` (tokens, width) to the rows ``tokens`` (tokens,) of ``weight.grad``."""
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
            self.tokens = []
        weight.grad.index_add_(0, tokens, gradient)
        self.tokens.append(tokens)

    def clear(self, weight: nn.Parameter) -> bool:
        """Make ``weight.grad`` zero; False where it is no gradient of this kind."""
        if weight.grad is None or not self.tokens:
            return False
        for tokens in self.tokens:
            weight.grad.index_fill_(0, tokens, 0)
        self.tokens = []
        return True


def keep(table: nn.Embedding) -> None:
    """From now on :func:`embedding` keeps the gradient of ``table``.

    It does not pass through autograd, whose hooks do not see it: not for a table that DDP averages.
    """
    setattr(table.weight, _KEPT, RowGradients())


def clear(weight: nn.Parameter) -> None:
    """In place of ``weight.grad = None``, for any parameter."""
    rows: RowGradients | None = getattr(weight, _KEPT, None)
    if rows is None or not rows.clear(weight):
        weight.grad = None


def embedding(table: nn.Embedding, tokens: Tensor) -> Tensor:
    """``table(tokens)`` of (tokens,), (tokens, width)."""
    if not hasattr(table.weight, _KEPT) or not torch.is_grad_enabled() or not table.weight.requires_grad:
        return table(tokens)
    return _Embedding.apply(table.weight, tokens, table.padding_idx)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, tokens: Tensor, padding: int | None) -> Tensor:
        ctx.weight, ctx.tokens, ctx.padding = weight, tokens, padding
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (gradient,) = gradients
        if ctx.padding is not None:
            gradient = gradient.masked_fill((ctx.tokens == ctx.padding)[:, None], 0)
        getattr(ctx.weight, _KEPT).add(ctx.weight, ctx.tokens, gradient)
        return None, None, None
