"""All that reaches into Lightning where it offers no way: an upgrade is checked against this file and its test."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only


def speak_as(rank: int) -> None:
    """Tell Lightning's ``rank_zero_only`` which process this is; by itself it reads SLURM's variables."""
    rank_zero_only.rank = rank  # type: ignore[attr-defined]  # an attribute of the function


def keep_signal_handlers(trainer: pl.Trainer) -> None:
    """Leave the handlers of signals as they are: Lightning's own talk to other processes in the middle of a step."""
    trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]


def ask_nobody_about_sigterm(trainer: pl.Trainer) -> None:
    """Before every batch Lightning asks process 0 about SIGTERM and waits for the answer; it does so no more."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def _nothing() -> None:
    pass


def batches_begun(trainer: pl.Trainer) -> int:
    """Batches this process has begun since the training's start."""
    return trainer.fit_loop.total_batch_idx


def position(trainer: pl.Trainer) -> tuple[int, int]:
    """Epochs done, and batches done in the next one."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    ended = done >= trainer.num_training_batches
    return (trainer.current_epoch + 1, 0) if ended else (trainer.current_epoch, done)


def set_position(checkpoint: dict[str, Any], epochs: int, batches: int, batches_per_epoch: int) -> None:
    """Set a checkpoint's counters to what they are between two batches, or before an epoch.

    Lightning's stop at the hook that saves, and it guesses from them how to go on, not always rightly.

    Args:
        epochs, batches: of :func:`position`.
    """
    loops = checkpoint["loops"]["fit_loop"]
    _set(loops["epoch_progress"], epochs, epochs)
    if batches:
        for part in loops["epoch_progress"].values():
            part.update(ready=epochs + 1, started=epochs + 1)
    _set(loops["epoch_loop.batch_progress"], epochs * batches_per_epoch + batches, batches)
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False
    _set(loops["epoch_loop.val_loop.batch_progress"], 0, 0)


def _set(progress: dict[str, Any], total: int, current: int) -> None:
    for part, value in (("total", total), ("current", current)):
        progress[part].update(dict.fromkeys(progress[part], value))
