"""``norm(residual + dropout(product + bias))`` in one pass over the GPU's memory each way, as kernels in Triton.

Step by step these are a dropout, a sum, a LayerNorm and a cast to half precision, and in the backward as many again and
sums over all tokens: each reads and writes the whole of what is a few microseconds of work, and at GLUE's lengths they
take as long as the matrix products. The numbers are those of the steps, in float32; the draws of dropout are others.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_glue.model.dropout import draw_seed

_WIDEST = 4096  # of a row, which one program holds
_PROGRAMS = 4  # on each multiprocessor, in the backward


def supports(dtype: torch.dtype, width: int) -> bool:
    """Whether these kernels are for products of this type and rows so wide."""
    return width <= _WIDEST and dtype in (torch.bfloat16, torch.float16)


def residual_norm(
    product: Tensor, product_bias: Tensor, residual: Tensor, norm: torch.nn.LayerNorm, p: float
) -> tuple[Tensor, Tensor]:
    """``norm(residual + dropout(product + product_bias))`` (tokens, width) in float32, and in the type of ``product``.

    Args:
        product: (tokens, width) in half precision.
        residual: (tokens, width) float32.
        p: of the dropout, 0 where there is none. Its seed is drawn from torch's generator of the device.
    """
    found: tuple[Tensor, Tensor] = _ResidualNorm.apply(
        product, product_bias, residual, norm.weight, norm.bias, norm.eps, p
    )
    return found


@triton.jit
def _forward(
    product, product_bias, residual, weight, bias, seed, out, out_half, summed, kept, mean, scale, width, eps, p,
    BLOCK: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    x = tl.load(product + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(product_bias + columns, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        a, b, c, d = tl.rand4x(tl.load(seed), (row * (BLOCK // 4)).to(tl.int32) + tl.arange(0, BLOCK // 4))
        keeps = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK,)) >= p
        tl.store(kept + at, keeps.to(tl.int8), mask=inside)
        x = tl.where(keeps, x / (1.0 - p), 0.0)
    x += tl.load(residual + at, mask=inside, other=0.0)
    tl.store(summed + at, x, mask=inside)
    middle = tl.sum(x, 0) / width
    x = tl.where(inside, x - middle, 0.0)
    factor = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(mean + row, middle)
    tl.store(scale + row, factor)
    y = x * factor * tl.load(weight + columns, mask=inside, other=0.0) + tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(out + at, y, mask=inside)
    tl.store(out_half + at, y.to(out_half.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, grad_half, summed, kept, mean, scale, weight, grad_product, grad_residual, partial, rows, width, p,
    BLOCK: tl.constexpr, DROPS: tl.constexpr, FULL: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    first, step = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    w = tl.load(weight + columns, mask=inside, other=0.0)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    of_product = tl.zeros((BLOCK,), tl.float32)
    row = first
    while row < rows:
        at = row.to(tl.int64) * width + columns
        g = tl.zeros((BLOCK,), tl.float32)
        if FULL:
            g += tl.load(grad + at, mask=inside, other=0.0)
        if HALF:
            g += tl.load(grad_half + at, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(scale + row)
        x = tl.where(inside, (tl.load(summed + at, mask=inside, other=0.0) - tl.load(mean + row)) * factor, 0.0)
        of_weight += g * x
        of_bias += g
        g *= w
        g = (g - tl.sum(g, 0) / width - x * (tl.sum(g * x, 0) / width)) * factor
        tl.store(grad_residual + at, g, mask=inside)
        if DROPS:
            g = tl.where(tl.load(kept + at, mask=inside, other=0) != 0, g / (1.0 - p), 0.0)
        g = tl.where(inside, g, 0.0)
        of_product += g
        tl.store(grad_product + at, g.to(grad_product.dtype.element_ty), mask=inside)
        row += step
    place = partial + first * width + columns
    tl.store(place, of_weight, mask=inside)
    tl.store(place + step * width, of_bias, mask=inside)
    tl.store(place + 2 * step * width, of_product, mask=inside)


def _shape(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 256))}


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, product: Tensor, product_bias: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float,
        p: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        product, residual = product.contiguous(), residual.contiguous()
        rows, width = product.shape
        out, half, summed = torch.empty_like(residual), torch.empty_like(product), torch.empty_like(residual)
        seed = draw_seed(product.device) if p else product
        kept = torch.empty_like(product, dtype=torch.int8) if p else product
        mean, scale = (torch.empty(rows, dtype=torch.float32, device=product.device) for _ in range(2))
        _forward[(rows,)](
            product, product_bias, residual, weight, bias, seed, out, half, summed, kept, mean, scale, width, eps, p,
            DROPS=p > 0, **_shape(width),
        )  # fmt: skip
        ctx.save_for_backward(summed, kept, mean, scale, weight)
        ctx.p, ctx.dtypes = p, (product.dtype, product_bias.dtype)
        ctx.set_materialize_grads(False)
        return out, half

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        summed, kept, mean, scale, weight = ctx.saved_tensors
        full, half = (None if gradient is None else gradient.contiguous() for gradient in gradients)
        rows, width = summed.shape
        programs = min(rows, _PROGRAMS * _multiprocessors(summed.device))
        partial = torch.empty(3, programs, width, dtype=torch.float32, device=summed.device)
        of_residual = torch.empty_like(summed)
        of_product = torch.empty_like(summed, dtype=ctx.dtypes[0])
        _backward[(programs,)](
            summed if full is None else full, summed if half is None else half, summed, kept, mean, scale, weight,
            of_product, of_residual, partial, rows, width, ctx.p,
            DROPS=ctx.p > 0, FULL=full is not None, HALF=half is not None, **_shape(width),
        )  # fmt: skip
        of_weight, of_bias, of_product_bias = partial.sum(1).unbind()
        return of_product, of_product_bias.to(ctx.dtypes[1]), of_residual, of_weight, of_bias, None, None


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
