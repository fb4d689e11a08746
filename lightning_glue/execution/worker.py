"""A process that runs trainings: started on a slot, fed with jobs, warm from one to the next."""

from __future__ import annotations

import argparse
import importlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict

from lightning_glue.errors import Diverged, OutOfMemory, UserError
from lightning_glue.execution.channel import Channel, Message
from lightning_glue.execution.job import Job, Objective, TrainingFailed
from lightning_glue.execution.place import CORES
from lightning_glue.training.allocator import is_out_of_memory
from lightning_glue.utils.redact import first_line

_LAST_SECONDS = 30.0  # for an orderly end once the controller is gone


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


def run_job(objective: Objective, link: Link, message: Message) -> Message:
    """Run one job; how it ended."""
    try:
        outcome = objective(Job(**message["job"]), link.report, link.tell_run)
        return {"event": "done", **asdict(outcome)}
    except Exception as error:
        kind, text = _failure(error)
        if kind == "error":
            traceback.print_exc()
        return {"event": "failed", "kind": kind, "message": text, "class": type(error).__name__}


def _failure(error: Exception) -> tuple[str, str]:
    """The kind of a failure and what to say of it.

    ``user``: nothing can be trained before the user has mended it; ``memory`` and ``diverged``: so it would end with
    these parameters again; ``error``: anything else.
    """
    if isinstance(error, Diverged):
        return "diverged", f"diverged at {error.where}"
    if isinstance(error, OutOfMemory):
        return "memory", str(error)
    if isinstance(error, UserError):
        return "user", str(error)
    if is_out_of_memory(error):
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
    parser = argparse.ArgumentParser(prog="python -m lightning_glue.execution.worker", description=__doc__)
    parser.add_argument("--channel", type=int, required=True, metavar="FD", help="socket to the controller")
    parser.add_argument("--objective", required=True, metavar="MODULE:FUNCTION")
    args = parser.parse_args()
    if cores := os.environ.get(CORES):  # before a library counts them
        os.sched_setaffinity(0, map(int, cores.split(",")))
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
