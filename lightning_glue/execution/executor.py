"""What runs trainings, wherever: a warm group of worker processes on a place, fed with jobs over channels."""

from __future__ import annotations

import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from lightning_glue.execution.channel import Channel, Message
from lightning_glue.execution.place import Place

GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL


class Executor(Protocol):
    """A group of worker processes on one place, which train together (DDP) and stay warm from one job to the next.

    Each process runs :mod:`lightning_glue.execution.worker`, says ``ready`` when its imports are done, is sent
    ``{"job": ...}`` (a :class:`~lightning_glue.execution.job.Job` as a dictionary), and answers with the events
    ``run``, ``report``, and ``done`` or ``failed``. Its death reads as the closing of its channel. A place that is not
    fit for any training says ``failed`` (kind ``user``) before it was sent a job.

    Attributes:
        log: the file its processes print to.
        processes: empty while the group is not started.
        channels: one for each process, in the order of the ranks.
    """

    place: Place
    log: Path
    channels: list[Channel]

    @property
    def processes(self) -> Sequence[Any]: ...

    def start(self) -> None:
        """Start the processes, from nothing or again."""

    def register(self, selector: selectors.BaseSelector) -> None:
        """Have ``selector`` say when a process can be read, with ``(executor, rank)`` as data."""

    def send(self, message: Message) -> None:
        """To every process."""

    def send_to(self, rank: int, message: Message) -> None:
        """To one process; a dead one shows when its channel is read."""

    def exit_reason(self) -> str:
        """What became of the processes, once a channel has closed."""

    def last_words(self) -> str:
        """The end of the log."""

    def is_running(self) -> bool: ...

    def signal(self, number: int) -> None:
        """To every process and what it has started."""

    def close(self, selector: selectors.BaseSelector) -> None:
        """Kill what still runs, and forget it."""


class Speaks:
    """What an executor does with its channels, wherever the processes are."""

    channels: list[Channel]

    def send(self, message: Message) -> None:
        """To every process."""
        for rank in range(len(self.channels)):
            self.send_to(rank, message)

    def send_to(self, rank: int, message: Message) -> None:
        """To one process; a dead one shows when its channel is read."""
        with suppress(OSError):
            self.channels[rank].send(message)

    def register(self, selector: selectors.BaseSelector) -> None:
        for rank, channel in enumerate(self.channels):
            selector.register(channel, selectors.EVENT_READ, (self, rank))

    def close_channels(self, selector: selectors.BaseSelector) -> None:
        for channel in self.channels:
            with suppress(KeyError):  # its end was read before
                selector.unregister(channel)
            channel.close()
        self.channels = []


@contextmanager
def stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within, SIGINT and SIGTERM go to ``handler``; nothing changes outside the main thread, which alone gets them."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def readable(selector: selectors.BaseSelector, seconds: float) -> Iterator[tuple[Any, int]]:
    """Executor and rank of each process that said something, or has gone; waits for the first at most ``seconds``."""
    for key, _ in selector.select(timeout=seconds):
        group, rank = key.data
        if key.fileobj in group.channels:  # else the group ended since
            yield group, rank


def stop(
    groups: Sequence[Executor],
    selector: selectors.BaseSelector,
    grace: float = GRACE_SECONDS,
    heard: Callable[[Executor, int, Message], None] = lambda group, rank, message: None,
) -> None:
    """End every process of the groups and what it has started, all at once; SIGKILL after ``grace`` seconds.

    Args:
        selector: where the groups are registered.
        heard: is called with what a process says meanwhile, its group and its rank; a trial that waits for a decision
            gets it there and goes on to its orderly end.
    """
    for group in groups if grace else ():
        group.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(group.is_running() for group in groups):
        for key, _ in selector.select(timeout=0.1):
            group, rank = key.data
            messages = group.channels[rank].receive()
            if messages is None:
                selector.unregister(key.fileobj)
            for message in messages or ():
                heard(group, rank, message)
    for group in groups:
        group.close(selector)
