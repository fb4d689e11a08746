"""What has happened in a benchmark: ``ledger.jsonl``, a JSON object a line, only ever appended to, by all drivers.

    {"time", "job", "state", "session", "driver", ...}      seconds since 1970; who writes

    started   slot, devices: a driver has given the job to a slot
    run       run_id: the training has its MLflow run
    done      id, of, run_id, metrics, value, seconds, slot
    died      message: its process ended by itself; it is tried again
    stopped   it was told to, in order
    failed    kind, message: it is not tried again before the command is
    lost      message: it was done, and what came of it is no more
    dropped   the exported model of a training was deleted, as ``keep`` says
    registered   model, version: as which it is in MLflow's registry

``id`` is another one each time a job is done, and ``of`` has those of the jobs it was made from: a job is done as long
as its inputs are among these, so that one more seed makes ensembles and report anew and nothing else.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_glue.errors import UserError
from lightning_glue.pipeline.graph import Graph

Event = dict[str, Any]


@dataclass
class Entry:
    """What the ledger says of a job.

    Attributes:
        done: the event, unless it was lost since.
        failed: the event, of this session alone.
        attempts: how often it was started in this session and not stopped in order.
        run_id: of its run, the last one.
        dropped, registered: whether its exported model was deleted, is registered.
    """

    done: Event | None = None
    failed: Event | None = None
    attempts: int = 0
    run_id: str = ""
    dropped: bool = False
    registered: bool = False


@dataclass
class Ledger:
    """Attributes: session: of the drivers at work; failures and attempts of earlier ones do not count."""

    path: Path
    session: str = ""
    driver: str = ""
    entries: dict[str, Entry] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    _offset: int = 0

    def entry(self, job: str) -> Entry:
        return self.entries.setdefault(job, Entry())

    def append(self, job: str, state: str, **more: Any) -> Event:
        """Write an event behind all that is there, on the disk when this returns, and take it in.

        Raises:
            UserError: the disk is full, for instance.
        """
        now = round(time.time(), 3)
        event = {"time": now, "job": job, "state": state, "session": self.session, "driver": self.driver, **more}
        try:
            self._write(json.dumps(event).encode() + b"\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; free space or get rights there, then the same command "
                "goes on"
            ) from None
        self.refresh()
        return event

    def _write(self, data: bytes) -> None:
        with open(self.path, "a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":  # torn by a driver that was killed
                data = b"\n" + data
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())

    def refresh(self) -> bool:
        """Take in what was written since, by whomever; whether there was something."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return False
        self._offset += len(whole + newline)
        new = [event for line in whole.split(b"\n") if (event := _read(line))]
        for event in new:
            self._take(event)
        return bool(new)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        entry, ours = self.entry(event["job"]), event.get("session") == self.session
        match event["state"]:
            case "started":
                entry.attempts += ours
            case "stopped":
                entry.attempts -= ours
            case "run":
                entry.run_id = event["run_id"]
            case "done":
                entry.done, entry.failed, entry.run_id = event, None, event.get("run_id", "")
                entry.dropped = entry.registered = False
            case "failed":
                entry.failed = event if ours else None
                entry.run_id = entry.run_id if event.get("kind") == "died" else ""  # the run is not gone on with
            case "lost":
                entry.done, entry.run_id = None, ""
            case "dropped":
                entry.dropped = True
            case "registered":
                entry.registered = True

    def done(self, graph: Graph) -> set[str]:
        """The jobs that are done with the inputs that there are now; with more than these, where others add to it."""
        found: dict[str, str] = {}
        for node in graph.values():
            event = self.entry(node.name).done
            now = [*node.needs, *(name for name in node.after if name in found)]
            if event and all(event["of"].get(name) == found.get(name, "") for name in now):
                found[node.name] = event["id"]
        return set(found)

    def inputs(self, graph: Graph, job: str) -> dict[str, str]:
        """What ``of`` is to be where the job is done now."""
        done = self.done(graph)
        return {name: self.ids(name) for name in graph[job].inputs if name in done}

    def ids(self, job: str) -> str:
        event = self.entry(job).done
        return event["id"] if event else ""

    def failed(self, graph: Graph) -> dict[str, str]:
        """Why jobs failed in this session."""
        entries = {name: self.entry(name).failed for name in graph}
        return {name: event.get("message", "") for name, event in entries.items() if event}

    def metrics(self, job: str) -> Mapping[str, float]:
        """Of a job that is done."""
        event = self.entry(job).done
        return (event or {}).get("metrics") or {}


def _read(line: bytes) -> Event | None:
    """A line's event; None for one that was not written to its end, or is of another kind."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(event, dict) and isinstance(event.get("job"), str) and isinstance(event.get("state"), str)
    if not known or not isinstance(event.get("time"), int | float):
        return None
    if event["state"] == "done" and not (isinstance(event.get("id"), str) and isinstance(event.get("of"), dict)):
        return None
    return event if event["state"] != "run" or isinstance(event.get("run_id"), str) else None


@dataclass(frozen=True)
class Idle:
    """Seconds of all slots together, from the first start of each to the end of its last job.

    Attributes:
        total: at work or idle.
        given: idle between two jobs though the second one's inputs were there: what the driver takes.
        waited: idle until they were.
    """

    total: float = 0.0
    given: float = 0.0
    waited: float = 0.0


def idle(events: Iterable[Event]) -> Idle:
    """How long slots stood still; one that has no job after its last one is not idle: there was none left for it."""
    known = list(events)
    ends = {event["job"]: event["time"] for event in known if event["state"] == "done"}
    inputs = {event["job"]: event["of"] for event in known if event["state"] == "done"}
    slots: dict[tuple[str, str], list[Event]] = {}
    for event in known:
        if event["state"] in ("started", "done", "died", "failed", "stopped") and "slot" in event:
            slots.setdefault((event.get("driver", ""), event["slot"]), []).append(event)
    total = given = waited = 0.0
    for found in slots.values():
        total += found[-1]["time"] - found[0]["time"]
        for before, event in itertools.pairwise(found):
            if event["state"] == "started":
                ready = max((ends.get(name, 0.0) for name in inputs.get(event["job"], ())), default=0.0)
                begin = min(max(before["time"], ready), event["time"])
                given, waited = given + event["time"] - begin, waited + begin - before["time"]
    return Idle(total, given, waited)
