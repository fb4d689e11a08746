"""A callback that says how far a training is, for the table of a benchmark."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from lightning_glue.pipeline.progress import Progress, write_progress
from lightning_glue.training.callbacks import dev_metrics
from lightning_glue.training.module import GlueModule

_SECONDS = 2.0  # between two times


class Pulse(pl.Callback):
    """Writes :class:`~lightning_glue.pipeline.progress.Progress` every two seconds, in process 0; waits for no device.

    Args:
        folder: of the job.
        metric: name of the selection metric.
        batch: examples in an optimizer step.
    """

    def __init__(self, folder: Path, metric: str, batch: int) -> None:
        self.folder, self.metric, self.batch = folder, metric, batch
        self.value: float | None = None
        self.rate = 0.0
        self._said = (0.0, 0)  # when, and the step then

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._said = (time.monotonic(), trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if time.monotonic() - self._said[0] > _SECONDS:
            self._say(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if time.monotonic() - self._said[0] > _SECONDS and trainer.state.fn == "fit":
            self._say(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and isinstance(pl_module, GlueModule):
            self.value = dev_metrics(trainer, pl_module).get(self.metric)
            self._say(trainer)

    def _say(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        (before, step), moment = self._said, time.monotonic()
        self._said = (moment, trainer.global_step)
        if steps_done := trainer.global_step - step:  # else it evaluates
            self.rate = steps_done * self.batch / max(moment - before, 1e-9)
        steps = int(trainer.estimated_stepping_batches)
        write_progress(self.folder, Progress(trainer.global_step, steps, self.rate, self.value, time.time()))
