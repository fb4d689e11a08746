"""Reports a training's evaluations and stops every process in the same step where the answer says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from lightning_glue.training.callbacks import dev_metrics
from lightning_glue.training.module import GlueModule


class Reporting(pl.Callback):
    """Reports each evaluation's selection metric, numbered from 1.

    Args:
        metric: name of the selection metric, for example ``dev/accuracy``.
        report: takes number and value, returns whether to stop; called in process 0 only, its answer reaches all.
        start: ``time.perf_counter()`` at which the training was asked for.
    """

    def __init__(self, metric: str, report: Callable[[int, float], bool], start: float) -> None:
        self.metric, self.report, self.start = metric, report, start
        self.evaluations = 0
        self.pruned = False
        self.first_step_seconds: float | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.first_step_seconds is None and trainer.global_step:
            self.first_step_seconds = time.perf_counter() - self.start

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        self.evaluations += 1
        stop = False
        if trainer.is_global_zero:
            assert isinstance(pl_module, GlueModule)
            stop = self.report(self.evaluations, dev_metrics(trainer, pl_module)[self.metric])
        if trainer.strategy.broadcast(stop):
            self.pruned = trainer.should_stop = True

    @property
    def state_key(self) -> str:
        return "Pruning"  # its name in checkpoints, since the first version

    def state_dict(self) -> dict[str, int]:
        return {"evaluations": self.evaluations, "pruned": self.pruned}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.evaluations = state["evaluations"]
        self.pruned = bool(state.get("pruned"))  # its process died before it could say so
