"""The fused kernels against the steps they are made of; where there is no GPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from lightning_glue.model import fused_norm  # noqa: E402

WIDTHS = [48, 64, 768, 1024]


def parts(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.nn.LayerNorm, list[Tensor]]:
    """A norm away from its neutral values, and product, its bias and the residual."""
    torch.manual_seed(width)
    norm = torch.nn.LayerNorm(width, device=DEVICE)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    product = torch.randn(rows, width, device=DEVICE).to(dtype)
    bias, residual = torch.randn(width, device=DEVICE), torch.randn(rows, width, device=DEVICE)
    return norm, [x.requires_grad_() for x in (product, bias, residual)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_those_of_the_steps(width: int, dtype: torch.dtype) -> None:
    norm, (product, bias, residual) = parts(5, width, dtype)
    leaves = [product, bias, residual, norm.weight, norm.bias]
    full, half = fused_norm.residual_norm(product, bias, residual, norm, 0.0)
    exact = norm(residual + (product.float() + bias))
    assert full.dtype == torch.float32 and half.dtype == dtype
    torch.testing.assert_close(full, exact, rtol=1e-5, atol=1e-5)
    one_step = 2**-7 if dtype == torch.bfloat16 else 2**-10  # the interpreter cuts where a GPU rounds
    torch.testing.assert_close(half.float(), full, rtol=one_step if DEVICE == "cpu" else one_step / 2, atol=1e-6)
    of_full, of_half = torch.randn_like(full), torch.randn_like(half)
    for outputs, given in (([full, half], [of_full, of_half]), ([full], [of_full]), ([half], [of_half])):
        ours = torch.autograd.grad(outputs, leaves, given, retain_graph=True)
        theirs = torch.autograd.grad(exact, leaves, sum(g.float() for g in given), retain_graph=True)
        for name, one, other in zip(("product", "bias", "residual", "weight", "norm bias"), ours, theirs):
            near = 1e-4 if one.dtype == torch.float32 else 1e-2
            torch.testing.assert_close(one, other, rtol=near, atol=near, msg=name)


def test_dropout_acts_where_the_steps_have_it() -> None:
    """What was left out shows in the gradient; with it the steps give the same outputs and gradients."""
    p = 0.3
    norm, leaves = parts(40, 48, torch.bfloat16)
    product, bias, residual = leaves
    out, _ = fused_norm.residual_norm(product, bias, residual, norm, p)
    given = torch.randn_like(out)
    ours = torch.autograd.grad(out, leaves, given)
    mask = ours[0] != 0
    exact = norm(residual + mask * (product.float() + bias) / (1 - p))
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, torch.autograd.grad(exact, leaves, given)):
        near = 1e-4 if one.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(one, other, rtol=near, atol=near)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_has_torchs_law(p: float) -> None:
    rows, width = 40, 512
    norm, (product, bias, residual) = parts(rows, width, torch.bfloat16)

    def kept(seed: int) -> Tensor:
        torch.manual_seed(seed)
        out, _ = fused_norm.residual_norm(product, bias, residual, norm, p)
        return torch.autograd.grad(out, product, torch.randn_like(out))[0] != 0

    first = kept(1)
    assert abs(first.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / first.numel()) ** 0.5
    neighbours = first.double().view(rows, -1, 4).sum(-1)  # four come from one call of the generator
    assert neighbours.var().item() == pytest.approx(4 * p * (1 - p), rel=0.1)
    assert torch.equal(first, kept(1)) and not torch.equal(first, kept(2)) and not torch.equal(first[0], first[1])
