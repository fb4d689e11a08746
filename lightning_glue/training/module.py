"""The LightningModule: fairseq's RoBERTa, its loss, optimizer and metrics for one GLUE task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig

from lightning_glue.config import OptimizerConfig
from lightning_glue.data.batching import Packed
from lightning_glue.data.datamodule import Batch
from lightning_glue.inference.predict import product_type, scoring
from lightning_glue.model import cuda_graphs, row_gradients
from lightning_glue.model.roberta import RobertaModel, logits
from lightning_glue.tasks import Task
from lightning_glue.training import metrics, optimizer
from lightning_glue.training.loss import example_losses
from lightning_glue.training.metrics import SplitOutputs


@dataclass(frozen=True)
class Evaluation:
    """Outputs of one split in the order of its rows: outputs (examples, classes), targets as of ``Batch``."""

    outputs: torch.Tensor
    targets: torch.Tensor


@dataclass
class Origin:
    """What a checkpoint says of its run besides the weights, in plain values.

    Attributes:
        config: by dotted keys, without passwords.
        lineage: what the model comes from besides data, configuration and commit.
        data: digests of the splits, by name.
    """

    config: dict[str, Any] = field(default_factory=dict)
    task: str = ""
    lineage: dict[str, str] = field(default_factory=dict)
    run_id: str = ""
    data: dict[str, str] = field(default_factory=dict)


class GlueModule(pl.LightningModule):
    """Trains and evaluates ``model`` on ``task``.

    Args:
        lr: peak learning rate.
        replays: a step of a training is replayed from CUDA graphs, where these know the model and its device.
        origin: saved with every checkpoint under ``lightning_glue``.
    """

    def __init__(
        self,
        model: RobertaModel,
        task: Task,
        settings: OptimizerConfig,
        lr: float,
        origin: Origin | None = None,
        *,
        replays: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.task, self.settings, self.lr = model, task, settings, lr
        self.origin, self.replays = origin or Origin(), replays
        self.dev_outputs = [SplitOutputs(task.num_outputs, task.is_regression, task.multilabel) for _ in task.dev]
        self.evaluations: dict[str, Evaluation] = {}  # the last evaluation, by split name
        self.diverged = ""  # where the weights ceased to be numbers
        self._scoring: Callable[[Packed], torch.Tensor] | None = None  # during an evaluation
        self._graphed: cuda_graphs.GraphedTraining | None = None  # the forward of a step, during a training on a GPU

    def forward(self, batch: Packed) -> torch.Tensor:
        """Head outputs (examples, classes)."""
        return logits(self.model, batch)

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        losses = example_losses(self.task, (self._graphed or self)(batch), batch["targets"], weighted=True)
        return losses.sum() * batch["loss_weight"]

    def on_train_start(self) -> None:
        dtype = product_type(self.trainer.precision, self.device)
        if self.replays and cuda_graphs.supports(self.model, dtype):
            self._graphed = cuda_graphs.GraphedTraining(self.model, dtype)

    def on_train_end(self) -> None:
        self._graphed = None

    def on_validation_epoch_start(self) -> None:
        for collector in self.dev_outputs:
            collector.start(self.device)
        self._scoring = scoring(self.model, self.trainer.precision)

    def validation_step(self, batch: Batch, _: int, dataloader_idx: int = 0) -> None:
        if batch["loss_weight"] and self._scoring:
            self.dev_outputs[dataloader_idx].update(batch["rows"], self._scoring(batch), batch["targets"])

    def on_validation_epoch_end(self) -> None:
        self._scoring = None
        for split, collector in zip(self.task.dev, self.dev_outputs):
            outputs, targets = collector.compute()
            self.evaluations[split.name] = Evaluation(outputs, targets)
            values = metrics.compute(self.task, outputs, targets)
            values["loss"] = metrics.mean_loss(example_losses(self.task, outputs, targets, weighted=False))
            named = {f"{split.name}/{name}": value for name, value in values.items()}
            self.log_dict(named, logger=False, add_dataloader_idx=False)  # TrainingMonitor logs them, with their step

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        if self.trainer.world_size == 1 and self.device.type == "cpu":  # a GPU clears a table in no time
            row_gradients.keep(self.model.encoder.sentence_encoder.embed_tokens)
        total = int(self.trainer.estimated_stepping_batches)
        warmup = round(self.settings.warmup_ratio * total)
        adam = optimizer.FairseqAdamW(
            optimizer.parameter_groups(self.model, self.settings, self.lr),
            lr=self.lr,
            betas=tuple(self.settings.betas),
            eps=self.settings.eps,
            fused=True,
            clipped=bool(self.trainer.gradient_clip_val),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda update: optimizer.polynomial_decay(update, warmup, total)
        )
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lightning_glue"] = asdict(self.origin)
        checkpoint["diverged"] = self.diverged

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.diverged = checkpoint.get("diverged", "")
