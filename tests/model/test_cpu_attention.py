"""Attention on a CPU against torch's own, and against the sum it stands for where there is dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_glue.model.cpu_attention import attend
from lightning_glue.model.dropout import dropout

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def inputs(dtype: torch.dtype, queries: int = 24) -> tuple[torch.Tensor, ...]:
    """q, k, v of 3 rows of 24, 17 and 5 tokens, and their mask."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 4, n, 16).to(dtype).requires_grad_() for n in (queries, 24, 24))
    real = torch.arange(24) < torch.tensor([24, 17, 5])[:, None]
    mask = torch.zeros(3, 1, 1, 24, dtype=dtype).masked_fill_(~real[:, None, None], float("-inf"))
    return q, k, v, mask


@pytest.mark.parametrize("queries", [24, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchs(dtype: torch.dtype, queries: int) -> None:
    *parts, mask = inputs(dtype, queries)
    exact = [part.detach().double() for part in parts]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=mask.double())
    found = attend(*parts, mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_acts_on_the_weights_and_padding_gets_no_gradient(dtype: torch.dtype) -> None:
    *parts, mask = inputs(dtype)
    exact = [part.detach().double().requires_grad_() for part in parts]
    q, k, v = exact
    weights = (q @ k.transpose(-2, -1) / 4 + mask.double()).softmax(-1)
    torch.manual_seed(1)
    kept = dropout(torch.ones(12, 24, 24, dtype=dtype), 0.3, True).view(3, 4, 24, 24)
    assert 0.6 < (kept > 0).double().mean() < 0.8
    expected = (weights * kept) @ v
    torch.manual_seed(1)
    found = attend(*parts, mask, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, parts, upstream.to(dtype))
    wanted = torch.autograd.grad(expected, exact, upstream)
    for one, other in zip(gradients, wanted):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=4 * TOLERANCE[dtype])
    for gradient in gradients[1:]:
        assert not gradient[1, :, 17:].any() and not gradient[2, :, 5:].any()
