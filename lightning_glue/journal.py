"""The journal of a run: every parameter, metric, tag and artifact in the order it came, safe against any interruption.

A journal is a folder. Its file ``records`` only ever grows: each record is its length and its CRC-32, four bytes each,
little-endian, then JSON. Whatever is cut off or damaged ends the journal there: the next writer goes on after the last
whole record. The process that trains holds the lock ``alive``, which the kernel frees however the process ends.

Records have one key, which tells their kind:
    start: id, uri, experiment, name, params, tags, time (ms), system_metrics (seconds), config, run_id (or null);
        optional: shared {tag, value, create}: the run is the one with this tag, which several journals write,
        parent {tag, value}: the run belongs below the one with this tag
    resume: time, tags, uri (or null; optional)
    metrics: [[key, value, time, step], ...]        tags: {key: value}        inputs: [dataset, ...]
    artifact: path below the run's artifacts        status: [FINISHED | FAILED | KILLED, time]
    evict: path of an artifact no longer kept       register: true
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightning_glue import atomic
from lightning_glue.errors import UserError
from lightning_glue.state import State

Record = dict[str, Any]
JOURNALS = "mlruns/.journal"  # where they are unless tracking.journal says otherwise
_HEAD = 8
_MOST = 1 << 28  # bytes of a record; a longer one is damage


def encode(record: Record) -> bytes:
    payload = json.dumps(record, separators=(",", ":")).encode()
    length = len(payload).to_bytes(4, "little")
    return length + zlib.crc32(length + payload).to_bytes(4, "little") + payload


def decode(data: bytes) -> Iterator[tuple[Record, int]]:
    """The whole records at the start of ``data``, each with the position of its end."""
    place = 0
    while place + _HEAD < len(data):
        length = int.from_bytes(data[place : place + 4], "little")
        end = place + _HEAD + length
        payload = data[place + _HEAD : end]
        checksum = int.from_bytes(data[place + 4 : place + _HEAD], "little")
        if not 0 < length <= _MOST or end > len(data) or zlib.crc32(data[place : place + 4] + payload) != checksum:
            return
        yield json.loads(payload), end
        place = end


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)


class Journal:
    """Reads and appends; several processes and threads may append, each through an object of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "records"
        self._end = 0  # of the last record known to be whole
        self._file: IO[bytes] | None = None
        self._checked: set[tuple[int, int | None]] = set()  # a position that was found to hold

    def read(self, offset: int = 0) -> list[tuple[Record, int]]:
        """Records from ``offset`` (the end of one) on, each with the position of its end."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            return [(record, offset + end) for record, end in decode(file.read())]

    def append(self, record: Record) -> None:
        """Write a record behind the last whole one.

        Raises:
            OSError: the disk is full, for instance; the journal is then as it was before.
        """
        if self._file is None:
            self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115 - close() closes it
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            self._cut_torn_tail(self._file)
            data = encode(record)
            try:
                written = self._file.write(data)
                if written != len(data):  # what did not fit: asking again tells why
                    self._file.write(data[written:])
            except OSError:
                self._file.truncate(self._end)
                raise
            self._end += len(data)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _cut_torn_tail(self, file: IO[bytes]) -> None:
        """Look at what others appended since, and cut what one of them could not finish."""
        size = os.fstat(file.fileno()).st_size
        if size > self._end:
            file.seek(self._end)
            added = [end for _, end in decode(file.read())]
            self._end += added[-1] if added else 0
            if size > self._end:
                file.truncate(self._end)

    def is_boundary(self, offset: int) -> bool:
        """Whether a record ends at ``offset``, or none is before it."""
        with open(self.path, "rb") as file:
            return offset == 0 or any(end == offset for _, end in decode(file.read(offset)))

    def checksum(self, begin: int, end: int, before: int | None) -> int:
        """CRC-32 of the journal up to ``end``, given that up to ``begin``."""
        begin = begin if before is not None else 0
        with open(self.path, "rb") as file:
            file.seek(begin)
            return zlib.crc32(file.read(end - begin), before or 0)

    def position(self, offset: int, checksum: int | None) -> int | None:
        """``offset`` if the journal up to there is what it was, so that one may go on behind it; else None.

        Args:
            checksum: of the journal up to there; None: it is not known, and a record has to end there.
        """
        if (offset, checksum) in self._checked:
            return offset if self.path.stat().st_size >= offset else None
        if self.path.stat().st_size < offset:
            return None
        holds = self.is_boundary(offset) if checksum is None else self.checksum(0, offset, None) == checksum
        self._checked = {(offset, checksum)} if holds else set()
        return offset if holds else None

    def sync(self) -> None:
        """Bring what was appended, by whomever, to the disk."""
        if self._file:
            os.fsync(self._file.fileno())
        else:
            atomic.sync(self.path)

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def artifact(self, path: str) -> Path:
        """Where an artifact waits that is not in its store yet."""
        return self.folder / "artifacts" / path


@contextmanager
def try_lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock ``path``, if nobody else does or once nobody else does: yields whether."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def is_alive(folder: Path) -> bool:
    """Whether the training that writes this journal is at work."""
    with try_lock(folder / "alive") as free:
        return not free


def final_status(records: list[tuple[Record, int]]) -> str | None:
    """The status a run ended with; None where it did not end or was resumed."""
    for record, _ in reversed(records):
        if "status" in record:
            return record["status"][0]
        if "resume" in record or "start" in record:
            return None
    return None


def journals(root: Path) -> list[Path]:
    """The journals below ``root``, newest first."""
    return sorted(
        (path.parent for path in root.glob("*/records")), key=lambda folder: folder.stat().st_ctime_ns, reverse=True
    )


def find_journal(root: Path, run: str) -> Path | None:
    """The journal of a run on this machine, by the journal's id or the run's."""
    return next((folder for folder in journals(root) if run in (folder.name, State(folder).run_id)), None)


def delivered_run(run: str, root: Path = Path(JOURNALS)) -> str:
    """MLflow's id of a run, given that or the id of its journal.

    Raises:
        UserError: MLflow does not have it yet.
    """
    folder = find_journal(root, run)
    if folder is None:
        return run
    run_id = State(folder).run_id
    if not run_id:
        raise UserError(f"run {run} has not reached MLflow yet; python -m lightning_glue.sync {run} delivers it")
    return run_id
