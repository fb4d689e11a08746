"""Which examples made a training's numbers cease to be such: noted on the device in every step, asked for at need."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import pytorch_lightning as pl
import torch

from lightning_glue.data.datamodule import Batch

_SMALL = 1 << 12  # elements of a tensor whose gradient is looked at in every step: biases and norms, one to each layer
_MOST = 1 << 14  # micro-batches that are remembered
_SHOWN = 32  # rows that are named


def all_finite(module: torch.nn.Module) -> bool:
    """Whether all weights are numbers; waits for the device."""
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


@dataclass
class _Step:
    """One micro-batch of this process: its optimizer step, its rows on the device, its loss, a part of the gradient."""

    step: int
    rows: torch.Tensor
    loss: torch.Tensor
    gradient: torch.Tensor | None = None


class FirstNonFinite:
    """The micro-batches since the last look, so that the first whose loss or gradient was none can be named.

    Nothing here waits for the device before :meth:`describe`.
    """

    def __init__(self) -> None:
        self._steps = deque[_Step](maxlen=_MOST)
        self._gradient: tuple[int, torch.Tensor] | None = None

    def add(self, step: int, batch: Batch, loss: torch.Tensor) -> None:
        """Note a micro-batch whose gradient goes into optimizer step ``step``."""
        self._steps.append(_Step(step, batch["rows"], loss.detach()))

    def add_gradient(self, step: int, module: torch.nn.Module) -> None:
        """Note the gradient of step ``step``, of whose micro-batches the last is still to be added."""
        small = [p.grad for p in module.parameters() if p.grad is not None and p.numel() <= _SMALL]
        self._gradient = (step, torch.nn.utils.get_total_norm(small)) if small else None

    def end_step(self, step: int) -> None:
        """All micro-batches of the step are added."""
        if self._gradient and self._gradient[0] == step:
            for one in self._steps:
                one.gradient = self._gradient[1] if one.step == step else one.gradient
        self._gradient = None

    def forget(self) -> None:
        """All losses so far were numbers. The last step is kept: its gradient shows in the next one's."""
        while len(self._steps) > 1 and self._steps[0].step != self._steps[-1].step:
            self._steps.popleft()

    def first(self) -> tuple[int, list[int], str] | None:
        """Step, rows of the split and what was no number, ``loss`` or ``gradient``; None where all were numbers."""
        for one in self._steps:
            if not math.isfinite(float(one.loss)):
                return one.step, one.rows.tolist(), "loss"
            if one.gradient is not None and not math.isfinite(float(one.gradient)):
                rows = [row for other in self._steps if other.step == one.step for row in other.rows.tolist()]
                blamed = [other for other in self._steps if other.step == one.step and not _is_finite(other.loss)]
                return (one.step, blamed[0].rows.tolist(), "loss") if blamed else (one.step, rows, "gradient")
        return None

    def describe(self, trainer: pl.Trainer, file: str) -> str:
        """The first of all processes, in words; empty where it is not among the steps noted. All processes call it."""
        found = self.first()
        if trainer.world_size > 1:
            everyone: list[tuple[int, list[int], str] | None] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, found)
            known = [one for one in everyone if one]
            found = min(known, key=lambda one: (one[0], one[2] != "loss"), default=None)
            if found and found[2] == "gradient":  # which is that of all processes' examples
                found = (found[0], sorted({row for one in known if one[0] == found[0] for row in one[1]}), "gradient")
        return in_words(*found, file) if found else ""


def _is_finite(value: torch.Tensor) -> bool:
    return math.isfinite(float(value))


def in_words(step: int, rows: list[int], what: str, file: str) -> str:
    """Args: rows: from 0, as the split counts; what is said counts from 1, as an editor does."""
    shown = ", ".join(str(row + 1) for row in sorted(rows)[:_SHOWN])
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"its {what} was first no number at step {step}, with rows {shown}{more} of {file}"
