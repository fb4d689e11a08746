"""Training curves: loss, learning rate, gradient norm and throughput, and a line on the terminal per evaluation."""

from __future__ import annotations

import math
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from lightning_glue.data.batching import padded_size
from lightning_glue.data.datamodule import Batch
from lightning_glue.training.finite import FirstNonFinite, all_finite
from lightning_glue.training.module import Evaluation, GlueModule


def dev_metrics(trainer: pl.Trainer, module: GlueModule) -> dict[str, float]:
    """The last evaluation's metrics, for example ``dev/accuracy``."""
    names = {split.name for split in module.task.dev}
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.split("/")[0] in names}


class TrainingMonitor(pl.Callback):
    """Logs ``train/*`` every ``every`` optimizer steps and after the last one, and the dev metrics at their step.

    Loss, examples/s, real tokens/s and padding ratio are of all processes and of the whole window since the last
    point, evaluations and what lies between two epochs left out of the time; the gradient norm and the learning rate
    are those of its last step. A training that has diverged ends here, with the examples that were first.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.grad_norm: torch.Tensor | None = None
        self._last: tuple[list[float], float] = [0.0, 0.0, 0.0], 0.0  # the last point's window, and its seconds
        self._resumed: list[Any] | None = None
        self._paused: float | None = None  # since when the clock stands still
        self._first = FirstNonFinite()

    def _reset(self, device: torch.device) -> None:
        # Counts stay with the host: taking them to a GPU in each step would have it wait for the one before.
        self.loss = torch.zeros(1, dtype=torch.float64, device=device)
        self.counts = torch.zeros(4, dtype=torch.float64)
        self.since = time.perf_counter()

    @property
    def window(self) -> torch.Tensor:
        """Loss, micro-batches, examples, real tokens, tokens with padding, to be summed over processes in one call."""
        return torch.cat([self.loss, self.counts.to(self.loss.device)])

    def _pause(self) -> None:
        if self._paused is None:
            self._paused = time.perf_counter()

    def _is_point(self, step: int) -> bool:
        return step % self.every == 0 or step >= self.steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps = trainer.estimated_stepping_batches
        self._reset(pl_module.device)
        if self._resumed:
            windows, elapsed = self._resumed
            same = len(windows) == trainer.world_size
            mine = windows[trainer.global_rank] if same else windows.sum(0) * trainer.is_global_zero
            self.loss += mine[:1].to(pl_module.device)
            self.counts += mine[1:].cpu()
            self.since -= elapsed
        self._pause()
        self.sums = -self.window[:2]  # loss and micro-batches since the last evaluation, of this process

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        window = self.window
        windows = trainer.strategy.all_gather(window).reshape(-1, len(window)).cpu()
        checkpoint["window"] = [windows, (self._paused or time.perf_counter()) - self.since]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._resumed = checkpoint["window"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self._paused is not None:
            self.since += time.perf_counter() - self._paused
            self._paused = None

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self._is_point(trainer.global_step + 1):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler and optimizer.unscales:
                self.grad_norm /= scaler.get_scale()
        if trainer.precision != "16-mixed":  # there such a step is left out
            self._first.add_gradient(trainer.global_step + 1, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, GlueModule)
        counted = len(batch["rows"]) if batch["loss_weight"] else 0
        self.loss.add_(outputs["loss"].detach(), alpha=trainer.accumulate_grad_batches)
        self.counts += torch.tensor([1.0, counted, len(batch["tokens"]), padded_size(batch)], dtype=torch.float64)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        self._first.add(trainer.global_step + (not stepped), batch, outputs["loss"])
        if stepped:
            self._first.end_step(trainer.global_step)
        if stepped and self._is_point(trainer.global_step):
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GlueModule)
        if not pl_module.diverged and not all_finite(pl_module):  # since the last point
            self._diverge(trainer, pl_module, f"step {trainer.global_step}")

    def _diverge(self, trainer: pl.Trainer, module: GlueModule, where: str) -> None:
        task, train = module.task, module.task.splits[0]
        file = f"{task.directory}/{train.file_name}"
        if task.own:
            file = f"{train.path} (those of {train.part})" if train.part else train.path
        first = self._first.describe(trainer, file)
        module.diverged = f"{where}; {first}" if first else where
        trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GlueModule)
        for logger in trainer.loggers:
            logger.log_metrics(dev_metrics(trainer, pl_module), step=trainer.global_step)

    def recent(self, trainer: pl.Trainer) -> tuple[float | None, float | None]:
        """Mean loss and examples/s since the point before the last, as far as this process knows them."""
        (loss, batches, examples), seconds = self._last
        now = [trainer.world_size * value for value in self.window[:3].tolist()]
        elapsed = (self._paused or time.perf_counter()) - self.since if now[1] else 0.0
        loss, batches, examples, seconds = loss + now[0], batches + now[1], examples + now[2], seconds + elapsed
        return (loss / batches, examples / seconds) if batches and seconds else (None, None)

    def loss_since_evaluation(self, trainer: pl.Trainer) -> float | None:
        """Mean training loss since the last call, or since this process began; None of no step. For all processes."""
        loss, batches = trainer.strategy.reduce(self.sums + self.window[:2], reduce_op="sum").tolist()
        self.sums = -self.window[:2]
        return loss / batches if batches else None

    def _log(self, trainer: pl.Trainer, pl_module: GlueModule) -> None:
        window = self.window
        self.sums += window[:2]
        window = trainer.strategy.reduce(window, reduce_op="sum")
        seconds = time.perf_counter() - self.since
        loss, batches, examples, real, padded = window.tolist()
        self._last = [loss, batches, examples], seconds
        if not math.isfinite(loss) and not all_finite(pl_module):  # with fp16, a loss alone may be
            self._diverge(trainer, pl_module, f"step {trainer.global_step}, loss {loss / batches}")
        self._first.forget()
        values = {
            "train/loss": loss / batches,
            "train/lr": trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0],
            "train/examples_per_second": examples / seconds,
            "train/tokens_per_second": real / seconds,
            "train/padding_ratio": 1 - real / padded,
        }
        if self.grad_norm is not None:
            values["train/grad_norm"] = float(self.grad_norm)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._reset(pl_module.device)


class EvaluateAtTheEnd(pl.Callback):
    """Has the weights evaluated after the last step, which may come between two evaluations, as fairseq does."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps = trainer.estimated_stepping_batches

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step >= self.steps:
            trainer.should_stop = True  # Lightning evaluates where it is told to stop


