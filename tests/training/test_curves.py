"""The points of the training curves: each step counts in one of them, evaluations count in none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import DummyLogger

from lightning_glue import config as configuration
from lightning_glue.training import callbacks
from lightning_glue.training.build import Warm, build
from lightning_glue.training.callbacks import EvaluateAtTheEnd, TrainingMonitor

BATCHES, BATCH = 5, 8


class Points(DummyLogger):
    """What is logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.train: dict[int, dict[str, float]] = {}
        self.dev: list[int] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "train/loss" in metrics:
            self.train[step or 0] = metrics
        if "dev/loss" in metrics:
            self.dev.append(step or 0)


class Clock(pl.Callback):
    """A second for each batch, a hundred for each evaluation, a thousand from one epoch to the next."""

    now = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        self.now += 1

    def on_validation_batch_start(self, *_: Any, **more: Any) -> None:
        self.now += 100

    def on_train_epoch_start(self, *_: Any) -> None:
        self.now += 1000


@pytest.fixture(scope="module")
def warm() -> Warm:
    return Warm()


def curves(every: int, interval: float, steps: int, warm: Warm, bpe: Path, patch: pytest.MonkeyPatch) -> Points:
    given = [
        f"data.bpe_dir={bpe}",
        "trainer.gpus=0",
        f"data.batch_size={BATCH}",
        "model.dropout=0",
        "model.attention_dropout=0",
    ]
    pl.seed_everything(1, verbose=False)
    module, data, _ = build(configuration.compose(given, task="WNLI", model="tiny", data="sample"), warm)
    points, clock = Points(), Clock()
    patch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=4,
        max_steps=steps,
        limit_train_batches=BATCHES,
        limit_val_batches=1,
        val_check_interval=interval,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=points,
        callbacks=[clock, TrainingMonitor(every), EvaluateAtTheEnd()],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    return points


def test_every_step_is_in_one_point_and_no_evaluation_in_any(
    warm: Warm, cache: Path, bpe_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = curves(1, 1.0, 13, warm, bpe_dir, monkeypatch)
    assert sorted(each.train) == list(range(1, 14))
    assert each.dev == [5, 10, 13]
    for interval, evaluated in ((1.0, [5, 10, 13]), (2, [2, 4, 7, 9, 12, 13])):
        found = curves(3, interval, 13, warm, bpe_dir, monkeypatch)
        assert found.dev == evaluated
        assert sorted(found.train) == [3, 6, 9, 12, 13]
        begin = 0
        for end in sorted(found.train):
            losses = [each.train[step]["train/loss"] for step in range(begin + 1, end + 1)]
            assert found.train[end]["train/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
            assert found.train[end]["train/examples_per_second"] == BATCH
            begin = end
        assert found.train[13]["train/grad_norm"] == each.train[13]["train/grad_norm"]


def test_the_end_of_the_last_epoch_is_evaluated_once(
    warm: Warm, cache: Path, bpe_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert curves(10, 1.0, -1, warm, bpe_dir, monkeypatch).dev == [5, 10, 15, 20]
    assert curves(10, 3, -1, warm, bpe_dir, monkeypatch).dev == [3, 8, 13, 18, 20]
