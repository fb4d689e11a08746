"""The executor of a Ray cluster: a group of worker processes on whatever node has room, warm as on this machine."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.execution.channel import Channel
from lightning_glue.execution.executor import Speaks
from lightning_glue.execution.place import Place
from lightning_glue.execution.ray_session import Alike, Session, Share

if TYPE_CHECKING:
    from lightning_glue.execution.ray_engine import RayEngine


class RayGroup(Speaks):
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
        self.close_channels(selector)
        self._session = None
