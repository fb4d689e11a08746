"""Who works on a benchmark: a file for each driver and each job at work, locked as long as its process lives.

The kernel frees a lock however its process ends, so nothing of a dead driver has to be cleared away. Locks are flock's:
a file system that several machines share has to have them (NFS has since Linux 2.6.12).
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from lightning_glue.errors import UserError


@dataclass(frozen=True)
class Driver:
    """A process that gives out jobs of a benchmark.

    Attributes:
        session: the same for all drivers that work together; another one whenever the first begins alone.
        since: seconds since 1970.
    """

    id: str
    session: str
    host: str
    pid: int
    since: float

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} since {since}"


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[IO[str] | None]:
    """Hold a file, which is made if need be: yields it open, or None where somebody else holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        yield file


def at_work(benchmark: Path) -> list[Driver]:
    """The drivers that are alive; the files of others are removed."""
    found = []
    for path in sorted((benchmark / "drivers").glob("*.json")):
        with lock(path) as free:
            if free:
                path.unlink(missing_ok=True)
                continue
        with suppress(OSError, ValueError, TypeError):  # it ends just now
            found.append(Driver(**json.loads(path.read_text(encoding="utf-8"))))
    return found


@contextmanager
def working(benchmark: Path, *, join: bool) -> Iterator[tuple[Driver, list[Driver]]]:
    """Be a driver of the benchmark in this folder; yields this one and those that are at work already.

    Args:
        join: beside others.

    Raises:
        UserError: somebody is at work and ``join`` was not asked for; names them.
    """
    with ExitStack() as held:
        with lock(benchmark / "drivers" / "gate.lock", wait=True):
            others = at_work(benchmark)
            if others and not join:
                who = ", ".join(map(str, others))
                raise UserError(
                    f"benchmark {benchmark.name!r} is being worked on by {who}; wait for it, or "
                    "work beside it: the same command with --join"
                )
            session = others[0].session if others else uuid.uuid4().hex
            this = Driver(uuid.uuid4().hex, session, os.uname().nodename, os.getpid(), time.time())
            path = benchmark / "drivers" / f"{this.id}.json"
            file = held.enter_context(lock(path))
            assert file
            file.write(json.dumps(asdict(this)))
            file.flush()
        held.callback(path.unlink, missing_ok=True)
        yield this, others


@contextmanager
def claim(benchmark: Path, job: str) -> Iterator[bool]:
    """Have a job to oneself, among all drivers: yields whether."""
    with lock(benchmark / "claims" / f"{job.replace('/', '.')}.lock") as file:
        yield file is not None
