"""Continue an interrupted training exactly where it was: what is saved, when, and how it is found again.

A checkpoint is taken only between two optimizer steps. Everything random in a step follows from (seed, step, rank), and
the order of the batches from (seed, epoch), so the position of a training is two numbers: epoch, batches done in it.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_glue import atomic
from lightning_glue.config import Config, digest, identity
from lightning_glue.delivery import MANIFEST, local_folder, sha256
from lightning_glue.distributed import Vote, children_end_with_us, decided_by_leader
from lightning_glue.errors import UserError
from lightning_glue.journal import Journal, State, find_journal
from lightning_glue.launch import is_distributed_child, launch
from lightning_glue.monitor import BestEvaluation, dev_metrics
from lightning_glue.preprocess import SplitInfo
from lightning_glue.pretrained import safe_load
from lightning_glue.store import connect, reason
from lightning_glue.tasks import get_task
from lightning_glue.tracking import MLflowTracker, unfinished_run

RECORD = "lightning_glue"  # key of a checkpoint's plain values: configuration, data digests, run
POSITION = "position"
_LAST = "checkpoints/last.ckpt"
_INHERITED, _JOURNAL = "LIGHTNING_GLUE_RESUME", "LIGHTNING_GLUE_JOURNAL"  # in the environment of child processes


@dataclass(frozen=True)
class Resume:
    """An unfinished run to continue.

    Attributes:
        path: its last checkpoint; None where it was interrupted before the first one.
        record: the checkpoint's plain values.
        position: epochs done, batches done in the next one.
    """

    run_id: str
    path: Path | None
    record: dict[str, Any]
    position: tuple[int, int] = (0, 0)

    def carry_best(self, checkpoints: Path) -> None:
        """Take the best weights so far along, where the run goes on in another folder."""
        folder = self.path and self.path.parent
        for best in [*folder.glob("best.ckpt"), *folder.glob("step-*.ckpt")] if folder else []:
            if not (checkpoints / best.name).exists():
                checkpoints.mkdir(parents=True, exist_ok=True)
                shutil.copy(best, checkpoints)


def read_checkpoint(path: Path) -> Resume:
    """The run and the position of a ``last.ckpt``.

    Raises:
        UserError: the file is missing or damaged, or cannot be continued from.
    """
    checkpoint = safe_load(path)
    if POSITION not in checkpoint:
        raise UserError(f"{path} cannot be resumed: it holds weights only; expected the last.ckpt of a run")
    record = checkpoint[RECORD]
    return Resume(record["run_id"], path, record, tuple(checkpoint[POSITION]))


def find(reference: str, config: Config) -> Resume | None:
    """The run to continue, or None where ``auto`` finds none; the same in every process of the job.

    Args:
        reference: path of a checkpoint, MLflow run id, or ``auto``: the newest unfinished run of this configuration,
            that is not being trained.

    Raises:
        UserError: there is nothing to continue from.
    """
    if _INHERITED in os.environ and is_distributed_child():
        told = json.loads(os.environ[_INHERITED])
        path = Path(told["path"]) if told and told["path"] else None
        return told and Resume(told["run_id"], path, told["record"], tuple(told["position"]))
    found = decided_by_leader(lambda: _find(reference, config))
    if found and found.path and not found.path.exists():  # process 0 is on another machine
        return replace(found, path=_fetch_checkpoints(config.tracking.uri, found.run_id))
    return found


def _find(reference: str, config: Config) -> Resume | None:
    if reference.endswith(".ckpt") or Path(reference).is_file():
        if not Path(reference).is_file():
            raise UserError(f"--resume {reference}: no such file")
        return read_checkpoint(Path(reference))
    root, uri = Path(config.tracking.journal), config.tracking.uri
    run_id: str | None = reference
    if reference == "auto":
        experiment = config.tracking.experiment or get_task(config.task.name).experiment
        run_id = unfinished_run(root, uri, experiment, digest(config))
        if not run_id:
            return None
    folder = find_journal(root, run_id)
    path = _local_checkpoint(folder) if folder else _fetch_checkpoints(uri, run_id)
    if path.is_file():
        return read_checkpoint(path)
    if folder:
        return Resume(run_id, None, Journal(folder).read()[0][0]["start"])
    raise UserError(f"--resume {reference}: no last.ckpt in that run, no journal in {root} and no such file")


def _local_checkpoint(folder: Path) -> Path:
    """Where the run of a journal on this machine keeps its last checkpoint."""
    store = local_folder(State(folder).artifact_uri)
    staged = folder / "artifacts" / _LAST
    return staged if staged.exists() or not store else store / _LAST


def _fetch_checkpoints(uri: str | None, run_id: str) -> Path:
    """Bring a run's checkpoints here and check them against their manifest; the path of the last one."""
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    target = Path(tempfile.mkdtemp(prefix="lightning-glue-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    (target / "checkpoints").mkdir()
    try:
        client.get_run(run_id)
        stored = {item.path for item in client.list_artifacts(run_id, "checkpoints")}
        manifest = json.loads(Path(client.download_artifacts(run_id, MANIFEST)).read_text()) if stored else {}
        for path, entry in manifest.items():
            fetched = Path(client.download_artifacts(run_id, entry["file"]))
            if sha256(fetched) != entry["sha256"]:
                raise UserError(f"run {run_id}: {entry['file']} is damaged (its SHA-256 is not that of the manifest)")
            shutil.copy(fetched, target / path)
    except (MlflowException, OSError) as error:
        raise UserError(f"run {run_id}: no checkpoint to be had ({reason(error)})") from None
    return target / _LAST


@contextmanager
def told_to_children(found: Resume | None, tracker: MLflowTracker) -> Iterator[None]:
    """Let the processes that Lightning starts go on where this one does, with the same command line, and end with it.

    They also learn where to leave the traceback of a crash.
    """
    chosen = found and {**vars(found), "path": str(found.path or "")}
    os.environ[_INHERITED] = json.dumps(chosen)
    os.environ[_JOURNAL] = str(tracker.folder.resolve())
    try:
        with children_end_with_us():  # kill -9 leaves nobody at work
            yield
    finally:
        del os.environ[_INHERITED], os.environ[_JOURNAL]


def keep_traceback(tracker: MLflowTracker) -> None:
    """In process 0: log the traceback of the exception at hand, and those that others left; there: leave it."""
    import traceback

    text = traceback.format_exc()
    if is_distributed_child():
        journal = os.environ.get(_JOURNAL)
        if journal and Path(journal).is_dir():  # process 0 is on this machine, or its disk is shared
            with atomic.new_file(Path(journal) / f"traceback-{launch().rank}.txt") as file:
                file.write(text)
        return
    tracker.log_text(text, "traceback.txt")
    keep_tracebacks_left(tracker)


def keep_tracebacks_left(tracker: MLflowTracker) -> bool:
    """In process 0: log the tracebacks that others left; whether there are any."""
    found = sorted(tracker.folder.glob("traceback-*.txt"))
    for left in found:
        tracker.log_text(left.read_text(), left.name)
        left.unlink()
    return bool(found)


def digests(splits: dict[str, SplitInfo]) -> dict[str, str]:
    return {name: info.sha256 for name, info in splits.items()}


def check_data(found: Resume, splits: dict[str, SplitInfo]) -> None:
    """Raise UserError where the data are not those the run was trained on; names the split and both digests."""
    then, now = found.record.get("data", {}), digests(splits)
    for name in sorted(then.keys() | now.keys()):
        if found.path and then.get(name) != now.get(name):
            raise UserError(
                f"run {found.run_id} cannot be resumed on other data: split {name} was {_short(then.get(name))}, "
                f"is {_short(now.get(name))}; restore the files or start a new run"
            )


def _short(digest: str | None) -> str:
    return f"sha256 {digest[:12]}" if digest else "absent"


def check_config(found: Resume, config: Config) -> None:
    """Raise UserError where ``config`` would make another result than the run's own configuration."""
    now = identity(config)
    for key, then in found.record.get("config", {}).items():
        if key in now and now[key] != then:
            raise UserError(f"run {found.run_id} was started with {key}={then}, not {now[key]}; leave {key} out")


class Preemption:
    """SIGTERM, from a scheduler for instance: at once outside of training, between two steps inside."""

    def __init__(self) -> None:
        self.received = False
        self.stepping = False

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, True
        if first and not self.stepping:
            raise SIGTERMException


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and are read without executing anything in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic.new_file(target, "wb") as file:
                torch.save(checkpoint, file)
        except OSError as error:
            raise UserError(
                f"cannot write the checkpoint {target}: {error.strerror}; the one before is whole: free space, then "
                f"--resume {checkpoint[RECORD]['run_id']}"
            ) from None

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return safe_load(Path(path))


class Checkpoints(Checkpoint):
    """Writes ``best.ckpt`` (weights) and ``last.ckpt`` (everything); makes a step depend on (seed, step, rank) alone.

    Of the ``keep`` best evaluations those behind the best are ``step-<n>.ckpt``. ``last.ckpt`` is written after every
    evaluation, every ``every_steps`` optimizer steps and on SIGTERM.

    Args:
        folder: where the files go; only that of process 0 counts.
    """

    def __init__(
        self, folder: Path, best: BestEvaluation, keep: int, seed: int, every_steps: int | None, preemption: Preemption
    ) -> None:
        self.folder, self.best, self.keep, self.seed, self.every_steps = folder, best, keep, seed, every_steps
        self.preemption = preemption
        self.kept: list[tuple[float, int]] = []  # value and step of the best evaluations, the best first
        self.saved_step = -1
        self._vote: Vote | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Where torchrun or SLURM started the others, they know of the journal only now.
        os.environ[_JOURNAL] = trainer.strategy.broadcast(os.environ.get(_JOURNAL, ""))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved_step = trainer.global_step
        self.preemption.stepping = True
        self.preemption.listen()  # Lightning's own handler talks to other processes in the middle of a step
        # Lightning asks process 0 about SIGTERM before every batch and waits for the answer: see Vote.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self._vote = Vote(trainer.world_size)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            step = trainer.global_step
            assert self._vote
            stop = self._vote.cast(self.preemption.received)
            if stop or (self.every_steps and step % self.every_steps == 0 and step != self.saved_step):
                self.save_last(trainer)
            if stop:
                raise SIGTERMException
        place = trainer.fit_loop.total_batch_idx * trainer.world_size + trainer.global_rank
        torch.manual_seed(int(np.random.SeedSequence([self.seed, place]).generate_state(1)[0]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.preemption.stepping = False
        if self._vote:
            self._vote.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._vote:
            self._vote.close()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._keep_best(trainer, dev_metrics(trainer, pl_module)[self.best.metric])
            self.save_last(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": [list(one) for one in self.kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = [(value, step) for value, step in state["kept"]]

    def _keep_best(self, trainer: pl.Trainer, value: float) -> None:
        """Bring the files of the best evaluations in line with the one just made."""
        before, now = self.kept, (value, trainer.global_step)
        self.kept = sorted([*before, now], key=lambda one: (-one[0], one[1]))[: self.keep]
        if self.best.step == trainer.global_step:
            if before and before[0] in self.kept:
                self._replace(trainer, f"step-{before[0][1]}.ckpt", link="best.ckpt")
            self.save_best(trainer)
        elif now in self.kept:
            self._save(trainer, f"step-{trainer.global_step}.ckpt")
        for _, step in before[1:]:
            if all(step != one[1] for one in self.kept):
                self._replace(trainer, f"step-{step}.ckpt", link=None)

    def _replace(self, trainer: pl.Trainer, name: str, link: str | None) -> None:
        """Make ``name`` another name of the file ``link``; None: delete it."""
        if not trainer.is_global_zero:
            return
        (self.folder / name).unlink(missing_ok=True)
        if link:
            os.link(self.folder / link, self.folder / name)
        self._tell(trainer, name, gone=link is None)

    def save_best(self, trainer: pl.Trainer) -> None:
        self._save(trainer, "best.ckpt")

    def save_last(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # nothing before the checkpoint's step may be missing from the run
        self._save(trainer, "last.ckpt", resumable=True)
        self.saved_step = trainer.global_step

    def _save(self, trainer: pl.Trainer, name: str, *, resumable: bool = False) -> None:
        """Write the model's weights; ``resumable``: optimizer, schedule and position, too."""
        trainer.save_checkpoint(self.folder / name, weights_only=not resumable)
        self._tell(trainer, name)

    def _tell(self, trainer: pl.Trainer, name: str, gone: bool = False) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MLflowTracker) and self.folder == logger.artifacts / "checkpoints":
                (logger.evict_artifact if gone else logger.log_artifact)(f"checkpoints/{name}")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        epoch, batches = position(trainer)
        total = epoch * trainer.num_training_batches + batches
        # Lightning's counters stop at the hook that saves, and it guesses from them how to go on, not always rightly.
        # They are set to what they are between two batches, or before an epoch.
        _settle(loops["epoch_progress"], epoch, epoch)
        if batches:
            for part in loops["epoch_progress"].values():
                part.update(ready=epoch + 1, started=epoch + 1)
        _settle(loops["epoch_loop.batch_progress"], total, batches)
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        _settle(loops["epoch_loop.val_loop.batch_progress"], 0, 0)
        checkpoint["stopping_early"] = trainer.should_stop
        checkpoint[POSITION] = [epoch, batches]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        trainer.should_stop = checkpoint["stopping_early"]


def position(trainer: pl.Trainer) -> tuple[int, int]:
    """Epochs done, and batches done in the next one."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    ended = done >= trainer.num_training_batches
    return (trainer.current_epoch + 1, 0) if ended else (trainer.current_epoch, done)


def _settle(progress: dict[str, Any], total: int, current: int) -> None:
    for part, value in (("total", total), ("current", current)):
        progress[part].update(dict.fromkeys(progress[part], value))
