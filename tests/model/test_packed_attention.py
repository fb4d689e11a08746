"""FlashAttention over packed rows against plain attention of each row by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_glue.model import packed_attention

LENGTHS = [5, 1, 130, 0, 33]


def bounds(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def by_row(q: Tensor, k: Tensor, v: Tensor, q_lengths: list[int], k_lengths: list[int]) -> Tensor:
    """(queries, heads, head), in the precision of what is given."""
    rows = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths))
    found = []
    for q_row, k_row, v_row in rows:
        scores = torch.einsum("qhd,khd->hqk", q_row, k_row) * q.shape[-1] ** -0.5
        found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_row))
    return torch.cat(found)


def test_only_gpus_and_half_precision_have_it() -> None:
    assert not packed_attention.supports(torch.empty(0, dtype=torch.bfloat16), 64)


@pytest.mark.cuda
@pytest.mark.parametrize("head", [16, 64])
@pytest.mark.parametrize("kind", ["first only", "long", "short"])
def test_outputs_and_gradients_are_those_of_each_row_by_itself(head: int, kind: str) -> None:
    torch.manual_seed(0)
    lengths, heads = ([5, 1, 33, 0, 33] if kind == "short" else LENGTHS), 3
    q_lengths = [1] * len(lengths) if kind == "first only" else lengths
    ends, q_ends = bounds(lengths, "cuda"), bounds(q_lengths, "cuda")
    parts = torch.randn(sum(lengths), 3 * heads * head, device="cuda").bfloat16().requires_grad_()
    alone = torch.randn(sum(q_lengths), heads * head, device="cuda").bfloat16().requires_grad_()
    assert packed_attention.supports(parts, head)
    exact, exact_alone = (x.detach().double().requires_grad_() for x in (parts, alone))
    q, k, v = (x.unflatten(-1, (heads, head)) for x in exact.chunk(3, -1))
    if kind == "first only":
        longest = (1, max(lengths))
        ours = packed_attention.attention(alone, *parts.chunk(3, -1)[1:], (q_ends, ends), longest, heads, 0.0)
        theirs = by_row(exact_alone.unflatten(-1, (heads, head)), k, v, q_lengths, lengths)
    else:
        ours = packed_attention.self_attention(parts, ends, heads, max(lengths), 0.0)
        theirs = by_row(q, k, v, lengths, lengths)
    weights = torch.randn(ours.shape, device="cuda", dtype=torch.float64)
    (ours.double() * weights).sum().backward()
    (theirs.flatten(1) * weights).sum().backward()
    torch.testing.assert_close(ours.double(), theirs.flatten(1), rtol=2e-2, atol=2e-2)
    for x, y in ((parts, exact), (alone, exact_alone)):
        if y.grad is not None:
            assert x.grad is not None
            torch.testing.assert_close(x.grad.double(), y.grad, rtol=3e-2, atol=3e-2 * float(y.grad.abs().max()))


@pytest.mark.cuda
@pytest.mark.parametrize("length", [64, 128])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_leaves_out_the_share_asked_for_of_every_row_and_head(p: float, length: int) -> None:
    torch.manual_seed(0)
    rows, heads = 64, 8
    parts = torch.zeros(rows * length, 3 * heads * length, device="cuda", dtype=torch.float16)  # equal weights
    values = parts[:, 2 * heads * length :].view(rows, length, heads, length)
    values[:] = torch.eye(length, device="cuda", dtype=torch.float16)[None, :, None]  # which name their keys
    ends = bounds([length] * rows, "cuda")

    def weights() -> Tensor:
        found = packed_attention.self_attention(parts, ends, heads, length, p)
        return found.view(rows, length, heads, length).transpose(1, 2)

    found = weights()
    kept = found != 0
    assert abs(float(kept.float().mean()) - (1 - p)) < 1 / 256 + 0.002
    torch.testing.assert_close(float(found.float().mean()), 1 / length, rtol=1e-2, atol=0)
    assert len({mask.cpu().numpy().tobytes() for mask in kept.flatten(0, 1)}) == rows * heads
    assert not torch.equal(found, weights())
