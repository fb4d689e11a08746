"""The paper's optimizer and learning-rate schedule, with fairseq's arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class FairseqAdamW(torch.optim.AdamW):
    """AdamW with the denominator of ``fairseq/optim/adam.py``: sqrt(v) + eps is divided by sqrt(1 - beta2^t).

    torch adds eps after the bias correction of v. Scaling eps by the same correction makes the two equal, and keeps
    torch's fused kernels. Weight decay is decoupled in both (Loshchilov & Hutter 2019).
    """

    def __init__(self, params: Iterable[Any], *, eps: float, **options: Any) -> None:
        super().__init__(params, eps=eps, **options)
        for group in self.param_groups:
            group.setdefault("fairseq_eps", eps)
            group.setdefault("updates", 0)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:  # run first: a gradient of step t needs the eps of step t, and GradScaler may skip
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["updates"] += 1
            group["eps"] = group["fairseq_eps"] / (1 - group["betas"][1] ** group["updates"]) ** 0.5
        super().step()
        return loss


def parameter_groups(model: torch.nn.Module, weight_decay: float, decay_biases: bool) -> list[dict[str, Any]]:
    """Trainable parameters; without ``decay_biases``, biases and LayerNorms (1-d tensors) go without weight decay."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay_biases:
        return [{"params": trainable, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def polynomial_decay(update: int, warmup: int, total: int) -> float:
    """Factor on the peak learning rate at the 0-based ``update``: linear warm-up, then linear decay to 0.

    As in ``fairseq/optim/lr_scheduler/polynomial_decay_schedule.py``, the very first update has rate 0.
    """
    if warmup > 0 and update <= warmup:
        return update / warmup
    return max(0.0, 1 - (update - warmup) / max(1, total - warmup))
