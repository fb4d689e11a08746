"""What is saved of a training, and when: the best weights, and everything that is needed to go on exactly."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn

from lightning_glue.errors import CheckpointError, UserError
from lightning_glue.model.checkpoint_file import safe_load
from lightning_glue.tracking.logger import MLflowTracker
from lightning_glue.training.callbacks import BestEvaluation, dev_metrics
from lightning_glue.training.distributed import Vote
from lightning_glue.training.finite import all_finite
from lightning_glue.training.lightning_internals import (
    ask_nobody_about_sigterm,
    batches_begun,
    position,
    set_position,
)
from lightning_glue.training.module import GlueModule
from lightning_glue.training.preemption import Preemption, Stopped
from lightning_glue.utils import files
from lightning_glue.utils.hints import hint
from lightning_glue.utils.logs import log

RECORD = "lightning_glue"  # key of a checkpoint's plain values: configuration, data digests, run
POSITION = "position"
JOURNAL = "LIGHTNING_GLUE_JOURNAL"  # in the environment: the run's journal, where other processes leave tracebacks
_BEST, _LAST = "best.ckpt", "last.ckpt"


def step_of(path: Path) -> int | None:
    """The optimizer step of a whole checkpoint; None where there is none."""
    try:
        if not path.is_file():
            return None
        step = safe_load(path, mapped=True).get("global_step")
    except UserError:
        return None
    return step if isinstance(step, int) else None


def _disk_fault(error: BaseException | None) -> OSError | None:
    """What the disk said, also where torch makes an error of its own of it while it closes the file."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and are read without executing anything in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.new_file(target, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            fault = _disk_fault(error)
            if fault is None:
                raise
            again, kept = hint("train", {"RESUME": checkpoint[RECORD]["run_id"]}), (target.parent / _LAST).exists()
            raise CheckpointError(
                f"cannot write the checkpoint {target}: {fault.strerror}; free space, then {again} "
                + ("goes on from the one before, which is whole" if kept else "starts over: there is none yet")
            ) from None

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return safe_load(Path(path))


