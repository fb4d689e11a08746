"""What Lightning is changed in is there, and does what it is changed for; an upgrade that differs fails here."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

from lightning_glue.training import lightning_internals as internals

BATCHES = 5


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.layer(batch).sum()

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.layer(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(*callbacks: pl.Callback, epochs: int = 1, folder: Path | None = None) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[*callbacks], logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip


def fit(one: pl.Trainer, checkpoint: Path | None = None) -> None:
    data = DataLoader(torch.arange(float(BATCHES)).reshape(-1, 1))
    one.fit(Line(), data, DataLoader(torch.ones(2, 1)), ckpt_path=checkpoint)


class Handler(pl.Callback):
    """What handles a scheduler's signals while Lightning trains."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = signal.getsignal(signal.SIGTERM)


def test_our_signal_handlers_stay() -> None:
    def ours(number: int, frame: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, ours)
    try:
        theirs, kept = Handler(), Handler()
        fit(trainer(theirs))
        one = trainer(kept)
        internals.keep_signal_handlers(one)
        fit(one)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert theirs.found is not ours  # or there is nothing to keep them from any more
    assert kept.found is ours


class World(pl.Callback):
    """Makes Lightning see a second process, as long as it asks."""

    def __init__(self, silent: bool) -> None:
        self.silent = silent

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.silent:
            internals.ask_nobody_about_sigterm(trainer)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("silent", [False, True])
def test_nobody_is_asked_about_sigterm(group: None, monkeypatch: pytest.MonkeyPatch, silent: bool) -> None:
    asked = []
    monkeypatch.setattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor", lambda loop: asked.append(loop))
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    fit(trainer(World(silent)))
    assert len(asked) == (0 if silent else BATCHES)


def test_the_rank_is_the_one_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    monkeypatch.setattr(rank_zero_only, "rank", rank_zero_only.rank)
    for rank in (1, 0):
        internals.speak_as(rank)
        rank_zero_only(said.append)(rank)
    assert said == [0]


class Saver(pl.Callback):
    """Saves before the batch ``at`` of the second epoch, and says where that is."""

    def __init__(self, path: Path, at: int) -> None:
        self.path, self.at = path, at
        self.position: tuple[int, int] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == (1, self.at):
            trainer.save_checkpoint(self.path)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self.position = internals.position(trainer)
        internals.set_position(checkpoint, *self.position, int(trainer.num_training_batches))


class Seen(pl.Callback):
    def __init__(self) -> None:
        self.batches: list[tuple[int, int, int]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append((trainer.current_epoch, batch_idx, internals.batches_begun(trainer)))


def counters(part: dict[str, Any], path: str = "") -> dict[str, int]:
    """Every number below a loop's state, by path."""
    found: dict[str, int] = {}
    for key, value in part.items():
        if isinstance(value, dict):
            found |= counters(value, f"{path}{key}.")
        elif isinstance(value, int):
            found[path + key] = int(value)
    return found


@pytest.mark.parametrize("at", [2, 4])
def test_a_training_goes_on_with_the_batch_it_stopped_before(tmp_path: Path, at: int) -> None:
    whole = Seen()
    saver = Saver(tmp_path / "one.ckpt", at)
    fit(trainer(saver, whole, epochs=3))
    assert saver.position == (1, at)
    resumed = Seen()
    fit(trainer(resumed, epochs=3), tmp_path / "one.ckpt")
    assert resumed.batches == whole.batches[BATCHES + at :]


def test_all_of_lightnings_counters_are_set(tmp_path: Path) -> None:
    fit(trainer(Saver(tmp_path / "one.ckpt", 2), epochs=2))
    loops = torch.load(tmp_path / "one.ckpt", weights_only=True)["loops"]["fit_loop"]
    kinds = ("ready", "started", "processed", "completed")
    batches = {"total": BATCHES + 2, "current": 2}
    expected = {f"epoch_loop.batch_progress.{part}.{kind}": n for part, n in batches.items() for kind in kinds}
    expected |= {f"epoch_loop.val_loop.batch_progress.{part}.{kind}": 0 for part in batches for kind in kinds}
    expected |= {f"epoch_progress.{part}.{kind}": 1 + (kind in kinds[:2]) for part in batches for kind in kinds}
    expected |= {f"epoch_loop.{name}is_last_batch": 0 for name in ("batch_progress.",)}
    found = counters(loops)
    assert expected.items() <= found.items()
    known = ("epoch_progress.", "epoch_loop.")  # a loop of another name would have to be set, too
    assert all(name.startswith(known) for name in found), sorted(found)
    assert os.path.getsize(tmp_path / "one.ckpt")
