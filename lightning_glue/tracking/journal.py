"""The journal of a run: every parameter, metric, tag and artifact in the order it came, safe against any interruption.

A journal is a folder that only its user can read. Its file ``records`` only ever grows: each record is its length and
its CRC-32, four bytes each, little-endian, then JSON in printable ASCII. Nothing in it is ever moved or cut: readers
skip what is damaged, writers go on behind whatever is there, and a position stays valid. The file of a finished run may
be replaced by a short one, see :mod:`lightning_glue.tracking.pruning`; writers notice.
The process that trains holds the lock ``alive``, which the kernel frees however the process ends.

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

import errno
import fcntl
import json
import os
import re
import time
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lightning_glue.utils import files
from lightning_glue.utils.logs import log

Record = dict[str, Any]
_HEAD = 8
_MOST = 1 << 28  # bytes of a record; a longer one is damage
_TEXT = re.compile(rb"[ -~]*")  # a payload; no head is such text, for the last byte of a length is below 17
_WINDOW = 1 << 12  # bytes of the end that are looked at first
_PIECE = 1 << 20  # bytes looked through at once
TELLS_STATUS = (b'{"status"', b'{"resume"', b'{"start"')
_said: set[str] = set()


def warn(text: str) -> None:
    """Say something, once in the life of this process."""
    if text not in _said:
        _said.add(text)
        log.warning("%s", text)


def encode(record: Record) -> bytes:
    payload = json.dumps(record, separators=(",", ":")).encode()
    length = len(payload).to_bytes(4, "little")
    return length + zlib.crc32(length + payload).to_bytes(4, "little") + payload


def _length(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 4], "little")


def _record_at(data: bytes, place: int) -> tuple[Record, int] | None:
    """The record at ``place`` and the position of its end, if it is whole."""
    begin = place + _HEAD
    end = begin + _length(data, place)
    if not begin < end <= begin + _MOST or end > len(data):
        return None
    payload = data[begin:end]
    if zlib.crc32(payload, zlib.crc32(data[place : place + 4])) != _length(data, place + 4):
        return None
    try:
        record = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    return (record, end) if isinstance(record, dict) else None


def _next_record(data: bytes, place: int) -> int | None:
    """Where the next whole record begins, from ``place`` on.

    Every payload begins with an object's first key and is text, which a head is not. So five heads at most are tried
    for each piece of text, and the time is linear in the data whatever they are.
    """
    text = data.find(b'{"', place + _HEAD)
    while text >= 0:
        length = _length(data, text - _HEAD)
        if 0 < length <= _MOST and _TEXT.fullmatch(data, text, text + length) and _record_at(data, text - _HEAD):
            return text - _HEAD
        text = data.find(b'{"', text + 1)
    return None


def scan(data: bytes) -> Iterator[tuple[Record | None, int, int]]:
    """The whole records in ``data`` with their begin and end; None for what is damaged between two of them.

    What follows the last whole record is left out: it may be a record that is just being written.
    """
    place = 0
    while place < len(data):
        begin = place
        found = _record_at(data, begin)
        if found is None:
            following = _next_record(data, place + 1)
            found = None if following is None else _record_at(data, following)
            if following is None or found is None:
                return
            yield None, place, following
            begin = following
        record, end = found
        yield record, begin, end
        place = end


def decode(data: bytes) -> Iterator[tuple[Record, int]]:
    """The whole records in ``data``, each with the position of its end; what is damaged is skipped."""
    return ((record, end) for record, _, end in scan(data) if record is not None)


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class Journal:
    """Reads and appends; several processes and threads may append, each through an object of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "records"
        self.damaged: list[tuple[int, int]] = []  # what reading skipped
        self._file: IO[bytes] | None = None
        self._checked = deque[tuple[int, int | None]](maxlen=4)  # positions that were found to hold
        self._status: tuple[int, str | None] | None = None  # up to where it was looked for, and what it was

    def read(self, offset: int = 0, end: int | None = None) -> list[tuple[Record, int]]:
        """Records from ``offset`` (the end of one) on, each with the position of its end.

        What is damaged is skipped, kept in :attr:`damaged` and said once.

        Args:
            end: none that ends behind it; None: all.
        """
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = file.read() if end is None else file.read(max(0, end - offset))
        records: list[tuple[Record, int]] = []
        for record, begin, end in scan(data):
            if record is not None:
                records.append((record, offset + end))
            elif (offset + begin, offset + end) not in self.damaged:
                self.damaged.append((offset + begin, offset + end))
                warn(
                    f"the journal {self.path} is damaged from byte {offset + begin} to {offset + end}: what was "
                    "recorded there is left out, all before and after it counts; nothing was removed from the file"
                )
        return records

    def pieces(self, offset: int, size: int) -> Iterator[list[tuple[Record, int]]]:
        """What :meth:`read` returns, in pieces of about ``size`` bytes, so that a long journal is not held whole."""
        whole = self.path.stat().st_size  # what is written meanwhile is for the next time
        while offset < whole:
            length = size
            records = self.read(offset, min(offset + length, whole))
            while not records and offset + length < whole:  # a record that is longer, or damage
                length *= 2
                records = self.read(offset, min(offset + length, whole))
            if not records:
                return
            yield records
            offset = records[-1][1]

    def start(self) -> Record | None:
        """What the run was started with; None where the journal does not tell."""
        with open(self.path, "rb") as file:
            found = self._at(file, 0)
        if found:
            start = found[0].get("start")
        else:
            start = next((record["start"] for record, _ in self.read() if "start" in record), None)
        return start if isinstance(start, dict) else None

    def status(self) -> str | None:
        """The status the run ended with; None where it did not end or was resumed.

        Looks from the end back to what tells it, and the next time at what has come since.
        """
        end = self.end()
        looked, value = self._status if self._status and self._status[0] <= end else (0, None)
        if found := self.newest(*TELLS_STATUS, after=looked):
            value = final_status([found])
        self._status = (end, value)
        return value

    def newest(self, *begins: bytes, after: int = 0) -> tuple[Record, int] | None:
        """The last whole record whose JSON begins with one of ``begins``, and its end; no other record is decoded.

        Args:
            after: only records behind this position.
        """
        overlap = max(map(len, begins)) - 1
        with open(self.path, "rb") as file:
            end, length = self.path.stat().st_size, _WINDOW
            while end > after:
                start, length = max(after, end - length), min(16 * length, _PIECE)
                file.seek(start)
                data = file.read(end + overlap - start)
                place = len(data)
                while (place := max(data.rfind(one, 0, place + len(one) - 1) for one in begins)) >= 0:
                    if found := self._at(file, start + place - _HEAD):
                        return found
                end = start
        return None

    def _at(self, file: IO[bytes], place: int) -> tuple[Record, int] | None:
        if place < 0:
            return None
        file.seek(place)
        head = file.read(_HEAD)
        left = os.fstat(file.fileno()).st_size - place
        found = _record_at(head + file.read(min(_length(head, 0), left)), 0)  # damage may say any length
        return (found[0], place + found[1]) if found else None

    def end(self) -> int:
        """Where the last whole record ends."""
        return next((records[-1][1] for records in self._last(self.path.stat().st_size) if records), 0)

    def is_boundary(self, offset: int) -> bool:
        """Whether a whole record ends at ``offset``, or it is 0: whether reading may go on there."""
        if not 0 < offset <= self.path.stat().st_size:
            return offset == 0
        for records in self._last(offset):
            if records:
                return records[-1][1] == offset
        return False

    def _last(self, end: int) -> Iterator[list[tuple[Record, int]]]:
        """The last records before ``end``, then more of them, at last all."""
        window = _WINDOW
        with open(self.path, "rb") as file:
            while True:
                begin = max(0, end - window)
                file.seek(begin)
                yield [(record, begin + after) for record, after in decode(file.read(end - begin))]
                if not begin:
                    return
                window *= 16

    def append(self, record: Record) -> None:
        """Write a record behind all that is there.

        Raises:
            OSError: the disk is full, for instance; the journal is then as it was before.
        """
        with self.locked() as file:
            before = os.fstat(file.fileno()).st_size
            data = encode(record)
            try:
                while data:  # what did not fit: asking again tells why
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(before)
                raise

    @contextmanager
    def locked(self) -> Iterator[IO[bytes]]:
        """The file, open for appending, to which nobody else appends meanwhile."""
        while True:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0, opener=_private)  # noqa: SIM115 - close() closes it
                with suppress(OSError):
                    os.fchmod(self._file.fileno(), 0o600)  # a journal of earlier versions
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if self._is_current(self._file):
                break
            self.close()  # which frees the lock
        try:
            yield self._file
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _is_current(self, file: IO[bytes]) -> bool:
        """Whether ``file`` is the journal still: that of a finished run may have been replaced."""
        opened = os.fstat(file.fileno())
        try:
            there = os.stat(self.path)
        except FileNotFoundError:  # taken back: what is written goes with it
            return True
        return (opened.st_ino, opened.st_dev) == (there.st_ino, there.st_dev)

    def checksum(self, begin: int, end: int, before: int | None) -> int:
        """CRC-32 of the journal up to ``end``, given that up to ``begin``."""
        begin = begin if before is not None else 0
        with open(self.path, "rb") as file:
            file.seek(begin)
            return zlib.crc32(file.read(end - begin), before or 0)

    def advance(self, begin: int, end: int, before: int | None) -> int:
        """:meth:`checksum` up to ``end``, a position that :meth:`position` then takes without reading it again."""
        checksum = self.checksum(begin, end, before)
        self._checked.append((end, checksum))
        return checksum

    def position(self, offset: int, checksum: int | None) -> int | None:
        """``offset`` if the journal up to there is what it was, so that one may go on behind it; else None.

        Args:
            checksum: of the journal up to there; None: it is not known, and a record has to end there.
        """
        if (offset, checksum) in self._checked:
            self._checked.remove((offset, checksum))  # the one that was asked for longest ago is forgotten
            self._checked.append((offset, checksum))
            return offset if self.path.stat().st_size >= offset else None
        if self.path.stat().st_size < offset:
            return None
        holds = self.is_boundary(offset) if checksum is None else self.checksum(0, offset, None) == checksum
        if not holds:
            return None
        self._checked.append((offset, checksum))
        return offset

    def sync(self) -> None:
        """Bring what was appended, by whomever, to the disk."""
        files.sync(self.path)

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def artifact(self, path: str) -> Path:
        """Where an artifact waits that is not in its store yet."""
        return self.folder / "artifacts" / path


def _open_lock(path: Path) -> IO[bytes] | None:
    """The file of a lock, made if need be; None where it neither is nor can be made: nobody holds it then."""
    try:
        return open(path, "ab", opener=_private)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        with suppress(FileNotFoundError):
            return open(path, "rb")  # in a folder that can only be read
        return None


@contextmanager
def try_lock(path: Path, *, wait: bool = False, shared: bool = False) -> Iterator[bool]:
    """Hold the lock ``path``, if nobody else does or once nobody else does: yields whether.

    Args:
        shared: together with others who hold it so.
    """
    file = _open_lock(path)
    if file is None:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def is_alive(folder: Path) -> bool:
    """Whether the training that writes this journal is at work."""
    with try_lock(folder / "alive", shared=True) as free:
        return not free


def final_status(records: list[tuple[Record, int]]) -> str | None:
    """The status a run ended with; None where it did not end or was resumed."""
    for record, _ in reversed(records):
        if "status" in record:
            told = record["status"]
            return told[0] if isinstance(told, list) and told else None
        if "resume" in record or "start" in record:
            return None
    return None
