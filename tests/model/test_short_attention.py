"""The kernels for short rows against plain attention of each row; where there is no GPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from lightning_glue.model import short_attention as kernels  # noqa: E402

DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.bfloat16, torch.float16]  # the interpreter multiplies no bf16


def projections(lengths: list[int], heads: int, head: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(tokens, 3 * width), and bounds."""
    torch.manual_seed(head)
    parts = torch.randn(sum(lengths), 3 * heads * head, device=DEVICE).to(dtype)
    return parts.requires_grad_(), torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def by_row(parts: Tensor, lengths: list[int], heads: int, kept: list[Tensor] | None = None, p: float = 0.0) -> Tensor:
    """(tokens, width); ``kept`` (heads, length, length) of each row."""
    found = []
    for index, row in enumerate(parts.split(lengths)):
        q, k, v = row.view(len(row), 3, heads, row.shape[1] // (3 * heads)).unbind(1)
        weights = (torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        if kept:
            weights = weights * kept[index] / (1 - p)
        found.append(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return torch.cat(found)


@pytest.mark.parametrize(("longest", "lengths"), [(16, [5, 16, 1]), (32, [5, 32, 0, 17]), (64, [40, 0, 64, 3])])
@pytest.mark.parametrize(("heads", "head"), [(2, 64), (3, 16), (2, 12)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_are_those_of_each_row(
    longest: int, lengths: list[int], heads: int, head: int, dtype: torch.dtype
) -> None:
    parts, bounds = projections(lengths, heads, head, dtype)
    ours = kernels.short_attention(parts, bounds, heads, longest, 0.0)
    exact = parts.detach().double().requires_grad_()
    theirs = by_row(exact, lengths, heads)
    given = torch.randn_like(theirs)
    (our_gradient,) = torch.autograd.grad(ours, parts, given.to(dtype))
    (their_gradient,) = torch.autograd.grad(theirs, exact, given.to(dtype).double())
    near = 4e-2 if dtype == torch.bfloat16 else 1e-2
    torch.testing.assert_close(ours.double(), theirs, rtol=near, atol=near)
    torch.testing.assert_close(our_gradient.double(), their_gradient, rtol=near, atol=near)


def masks(lengths: list[int], heads: int, longest: int, p: float, seed: int) -> list[Tensor]:
    """(heads, length, length) of each row: with queries of zeros and values that name their keys the weights show."""
    width = heads * longest
    parts = torch.zeros(sum(lengths), 3 * width, device=DEVICE, dtype=torch.float16)
    for row in parts.split(lengths):
        row[:, 2 * width :].view(len(row), heads, longest)[:] = torch.eye(longest, device=DEVICE)[: len(row), None]
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    torch.manual_seed(seed)
    out = kernels.short_attention(parts, bounds, heads, longest, p)
    rows = [row.view(len(row), heads, longest)[..., : len(row)].transpose(0, 1) for row in out.split(lengths)]
    for row in rows:
        kept = row[row != 0].float()
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / row.shape[-1] / (1 - p)), rtol=2e-3, atol=0)
    return [row != 0 for row in rows]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_each_row_and_head_has_a_mask_of_its_own(p: float) -> None:
    found = masks([32] * 6, 4, 32, p, seed=1)
    kept = torch.stack(found)  # (rows, heads, 32, 32)
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    assert len({mask.cpu().numpy().tobytes() for mask in kept.flatten(0, 1)}) == 6 * 4
    neighbours = kept.double().view(-1, 4).sum(-1)  # four come from one call of the generator
    assert neighbours.var().item() == pytest.approx(4 * p * (1 - p), rel=0.1)
    for other, same in ((1, True), (2, False)):
        assert all(map(torch.equal, found, masks([32] * 6, 4, 32, p, seed=other))) == same


def test_the_backward_has_the_mask_of_the_forward() -> None:
    p, lengths, heads, longest = 0.3, [20, 32, 7], 2, 32
    kept = masks(lengths, heads, longest, p, seed=5)
    parts, bounds = projections(lengths, heads, 32, torch.float16)
    torch.manual_seed(5)
    ours = kernels.short_attention(parts, bounds, heads, longest, p)
    exact = parts.detach().double().requires_grad_()
    theirs = by_row(exact, lengths, heads, [mask.double() for mask in kept], p)
    given = torch.randn_like(theirs).half()
    (our_gradient,) = torch.autograd.grad(ours, parts, given)
    (their_gradient,) = torch.autograd.grad(theirs, exact, given.double())
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(our_gradient.double(), their_gradient, rtol=2e-2, atol=2e-2)
