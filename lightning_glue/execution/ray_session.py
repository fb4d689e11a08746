"""One start of a slot on a Ray cluster: its placement group, its actor, and the threads that carry messages.

Everything that may take its time happens in a thread, so that a search goes on meanwhile; what comes of it reads as
with processes of this machine: messages on a channel, and its closing.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError, RayTaskError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lightning_glue.errors import UserError
from lightning_glue.execution.channel import Channel
from lightning_glue.execution.joining import Files, check_same
from lightning_glue.execution.ray_slot import Slot
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from lightning_glue.execution.ray_engine import RayEngine

_LOOK_SECONDS = 0.3  # between two looks for a place
_PATIENCE = 5.0  # seconds without a place, before a line says so
_ANSWER_SECONDS = 5.0  # that the thread of a search waits for an actor
_LEAVING_SECONDS = {True: 30.0, False: 3.0}  # until a node counts as gone: after silence, after the death of its actor


@dataclass(frozen=True)
class Share:
    """What a slot takes: ``resources`` as Ray counts them, whole ``gpus`` that it sees, ``slots`` that share a node."""

    resources: dict[str, float]
    gpus: int
    slots: int

    def __str__(self) -> str:
        return " and ".join(f"{number:g} {name}" for name, number in self.resources.items())


@dataclass(frozen=True)
class Alike:
    """What must be the same on its node as here: ``described`` is what :func:`describe` says of ``files`` here."""

    files: Files | None
    described: dict[str, str]


class Session:
    """Args: ends: of the channels, one for each process; the other ends are the group's."""

    def __init__(
        self, engine: RayEngine, number: int, share: Share, alike: Alike, objective: str, log: str,
        ends: list[socket.socket],
    ) -> None:  # fmt: skip
        self.engine, self.number, self.share, self.alike = engine, number, share, alike
        self.objective, self.log = objective, log
        self.ends = ends
        self.silent: set[int] = set()  # ranks of processes that are gone
        self.reason = ""
        self.node, self.node_id = "", ""
        self._placement: Any = None
        self._actor: Any = None
        self._closing = threading.Event()
        self._lock = threading.Lock()  # of what is to be given back
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    @property
    def over(self) -> bool:
        """Whether no process of it runs, or will."""
        return not self.thread.is_alive() or len(self.silent) == len(self.ends)

    def _run(self) -> None:
        try:
            if self._place() and self._join():
                threading.Thread(target=self._carry_down, daemon=True).start()
                self._carry_up()
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else None
            if isinstance(cause, UserError):
                self._refuse(cause)
            else:
                self.reason = self._why(error)
        except UserError as error:
            self._refuse(error)
        except OSError:  # the group was closed
            pass
        finally:
            for end in self.ends:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # wakes who waits for it
            if self._closing.is_set():
                self._give_back()

    def _refuse(self, error: UserError) -> None:
        """As a process says that the user has made a mistake."""
        with suppress(OSError):
            message = {"event": "failed", "kind": "user", "message": str(error), "class": type(error).__name__}
            Channel(self.ends[0]).send(message)

    def _place(self) -> bool:
        """Wait for a placement group; False: closed meanwhile."""
        (kind,) = self.share.resources
        target = self.engine.choose_node(self.number, kind)
        with self._lock:
            wanted = placement_group([self.share.resources], "STRICT_PACK", _soft_target_node_id=target)
            self._placement = wanted
        begin, said = time.monotonic(), False
        # Not PlacementGroup.wait: it counts whole seconds, and what it leaves in the cluster's store stays there.
        while placement_group_table(wanted)["state"] != "CREATED" and not self._closing.wait(_LOOK_SECONDS):
            if not said and time.monotonic() - begin > _PATIENCE:
                said = True
                log.info("slot %d waits for a node with %s free", self.number, self.share)
        if self._closing.is_set():
            return False
        (self.node_id,) = placement_group_table(wanted)["bundles_to_node_id"].values()
        self.node = self.engine.node_name(self.node_id)
        self.engine.placed[self.number] = self.node_id
        return True

    def _join(self) -> bool:
        """Start the actor, and its processes once it is seen to be like this driver; False: closed meanwhile."""
        resources = self.share.resources
        options = {
            "num_cpus": resources.get("CPU", 0),
            "num_gpus": resources.get("GPU", 0),
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": 4,  # it listens, and does what it is told
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._placement, 0),
        }
        with self._lock:
            if self._closing.is_set():
                return False
            self._actor = ray.remote(Slot).options(**options).remote(self.engine.environment, self.node)
        check_same(self.alike.described, self._ask("join", str(Path.cwd()), self.alike.files), self.node)
        processes = len(self.ends)
        share = self.share
        self._ask("start", self.number, processes, share.gpus, share.slots, self.objective, self.log)
        return not self._closing.is_set()

    def _ask(self, method: str, *arguments: object, timeout: float | None = None) -> Any:
        return ray.get(getattr(self._actor, method).remote(*arguments), timeout=timeout)

    def _carry_up(self) -> None:
        while len(self.silent) < len(self.ends):
            for rank, data in self._ask("receive"):
                if data:
                    self.ends[rank].sendall(data)
                    continue
                self.reason = self.reason or self._ask("exit_reason")  # before its end shows
                self.silent.add(rank)
                self.ends[rank].shutdown(socket.SHUT_WR)

    def _carry_down(self) -> None:
        with selectors.DefaultSelector() as selector, suppress(RayError, OSError):
            for rank, end in enumerate(self.ends):
                selector.register(end, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    data = self.ends[key.data].recv(1 << 16)
                    if data:
                        self._ask("send", key.data, data)  # one after the other: calls may overtake each other
                    else:
                        selector.unregister(key.fileobj)

    def _why(self, error: RayError) -> str:
        """What became of the actor."""
        name = self.node or "no node yet"
        deadline = time.monotonic() + _LEAVING_SECONDS[isinstance(error, ActorUnavailableError)]
        while self.node_id and time.monotonic() < deadline and not self._closing.wait(0.3):
            if not self.engine.is_alive(self.node_id):
                return f"node {name} left the cluster"
        return f"the actor of slot {self.number} on node {name} ended: {first_line(error)}"

    def signal(self, number: int) -> None:
        with self._lock:
            if self._actor is None:
                self._closing.set()
            elif not self.over:
                self._actor.signal.remote(int(number))

    def last_words(self) -> str:
        if self._actor is None:
            return ""
        with suppress(RayError, GetTimeoutError):
            return self._ask("last_words", timeout=_ANSWER_SECONDS)
        return ""

    def close(self) -> None:
        """Kill the processes and give the placement back."""
        self._closing.set()
        if self._actor is not None:
            with suppress(RayError, GetTimeoutError):  # it is gone, and so are its processes
                self._ask("end", timeout=_ANSWER_SECONDS)
        self._give_back()
        self.engine.placed.pop(self.number, None)

    def _give_back(self) -> None:
        with self._lock:
            actor, placement, self._actor, self._placement = self._actor, self._placement, None, None
        if not ray.is_initialized():  # all of it is gone
            return
        if actor is not None:
            ray.kill(actor)
        if placement is not None:
            remove_placement_group(placement)