class Checkpoints(Checkpoint):
    """Writes ``best.ckpt`` (weights) and ``last.ckpt`` (everything); makes a step depend on (seed, step, rank) alone.

    Of the ``keep`` best evaluations those behind the best are ``step-<n>.ckpt``. ``last.ckpt`` is written after every
    evaluation, every ``every_steps`` optimizer steps, every ``every_minutes`` and on a request to stop. What an
    evaluation made superfluous is deleted only when ``last.ckpt`` knows of it: the evaluation may be done again.

    Args:
        folder: where the files go; only that of process 0 counts.
    """

    def __init__(
        self,
        folder: Path,
        best: BestEvaluation,
        keep: int,
        seed: int,
        every_steps: int | None,
        every_minutes: float | None,
        preemption: Preemption,
    ) -> None:
        self.folder, self.best, self.keep, self.seed, self.every_steps = folder, best, keep, seed, every_steps
        self.every_seconds = None if every_minutes is None else 60 * every_minutes
        self.preemption = preemption
        self.kept: list[tuple[float, int]] = []  # value and step of the best evaluations, the best first
        self.saved_step = -1
        self.stop = 0  # the signal that all processes stop for
        self._asked_to_save = False
        self._vote: Vote | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Where torchrun or SLURM started the others, they know of the journal only now.
        os.environ[JOURNAL] = trainer.strategy.broadcast(os.environ.get(JOURNAL, ""))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # what the training was resumed from is loaded
            self._settle_files(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        ask_nobody_about_sigterm(trainer)  # see Vote
        self._vote = Vote(trainer.world_size)
        if stop := self._vote_to_the_end(self._vote):
            raise Stopped(stop)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            step = trainer.global_step
            assert self._vote
            stop, due = self._vote.cast(*self._wish(trainer))
            due = due or bool(stop) or bool(self.every_steps and step % self.every_steps == 0)
            if due and step != self.saved_step:
                self.save_last(trainer)
            if stop:
                raise Stopped(stop)
        place = batches_begun(trainer) * trainer.world_size + trainer.global_rank
        torch.manual_seed(int(np.random.SeedSequence([self.seed, place]).generate_state(1)[0]))

    def _wish(self, trainer: pl.Trainer) -> tuple[int, bool]:
        """The signal this process got, if any, and whether it is time to save, which process 0 asks for once."""
        due = False
        if trainer.is_global_zero and self.every_seconds is not None and not self._asked_to_save:
            due = self._asked_to_save = time.monotonic() - self.saved_at >= self.every_seconds
        return int(self.preemption.received or 0), due

    def _vote_to_the_end(self, vote: Vote) -> int:
        """The signal that any process got until now; every process waits for the others."""
        wish = int(self.preemption.received or 0), False
        return max(vote.cast(*wish)[0], vote.cast(*wish)[0])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._vote
        self.stop = self._vote_to_the_end(self._vote)
        self._vote.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._vote:
            self._vote.close()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            assert isinstance(pl_module, GlueModule)
            self._keep_best(trainer, dev_metrics(trainer, pl_module)[self.best.metric])
            self.save_last(trainer)
            if trainer.is_global_zero:
                self._remove_superfluous(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [list(one) for one in self.kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = [(value, step) for value, step in state["kept"]]

    def _keep_best(self, trainer: pl.Trainer, value: float) -> None:
        """Write what the evaluation just made calls for; doing it a second time changes nothing."""
        before, now = self.kept, (value, trainer.global_step)
        self.kept = sorted([*before, now], key=lambda one: (-one[0], one[1]))[: self.keep]
        if self.best.step == trainer.global_step:
            if before and before[0][1] != trainer.global_step:
                self._keep_displaced(trainer, before[0][1], told=before[0] in self.kept)
            self.save_best(trainer)
        elif now in self.kept:
            self._save(trainer, _named(trainer.global_step))

    def _keep_displaced(self, trainer: pl.Trainer, step: int, told: bool) -> None:
        """Give the best file so far, that of ``step``, a name of its own."""
        if trainer.is_global_zero and (self.folder / _BEST).exists() and not (self.folder / _named(step)).exists():
            _link(self.folder / _BEST, self.folder / _named(step))
        if told:
            self._tell(trainer, _named(step))

    def _remove_superfluous(self, trainer: pl.Trainer) -> None:
        """Delete what no kept evaluation needs; first that is recorded, so that no manifest names a file for ever."""
        wanted = {_named(step) for _, step in self.kept[1:]}
        superfluous = [
            path
            for path in self.folder.glob("step-*.ckpt")
            if path.stem.removeprefix("step-").isdecimal() and path.name not in wanted
        ]
        if not superfluous:
            return
        for path in superfluous:
            self._tell(trainer, path.name, gone=True)
        for logger in trainer.loggers:
            logger.save()
        for path in superfluous:
            path.unlink(missing_ok=True)

    def _settle_files(self, trainer: pl.Trainer) -> None:
        """Where training is resumed, go back to the files that its checkpoint knows.

        The process before may have died between a new ``best.ckpt`` and its ``last.ckpt``, or in the middle of a file.
        """
        for part in self.folder.glob(".*.ckpt.*.part"):
            part.unlink(missing_ok=True)
        if not self.kept:
            return
        step = self.kept[0][1]
        if step_of(self.folder / _BEST) != step:
            if step_of(self.folder / _named(step)) == step:
                _link(self.folder / _named(step), self.folder / _BEST)
                self._tell(trainer, _BEST)
            else:
                log.warning(
                    "%s of step %d, the best so far, is gone or damaged; restore it: "
                    "unless a better evaluation follows, the run will fail at its end",
                    self.folder / _BEST,
                    step,
                )
        self._remove_superfluous(trainer)

    def save_best(self, trainer: pl.Trainer) -> None:
        self._save(trainer, _BEST)

    def best_weights(self) -> dict[str, torch.Tensor]:
        """State dict of the module after the best evaluation."""
        path = self.folder / _BEST
        checkpoint = safe_load(path)
        if checkpoint.get("global_step") != self.best.step:
            raise CheckpointError(
                f"{path} is of step {checkpoint.get('global_step')}, not of the best, {self.best.step}"
            )
        return checkpoint["state_dict"]

    def save_last(self, trainer: pl.Trainer) -> None:
        """Unless the weights have ceased to be numbers: then the last checkpoint stays the last with numbers."""
        if not all_finite(trainer.lightning_module):
            trainer.should_stop = True  # TrainingMonitor says why
            return
        for logger in trainer.loggers:
            logger.save()  # nothing before the checkpoint's step may be missing from the run
        self._save(trainer, _LAST, resumable=True)
        self.saved_step = self.preemption.saved_step = trainer.global_step
        self.saved_at, self._asked_to_save = time.monotonic(), False

    def _save(self, trainer: pl.Trainer, name: str, *, resumable: bool = False) -> None:
        """Write the model's weights; ``resumable``: optimizer, schedule and position, too."""
        trainer.save_checkpoint(self.folder / name, weights_only=not resumable)
        self._tell(trainer, name)

    def _tell(self, trainer: pl.Trainer, name: str, gone: bool = False) -> None:
        """Record that a checkpoint was written, or is ``gone``, in a run that keeps its checkpoints."""
        for logger in trainer.loggers:
            if isinstance(logger, MLflowTracker) and self.folder == logger.artifacts / "checkpoints":
                if gone:
                    logger.evict_artifact(f"checkpoints/{name}")
                else:
                    logger.log_artifact(f"checkpoints/{name}")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        epochs, batches = position(trainer)
        set_position(checkpoint, epochs, batches, int(trainer.num_training_batches))
        checkpoint["stopping_early"] = trainer.should_stop
        checkpoint[POSITION] = [epochs, batches]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        trainer.should_stop = checkpoint["stopping_early"]


def _named(step: int) -> str:
    return f"step-{step}.ckpt"


def _link(source: Path, target: Path) -> None:
    """Make ``target`` another name of a file, or a copy where the file system has no second names."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        files.sync(temporary)
    temporary.replace(target)
