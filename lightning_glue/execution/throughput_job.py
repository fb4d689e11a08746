"""The training whose speed is measured: a few seconds of optimizer steps, at the same time as those beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytorch_lightning as pl

from lightning_glue import config as configuration
from lightning_glue.execution.job import Job, Outcome, Report
from lightning_glue.model.roberta import drops_layers
from lightning_glue.training.build import build
from lightning_glue.training.trainer import make_trainer, prepare_process

_WARM_UP = 3  # micro-batches before the others are waited for: kernels are made, memory is taken
_SECONDS = 3.0


class _Measured(BaseException):
    """Ends the training; an exception of this kind alone leaves Lightning without another evaluation."""


class _Stopwatch(pl.Callback):
    """Attributes: rate: examples a second of this process, once it is known."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.rate: float | None = None
        self.began, self.examples = 0.0, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if not self.began and batch_idx >= min(_WARM_UP, trainer.num_training_batches - 1):
            self.report(1, 0.0)  # until all are here
            self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.began:
            return
        if module.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        self.examples += len(batch["rows"])
        taken = time.perf_counter() - self.began
        if taken >= _SECONDS or batch_idx + 1 == trainer.num_training_batches:
            self.rate = self.examples / taken
            raise _Measured


def measure(job: Job, report: Report, tell_run: Callable[[str], None]) -> Outcome:
    """Train for a few seconds, or to the end of an epoch that is shorter; ``value`` is in examples a second.

    Raises:
        UserError: nothing can be trained with this configuration on this machine.
    """
    config = configuration.unflatten(job.config)
    config.trainer.max_steps = -1
    prepare_process(config)
    module, data, _ = build(config)
    stopwatch = _Stopwatch(report)
    trainer = make_trainer(config, [stopwatch], None, some_unused=drops_layers(module.model))
    with suppress(_Measured):
        trainer.fit(module, data)
    return Outcome(stopwatch.rate)
