"""Progress of a training as a whole: two lines at the bottom of a terminal, else a line a minute for a log file."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from lightning_glue.training.callbacks import BestEvaluation, TrainingMonitor
from lightning_glue.utils.console import LINE_SECONDS, clock
from lightning_glue.utils.logs import log

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

_PICTURE_SECONDS = 0.5  # between two pictures on a terminal; each waits for the device


@dataclass(frozen=True)
class Standing:
    """How far a training is.

    Attributes:
        step, steps: optimizer steps done, and of the whole run.
        epoch, epochs: the one at work, counted from 1, and how many the run begins.
        loss: mean of the last steps; None before the first.
        rate: examples per second of training.
        best: name and value of the selection metric of the best evaluation; None before the first.
        left: seconds until the last step, evaluations included; None as long as nobody knows.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    lr: float
    loss: float | None = None
    rate: float | None = None
    best: tuple[str, float] | None = None
    left: float | None = None

    @property
    def place(self) -> list[str]:
        return [f"step {self.step}/{self.steps}", f"epoch {self.epoch}/{self.epochs}"]

    @property
    def values(self) -> list[str]:
        loss = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        rate = [] if self.rate is None else [f"{self.rate:,.0f} examples/s"]
        best = [f"best {self.best[0]} {self.best[1]:.4f}"] if self.best else []
        return [*loss, f"lr {self.lr:.2g}", *rate, *best]

    @property
    def time_left(self) -> list[str]:
        return [] if self.left is None else [f"{clock(self.left)} left"]

    def line(self) -> str:
        return "  ".join([*self.place, *self.values, *self.time_left])

    def picture(self, doing: str) -> RenderableType:
        """Two lines of a terminal, cut where it is narrow."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        first = Table.grid(padding=(0, 2, 0, 0), expand=True)
        bar = ProgressBar(total=self.steps, completed=self.step)
        cells: list[str | ProgressBar] = [doing, bar, *self.place, *self.time_left]
        for cell in cells:
            first.add_column(no_wrap=True, ratio=1 if cell is bar else None)
        first.add_row(*cells)
        return Group(first, Text("  ".join(self.values), no_wrap=True, overflow="ellipsis"))


def seconds_left(now: tuple[float, int], first: tuple[float, int], steps: int) -> float | None:
    """From two moments, each a time and the steps done by then, the time that the rest of ``steps`` takes."""
    done = now[1] - first[1]
    return (steps - now[1]) * (now[0] - first[0]) / done if done > 0 else None


class RunProgress(pl.Callback):
    """Shows the :class:`Standing` of process 0.

    Args:
        monitor: has loss and rate; stands before this one, as ``best`` does.
        draws: on a terminal, which standard output is; else lines of the logger.
        every: seconds between two of these, and before the first.
    """

    def __init__(
        self, monitor: TrainingMonitor, best: BestEvaluation, *, draws: bool, every: float = LINE_SECONDS
    ) -> None:
        self.monitor, self.best, self.draws = monitor, best, draws
        self.every = _PICTURE_SECONDS if draws else every
        self.live: Live | None = None
        self._first: tuple[float, int] | None = None  # without the first step, which takes longer
        self._next = 0.0
        self._evaluated = 0  # batches

    def standing(self, trainer: pl.Trainer) -> Standing:
        steps = int(trainer.estimated_stepping_batches)
        per_epoch = max(1, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
        step, epochs = trainer.global_step, math.ceil(steps / per_epoch)
        loss, rate = self.monitor.recent(trainer)
        return Standing(
            step,
            steps,
            min(max(1, math.ceil(step / per_epoch)), epochs),
            epochs,
            float(trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0]),
            loss,
            rate,
            (self.best.metric, self.best.values[self.best.metric]) if self.best.values else None,
            seconds_left((time.monotonic(), step), self._first, steps) if self._first else None,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._next = time.monotonic() + self.every
        if self.draws:
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(), auto_refresh=False, transient=True)
            self.live.start()
            self.live.console.show_cursor(True)  # whatever ends the process

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._first is None and trainer.global_step:
            self._first = time.monotonic(), trainer.global_step
        self._show(trainer, "training")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluated = 0

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.state.fn != "fit":
            return
        self._evaluated += 1
        self._show(trainer, f"evaluating {self._evaluated / max(1, sum(trainer.num_val_batches)):.0%}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _show(self, trainer: pl.Trainer, doing: str) -> None:
        if not trainer.is_global_zero or time.monotonic() < self._next:
            return
        standing = self.standing(trainer)
        if self.live:
            self.live.update(standing.picture(doing), refresh=True)
        elif not self.draws:
            log.info("%s", standing.line() if doing == "training" else f"{doing}  {standing.line()}")
        self._next = time.monotonic() + self.every

    def _stop(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None
