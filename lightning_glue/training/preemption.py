"""Requests to stop, from a scheduler (SIGTERM, SIGUSR1), the keyboard (Ctrl-C) or a terminal that is gone (SIGHUP)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning_glue.utils.launch import is_distributed_child

INHERITED = "LIGHTNING_GLUE_RESUME"  # in the environment of processes that Lightning starts
_OF_OTHERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_SIGNALS = (signal.SIGINT, *_OF_OTHERS)
_ONE_REQUEST_SECONDS = 0.3  # torchrun sends on what the terminal has sent already


class Stopped(SystemExit):
    """Ends a process that was asked to stop, with the exit code that shells give a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


def started_by_lightning() -> bool:
    """Whether this is a DDP process that process 0 started: it ends with that one, and follows its decisions."""
    return is_distributed_child() and INHERITED in os.environ


def end_at_once() -> None:
    """While there is no run yet, let a scheduler's signals end the process as Ctrl-C does, with one line.

    A process that Lightning started ignores them, as it does Ctrl-C: process 0 decides, and takes it along.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
        raise Stopped(number)

    def ignore(number: int, frame: FrameType | None) -> None:
        """Other than SIG_IGN, this does not tell :class:`Preemption` that the user wants the signal ignored."""

    for number in _SIGNALS if started_by_lightning() else _OF_OTHERS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, for instance
            signal.signal(number, ignore if started_by_lightning() else end)


class Preemption:
    """Within its ``with`` block a request to stop is only noted; :meth:`check` acts on it, between two writes.

    A second Ctrl-C ends the process at once: everything logged so far is in the journal, and files appear whole.

    Attributes:
        received: the first signal; None as long as there is none.
        saved_step: optimizer step of the last checkpoint to resume from; None as long as there is none.
        exits: whether a second Ctrl-C ends the process; False: it raises KeyboardInterrupt, the process is another's.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.saved_step: int | None = None
        self.exits = True
        self._since = 0.0
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise :class:`Stopped` if a request to stop was noted."""
        if self.received:
            raise Stopped(self.received)

    @contextmanager
    def acting_at_once(self) -> Iterator[None]:
        """Around what only waits: a request raises :class:`Stopped` there, in the middle."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        if first:
            self.received, self._since = signal.Signals(number), time.monotonic()
            if self._at_once:
                raise Stopped(number)
        if number != signal.SIGINT or (is_distributed_child() and (first or started_by_lightning())):
            return
        if first:
            os.write(2, b"\nCtrl-C: stopping after this step, with a checkpoint; once more ends at once\n")
        elif time.monotonic() - self._since > _ONE_REQUEST_SECONDS:
            os.write(2, b"\nended at once\n")
            if not self.exits:
                raise KeyboardInterrupt
            os._exit(128 + number)
