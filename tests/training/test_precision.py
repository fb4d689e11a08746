"""Clipping, mixed precision and the counting of steps, in every combination that the optimizer knows; evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.plugins import MixedPrecision, Precision

from lightning_glue import config as configuration
from lightning_glue.data.batching import MicroBatch
from lightning_glue.data.datamodule import GlueDataModule
from lightning_glue.model.roberta import stock_logits
from lightning_glue.training.build import Warm, build
from lightning_glue.training.callbacks import TrainingMonitor
from lightning_glue.training.module import GlueModule
from lightning_glue.training.optimizer import FairseqAdamW

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-3, "weight_decay": 0.1}


@pytest.mark.parametrize("clipped", [False, True])
def test_a_step_that_overflowed_is_none(clipped: bool) -> None:
    """Under a GradScaler weights and counts are those of the steps with finite gradients, saved in between or not."""
    torch.manual_seed(0)
    start = torch.randn(8)
    scaled, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    first = FairseqAdamW([scaled], fused=True, clipped=clipped, **OPTIONS)
    second = FairseqAdamW([plain], fused=True, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(8):
        gradient = torch.randn(8)
        overflows = step in (0, 1, 5, 7)
        scaler.scale((scaled * gradient).sum()).backward()
        if overflows:
            scaled.grad[3] = torch.inf
        if clipped:
            scaler.unscale_(first)
            torch.nn.utils.clip_grad_norm_([scaled], 0.5)
        scaler.step(first)
        scaler.update()
        first.zero_grad()
        if not overflows:
            plain.grad = gradient
            if clipped:
                torch.nn.utils.clip_grad_norm_([plain], 0.5)
            second.step()
        torch.testing.assert_close(scaled, plain, rtol=0, atol=0)
        if step == 5:
            first.load_state_dict(first.state_dict())
    (saved,), (expected,) = first.state_dict()["param_groups"], second.state_dict()["param_groups"]
    assert saved["updates"] == expected["updates"] == 4
    assert first.state[scaled]["step"] == second.state[plain]["step"]


class Norms(pl.Callback):
    """The norm of the gradients that each step took, but for the last one."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.taken.append(float(torch.nn.utils.get_total_norm(gradients)))


class Said(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "train/grad_norm" in metrics:
            self.norms.append(metrics["train/grad_norm"])


@pytest.fixture(scope="module")
def warm() -> Warm:
    return Warm()


def precision_of(name: str) -> Precision:
    if name == "32-true":
        return Precision()
    # By itself Lightning takes bf16 on a CPU where fp16 is asked for.
    return MixedPrecision(name, "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8) if name == "16-mixed" else None)  # type: ignore[arg-type]


def built(warm: Warm, bpe_dir: Path, *overrides: str) -> tuple[GlueModule, GlueDataModule]:
    """A tiny model on WNLI's sample, the same each time."""
    chosen = configuration.compose(
        [f"data.bpe_dir={bpe_dir}", "trainer.gpus=0", "data.batch_size=8", *overrides],
        task="WNLI",
        model="tiny",
        data="sample",
    )
    pl.seed_everything(1, verbose=False)
    module, data, _ = build(chosen, warm)
    return module, data


def make_trainer(**options: Any) -> pl.Trainer:
    """Lightning's trainer on the CPU, silent, that keeps nothing."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def norms(name: str, clip: float, warm: Warm, bpe_dir: Path) -> tuple[list[float], list[float]]:
    """The gradients' norms as logged, and as the steps took them."""
    module, data = built(warm, bpe_dir, "model.dropout=0")
    said, taken = Said(), Norms()
    trainer = make_trainer(
        max_steps=3,
        limit_val_batches=0,
        gradient_clip_val=clip or None,
        plugins=[precision_of(name)],
        logger=said,
        callbacks=[TrainingMonitor(1), taken],
    )
    trainer.fit(module, data)
    assert trainer.global_step == 3
    return said.norms, taken.taken


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed", "16-mixed"])
def test_gradients_are_clipped_and_their_norm_is_that_of_the_loss(
    name: str, warm: Warm, cache: Path, bpe_dir: Path
) -> None:
    whole, _ = norms("32-true", 0.0, warm, bpe_dir)
    limit = min(whole) / 2
    logged, taken = norms(name, limit, warm, bpe_dir)
    assert logged[0] == pytest.approx(whole[0], rel=0.05)
    assert taken == pytest.approx([limit] * 2, rel=1e-3)
    unclipped, _ = norms(name, 0.0, warm, bpe_dir)
    assert unclipped[0] == pytest.approx(logged[0], rel=1e-5)


class FairseqsForward(pl.Callback):
    """How far each evaluation's outputs are from those of fairseq's forward with the weights of that moment."""

    def __init__(self) -> None:
        self.distances: list[float] = []
        self.first: list[torch.Tensor] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, GlueModule)
        name = pl_module.task.dev[0].name
        split = trainer.datamodule.splits[name]  # type: ignore[attr-defined]
        batch = split[MicroBatch(np.arange(len(split)), 1.0)]
        expected = stock_logits(pl_module.model, batch).float()
        outputs = pl_module.evaluations[name].outputs.float()
        self.distances.append(float((outputs - expected).abs().max()))
        self.first.append(expected[0])


@pytest.mark.parametrize(("name", "tolerance"), [("32-true", 1e-5), ("bf16-mixed", 2e-2)])
def test_an_evaluation_is_of_the_weights_as_they_are(
    name: str, tolerance: float, warm: Warm, cache: Path, bpe_dir: Path
) -> None:
    module, data = built(warm, bpe_dir, "optimizer.lr=0.01")
    seen = FairseqsForward()
    trainer = make_trainer(
        max_steps=6, val_check_interval=2, precision=name, logger=False, callbacks=[seen], num_sanity_val_steps=0
    )
    trainer.fit(module, data)
    assert len(seen.distances) == 3
    assert max(seen.distances) < tolerance
    assert float((seen.first[0] - seen.first[-1]).abs().max()) > tolerance  # training has moved them
