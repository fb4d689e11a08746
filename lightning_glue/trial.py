"""The process that runs trials: started by the controller of a study, fed with jobs, warm from one to the next."""

from __future__ import annotations

import argparse
import importlib
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.channel import Channel, Message
from lightning_glue.errors import Diverged, UserError, first_line
from lightning_glue.imports import quick_imports
from lightning_glue.launch import is_distributed_child

if TYPE_CHECKING:
    from lightning_glue.config import Config
    from lightning_glue.monitor import BestEvaluation
    from lightning_glue.preprocess import SplitInfo
    from lightning_glue.resume import Resume

STUDY_TAG = "lightning_glue.study"  # of the study's run: the study's id
_LAST_SECONDS = 30.0  # for an orderly end once the controller is gone


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        config: the whole configuration, by dotted keys; nothing is read from ``conf/`` any more.
        tags: for the MLflow run.
        checkpoints: folder for them; if it has some, from a process that died, the training goes on from there.
        study: id of the study, whose run is the parent of the training's.
    """

    config: dict[str, Any]
    tags: dict[str, str]
    checkpoints: str
    study: str = ""
    collapse_margin: float = 0.0


@dataclass
class Outcome:
    """What a training came to.

    Attributes:
        value: the highest selection metric of its evaluations; None where it was stopped before the first.
        collapsed: whether ``value`` is that of predicting the majority class.
        first_step_seconds: from the job's arrival to the end of the first optimizer step.
        data: digests of the splits, by name.
    """

    value: float | None
    run_id: str = ""
    pruned: bool = False
    collapsed: bool = False
    first_step_seconds: float | None = None
    data: dict[str, str] = field(default_factory=dict)


Report = Callable[[int, float], bool]  # (evaluation, value) -> whether to stop
Objective = Callable[[Job, Report, Callable[[str], None]], Outcome]  # the last tells the MLflow run id


class Link:
    """The worker's end of the channel. The controller's death ends this process, in order if it can."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.inbox: queue.Queue[Message] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while (messages := self.channel.receive()) is not None:
            for message in messages:
                self.inbox.put(message)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_LAST_SECONDS)
        os._exit(1)

    def report(self, evaluation: int, value: float) -> bool:
        """Tell an evaluation and wait for the decision."""
        self.channel.send({"event": "report", "step": evaluation, "value": value})
        return bool(self.inbox.get()["prune"])

    def tell_run(self, run_id: str) -> None:
        self.channel.send({"event": "run", "run_id": run_id})


def as_parent(study: str) -> dict[str, str]:
    """What tells the run of the study with this id."""
    return {"tag": STUDY_TAG, "value": study}


class TrainingFailed(Exception):
    """A training that had begun could not go on, for no reason that lies in the configuration."""


def train_objective(job: Job, report: Report, tell_run: Callable[[str], None]) -> Outcome:
    """Train as ``python -m lightning_glue.train`` does, in an MLflow run of its own.

    Raises:
        UserError: nothing can be trained with this configuration on this machine.
    """
    start = time.perf_counter()
    import pytorch_lightning as pl

    from lightning_glue import config as configuration
    from lightning_glue.build import build
    from lightning_glue.metrics import majority_value
    from lightning_glue.pruning import Pruning
    from lightning_glue.run import execute, make_tracker, prepare_process
    from lightning_glue.watcher import watch

    config = configuration.unflatten(job.config)
    prepare_process(config)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    if not is_distributed_child():
        watch()  # it gets ready meanwhile
    tracker = make_tracker(config)
    tracker.parent = as_parent(job.study) if job.study else None
    module, data, pretrained = build(config, _warm)
    task = module.task
    pruning = Pruning(task.selection_metric, report, start)
    folder = Path(job.checkpoints)

    def has_collapsed(best: BestEvaluation) -> bool:
        level = majority_value(task, best.evaluations[task.dev[0].name].targets)
        return best.values[task.selection_metric] <= level + job.collapse_margin

    def tag(best: BestEvaluation) -> None:
        tags = {"optuna.pruned": str(pruning.pruned).lower(), "collapsed": str(has_collapsed(best)).lower()}
        tracker.set_tags(tags | {"optuna.state": "PRUNED" if pruning.pruned else "COMPLETE"})

    found = interrupted(folder, config, data.prepared.splits, job.study)
    try:
        best = execute(
            config, module, data, pretrained, tracker, found, tags=job.tags, callbacks=[pruning],
            checkpoints=folder, started=lambda: tell_run(tracker.run_id), ending=tag,
        )  # fmt: skip
    except Diverged:
        raise
    except UserError as error:  # a full disk, a database that is locked
        raise TrainingFailed(str(error)) from error
    digests = {name: info.sha256 for name, info in data.prepared.splits.items()}
    value, first_step = best.values[task.selection_metric], pruning.first_step_seconds
    return Outcome(value, tracker.run_id, pruning.pruned, has_collapsed(best), first_step, digests)


