"""The executor of a Ray cluster: a group of worker processes on whatever node has room, warm as on this machine."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.execution.channel import Channel, Message
from lightning_glue.execution.place import Place
from lightning_glue.execution.ray_session import Alike, Session, Share

if TYPE_CHECKING:
    from lightning_glue.execution.ray_engine import RayEngine


class RayGroup:
    """A group, see :class:`~lightning_glue.execution.executor.Executor`.

    A node that leaves the cluster reads as the death of its processes. Started again, the group goes to any node with
    room; until there is one, it waits.

    Args:
        place: its number and its processes; its GPUs and threads are those of the node.
        log: on the node, from the folder of this process.
    """

    def __init__(self, engine: RayEngine, place: Place, share: Share, alike: Alike, objective: str, log: Path) -> None:
        self.engine, self.place, self.share, self.alike = engine, place, share, alike
        self.objective, self.log = objective, log
        self.channels: list[Channel] = []
        self._session: Session | None = None

    @property
    def processes(self) -> Sequence[int]:
        return range(self.place.processes) if self._session else ()

    @property
    def node(self) -> str:
        """Its node's name; empty before it has one."""
        return self._session.node if self._session else ""

    def start(self) -> None:
        pairs = [socket.socketpair() for _ in range(self.place.processes)]
        self.channels = [Channel(ours) for ours, _ in pairs]
        ends = [theirs for _, theirs in pairs]
        number, log = self.place.number, str(self.log)
        self._session = Session(self.engine, number, self.share, self.alike, self.objective, log, ends)

    def register(self, selector: selectors.BaseSelector) -> None:
        for rank, channel in enumerate(self.channels):
            selector.register(channel, selectors.EVENT_READ, (self, rank))

    def send(self, message: Message) -> None:
        """To every process."""
        for rank in range(len(self.channels)):
            self.send_to(rank, message)

    def send_to(self, rank: int, message: Message) -> None:
        """To one process; a dead one shows when its channel is read."""
        with suppress(OSError):
            self.channels[rank].send(message)

    def exit_reason(self) -> str:
        return (self._session.reason if self._session else "") or "process closed its channel"

    def last_words(self) -> str:
        return self._session.last_words() if self._session else ""

    def is_running(self) -> bool:
        return self._session is not None and not self._session.over

    def signal(self, number: int) -> None:
        if self._session:
            self._session.signal(number)

    def close(self, selector: selectors.BaseSelector) -> None:
        """Kill what still runs, give the place back, and forget it."""
        if self._session:
            self._session.close()
        for channel in self.channels:
            with suppress(KeyError):  # its end was read before
                selector.unregister(channel)
            channel.close()
        self._session, self.channels = None, []