class EvaluationLine(pl.Callback):
    """Prints each evaluation's metrics, and the mean training loss before it, on a line that stays."""

    def __init__(self, monitor: TrainingMonitor) -> None:
        self.monitor = monitor
        self.start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GlueModule)
        loss = self.monitor.loss_since_evaluation(trainer)
        values = {} if loss is None else {"train/loss": loss}
        values |= dev_metrics(trainer, pl_module)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        elapsed = time.strftime("%H:%M:%S", time.gmtime(time.perf_counter() - self.start))
        per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        done, whole = (
            f"{steps / per_epoch:.3g}" for steps in (trainer.global_step, trainer.estimated_stepping_batches)
        )
        rank_zero_only(print)(f"epoch {done}/{whole}  step {trainer.global_step}  {shown}  {elapsed}", flush=True)


class BestEvaluation(pl.Callback):
    """Keeps the evaluation with the highest selection metric: its values, outputs and optimizer step."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.values: dict[str, float] = {}
        self.evaluations: dict[str, Evaluation] = {}
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        outputs = {split: [e.outputs.cpu(), e.targets.cpu()] for split, e in self.evaluations.items()}
        return {"values": self.values, "step": self.step, "outputs": outputs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values, self.step = state["values"], state["step"]
        self.evaluations = {split: Evaluation(*tensors) for split, tensors in state["outputs"].items()}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GlueModule)
        values = dev_metrics(trainer, pl_module)
        if not self.values or values[self.metric] > self.values[self.metric]:
            self.values, self.evaluations, self.step = values, dict(pl_module.evaluations), trainer.global_step