def preload() -> None:
    """Import before the first job what takes seconds."""
    with quick_imports():
        importlib.import_module("lightning_glue.module")


_warm: dict[Any, Any] = {}  # pretrained weights and tokenized splits of the last job


def interrupted(checkpoints: Path, config: Config, splits: Mapping[str, SplitInfo], study: str) -> Resume | None:
    """The training that a process left in this folder when it died, unless it had come to its end.

    What cannot be read there, or is of another configuration, other data or another study, is removed: the training
    begins anew.
    """
    from lightning_glue.journal import Journal, final_status, find_journal
    from lightning_glue.resume import check_config, check_data, read_checkpoint

    path = checkpoints / "last.ckpt"
    if not path.is_file():
        return None
    try:
        found = read_checkpoint(path)
        check_config(found, config)
        check_data(found, dict(splits))
        journal = find_journal(Path(config.tracking.journal), found.run_id)
        records = Journal(journal).read() if journal else []
        of = records[0][0]["start"].get("parent") if records else None
        if of and of["value"] != study:
            raise UserError(f"run {found.run_id} is of another study")
    except UserError as error:
        print(f"warning: {path} is removed, the training begins anew: {error}", file=sys.stderr)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return None
    return None if final_status(records) == "FINISHED" else found


def run_job(objective: Objective, link: Link, message: Message) -> Message:
    """Run one job; how it ended."""
    try:
        outcome = objective(Job(**message["job"]), link.report, link.tell_run)
        return {"event": "done", **asdict(outcome)}
    except Exception as error:
        kind, text = _failure(error)
        if kind == "error":
            traceback.print_exc()
        return {"event": "failed", "kind": kind, "message": text}


def _failure(error: Exception) -> tuple[str, str]:
    """The kind of a failure and what to say of it.

    ``user``: nothing can be trained before the user has mended it; ``memory`` and ``diverged``: so it would end with
    these parameters again; ``error``: anything else.
    """
    import torch

    if isinstance(error, Diverged):
        return "diverged", f"diverged at {error.where}"
    if isinstance(error, UserError):
        return "user", str(error)
    lacking = "can't allocate memory" in str(error) or "not enough memory" in str(error)  # torch's words on the CPU
    if lacking or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "memory", f"out of memory: {first_line(error)}"
    return "error", ("" if isinstance(error, TrainingFailed) else f"{type(error).__name__}: ") + first_line(error)


def _release() -> None:
    """Give the last job's memory back before the next one needs it."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lightning_glue.trial", description=__doc__)
    parser.add_argument("--channel", type=int, required=True, metavar="FD", help="socket to the controller")
    parser.add_argument("--objective", required=True, metavar="MODULE:FUNCTION")
    args = parser.parse_args()
    link = Link(Channel(socket.socket(fileno=args.channel)))
    module, _, name = args.objective.partition(":")
    found = importlib.import_module(module)
    objective: Objective = getattr(found, name)
    getattr(found, "preload", lambda: None)()
    link.channel.send({"event": "ready"})
    while True:
        answer = run_job(objective, link, link.inbox.get())
        _release()
        link.channel.send(answer)
        if answer["event"] == "failed" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            sys.exit(1)  # the other processes may wait for this one for ever: the controller ends the group


if __name__ == "__main__":
    main()
