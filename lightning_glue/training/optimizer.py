"""The paper's optimizer and learning-rate schedule, with fairseq's arithmetic."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch

from lightning_glue.config import OptimizerConfig
from lightning_glue.model import row_gradients


class FairseqAdamW(torch.optim.AdamW):
    """AdamW with the denominator of ``fairseq/optim/adam.py``: sqrt(v) + eps is divided by sqrt(1 - beta2^t).

    torch adds eps after the bias correction of v. Scaling eps by the same correction makes the two equal, and keeps
    torch's fused kernels. Weight decay is decoupled in both (Loshchilov & Hutter 2019).

    Args:
        clipped: gradients are clipped before a step, so a GradScaler must unscale them before that; else the fused
            kernel does it in the step, and nobody waits for the device.
    """

    # torch wraps these for torch.compile, which nothing here goes through, and imports all of torch._dynamo for that.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    _state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    _adam_step = inspect.unwrap(torch.optim.Adam.step)

    # What the last step was told of infinite gradients, in which case the kernel did nothing; its way to the CPU.
    _told: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def __init__(self, params: Iterable[Any], *, eps: float, clipped: bool = False, **options: Any) -> None:
        super().__init__(params, eps=eps, **options)
        if clipped:
            self._step_supports_amp_scaling = False  # torch's name; Lightning refuses to clip where it is True
        for group in self.param_groups:
            group.setdefault("fairseq_eps", eps)
            group.setdefault("updates", 0)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:  # run first: a gradient of step t needs the eps of step t, and GradScaler may skip
            with torch.enable_grad():
                loss = closure()
        self._take_back_skipped()
        for group in self.param_groups:
            group["updates"] += 1
            group["eps"] = group["fairseq_eps"] / (1 - group["betas"][1] ** group["updates"]) ** 0.5
        with torch.no_grad():
            self._adam_step()
        infinite: torch.Tensor | None = getattr(self, "found_inf", None)  # GradScaler's, during a step
        if infinite is not None:
            copied = torch.cuda.Event() if infinite.is_cuda else None
            self._told = infinite.to("cpu", non_blocking=True), copied
            if copied:
                copied.record()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            return super().zero_grad(set_to_none=False)
        for group in self.param_groups:
            for parameter in group["params"]:
                row_gradients.clear(parameter)

    @property
    def unscales(self) -> bool:
        """Whether a step takes gradients as a GradScaler has scaled them."""
        return bool(getattr(self, "_step_supports_amp_scaling", False))

    def state_dict(self) -> dict[str, Any]:
        self._take_back_skipped()
        return self._state_dict()

    def _take_back_skipped(self) -> None:
        """Do not count the last step where it was none; by now the device has long said so."""
        if self._told:
            infinite, copied = self._told
            self._told = None
            if copied:
                copied.synchronize()
            for group in self.param_groups:
                group["updates"] -= bool(infinite)


def parameter_groups(model: torch.nn.Module, settings: OptimizerConfig, lr: float) -> list[dict[str, Any]]:
    """Trainable parameters with their learning rate and weight decay, those with the highest rate first.

    Without ``decay_biases``, biases and LayerNorms (1-d tensors) go without weight decay. With ``layer_decay`` d < 1,
    the head learns at ``lr``, the top layer at d * lr, the one below at d^2 * lr, ..., the embeddings slowest (as
    ELECTRA does, Clark et al. 2020).
    """
    layers = len(list(model.get_submodule("encoder.sentence_encoder.layers").children()))
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = settings.layer_decay ** (layers + 1 - _depth(name, layers))
        decayed = settings.decay_biases or parameter.ndim > 1
        groups.setdefault((scale, settings.weight_decay if decayed else 0.0), []).append(parameter)
    return [
        {"params": groups[scale, decay], "lr": lr * scale, "weight_decay": decay}
        for scale, decay in sorted(groups, reverse=True)
    ]


def _depth(name: str, layers: int) -> int:
    """0 for the embeddings, 1 to ``layers`` for the encoder's layers, ``layers + 1`` for the head."""
    layer = re.search(r"sentence_encoder\.layers\.(\d+)\.", name)
    if layer:
        return int(layer[1]) + 1
    return 0 if "sentence_encoder." in name else layers + 1


def polynomial_decay(update: int, warmup: int, total: int) -> float:
    """Factor on the peak learning rate at the 0-based ``update``: linear warm-up, then linear decay to 0.

    As in ``fairseq/optim/lr_scheduler/polynomial_decay_schedule.py``, the very first update has rate 0.
    """
    if warmup > 0 and update <= warmup:
        return update / warmup
    return max(0.0, 1 - (update - warmup) / max(1, total - warmup))
