"""Fetch files over HTTP and unpack them, never leaving half a file or half a folder behind.

A file grows as ``<name>.part`` and takes its name only when it is complete and its digest is right; a folder is built
under a temporary name beside its place. A lock file ``.<name>.lock`` beside the target keeps two processes apart.
"""

from __future__ import annotations

import base64
import bz2
import contextlib
import gzip
import http.client
import io
import logging
import lzma
import os
import shutil
import socket
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from lightning_glue.errors import DataError, UserError
from lightning_glue.utils.console import ProgressLines, draws_bars
from lightning_glue.utils.digests import file_sha256
from lightning_glue.utils.files import CANNOT_WRITE, cannot_write, locked, new_folder, sync
from lightning_glue.utils.redact import first_line, hide_secrets

log = logging.getLogger(__name__)

ATTEMPTS = 6  # connections per download before giving up
DELAY = 1.0  # seconds before the second connection, doubled each time
TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 20
_LINE_SECONDS = 15.0  # between two lines that say how far a download is
_RETRIED_STATUS = frozenset({408, 416, 429, 500, 502, 503, 504})


def download(
    url: str,
    target: Path,
    sha256: str | None,
    *,
    label: str = "",
    advice: str = "",
    attempts: int = ATTEMPTS,
    delay: float = DELAY,
) -> Path:
    """Fetch ``url`` to ``target`` and return ``target``; an intact file that is there already is kept.

    A dropped connection is resumed where it stopped, up to ``attempts`` connections, waiting ``delay`` seconds and
    twice as long each time; an earlier run's ``.part`` file is resumed too. ``sha256`` is the expected hex digest. With
    ``None`` the digest of the first download is trusted and recorded in ``<name>.sha256`` beside the target, and later
    downloads must have it. A wrong digest is retried once from the start. ``label`` names the download in the progress
    bar, ``advice`` says in an error what else the user can do. Raises :class:`UserError`.
    """
    record = target.with_name(f"{target.name}.sha256")
    part = target.with_name(f"{target.name}.part")
    with locked(target):
        expected = sha256 or (record.read_text(encoding="ascii").strip() if record.is_file() else None)
        if target.is_file():
            found = file_sha256(target)
            if expected is not None and found != expected:
                raise DataError(f"{target} has sha256 {found}, expected {expected}; delete it and run again")
            _discard(part)  # of a download that was killed before the file was put here by hand
        else:
            advice = f"; {advice}" if advice else ""
            found = _fetch_verified(url, part, expected, label or target.name, advice, attempts, delay)
        if sha256 is None and expected is None:
            _write_text(record, f"{found}\n")
        if not target.is_file():
            os.replace(part, target)
            _validator(part).unlink(missing_ok=True)
            sync(target.parent)
    return target


def _fetch_verified(
    url: str, part: Path, expected: str | None, label: str, advice: str, attempts: int, delay: float
) -> str:
    """Bring ``part`` to the complete, verified file and return its sha256."""
    verified = expected is not None
    _fetch_whole(url, part, verified, label, advice, attempts, delay)
    found = file_sha256(part)
    if verified and found != expected:
        log.warning("%s: wrong sha256, downloading once more from the start", label)
        _discard(part)
        _fetch_whole(url, part, verified, label, advice, attempts, delay)
        found = file_sha256(part)
    if verified and found != expected:
        _discard(part)
        address = hide_secrets(url)
        raise DataError(
            f"{address} was damaged on the way or changed: expected sha256 {expected}, found {found}{advice}"
        )
    return found


def _fetch_whole(url: str, part: Path, verified: bool, label: str, advice: str, attempts: int, delay: float) -> None:
    """Connect until ``part`` holds the whole body; ``verified`` says that a digest will be checked afterwards."""
    with _progress(label) as progress:
        for attempt in range(1, attempts + 1):
            try:
                return _fetch(url, part, verified, progress)
            except (OSError, http.client.HTTPException) as error:
                fault = _describe(url, error)
                if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
                    raise DataError(cannot_write(part, error)) from error
                if attempt == attempts or not _worth_retrying(error):
                    raise DataError(f"{fault} ({hide_secrets(url)}, {attempt} attempts){advice}") from error
            wait = delay * 2 ** (attempt - 1)
            log.warning("%s; attempt %d of %d in %g s", fault, attempt + 1, attempts, wait)
            time.sleep(wait)


def _fetch(url: str, part: Path, verified: bool, progress: Callable[[int, int | None], None]) -> None:
    """Make one connection and append its body to ``part``; any trouble raises OSError or HTTPException."""
    have = part.stat().st_size if part.exists() else 0
    validator = _validator(part).read_text(encoding="latin-1") if _validator(part).is_file() else ""
    # Without digest and validator nothing would tell the old half of a changed file from the new one.
    if have and not (verified or validator):
        have = 0
    request = _request(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
        if validator:
            request.add_header("If-Range", validator)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            resumed = have > 0 and response.status == 206 and _range_start(response.headers) == have
            _receive(response, part, have if resumed else 0, progress)
    except urllib.error.HTTPError as error:
        # 416: the file ends at or before ours; equal length means that only the renaming was missing.
        if error.code == 416 and error.headers.get("Content-Range", "").strip() == f"bytes */{have}":
            return
        if error.code == 416:
            _discard(part)
        raise


def _request(url: str) -> urllib.request.Request:
    """A request for ``url``; its user and password, percent-encoded, go to this host alone, not where it redirects."""
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    plain = parts._replace(netloc=host).geturl() if at else url
    request = urllib.request.Request(plain, headers={"User-Agent": "lightning-glue", "Accept-Encoding": "identity"})
    if at:
        name, _, password = user.partition(":")
        pair = f"{urllib.parse.unquote(name)}:{urllib.parse.unquote(password)}".encode()
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair).decode('ascii')}")
    return request


def _receive(
    response: http.client.HTTPResponse, part: Path, have: int, progress: Callable[[int, int | None], None]
) -> None:
    """Write the body to ``part`` from byte ``have`` on; a body shorter than announced raises ConnectionError."""
    if response.status == 206 and not have:
        _discard(part)
        raise ConnectionError("the server sent another range than asked for")
    length = response.headers.get("Content-Length")
    total = have + int(length) if length is not None and length.isdigit() else None
    if not have:
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        _discard(part)
        if tag and not tag.startswith("W/"):  # a weak tag does not promise the same bytes
            _write_text(_validator(part), tag)
    with part.open("ab") as file:
        progress(have, total)
        while chunk := response.read1(_CHUNK):
            file.write(chunk)
            have += len(chunk)
            progress(have, total)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and have != total:
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")


def _range_start(headers: http.client.HTTPMessage) -> int | None:
    unit, _, rest = headers.get("Content-Range", "").strip().partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdigit() else None


def _worth_retrying(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _RETRIED_STATUS
    # An unknown host is nearly always a machine without network: answer at once.
    return not (isinstance(error, urllib.error.URLError) and isinstance(error.reason, socket.gaierror))


def _describe(url: str, error: Exception) -> str:
    host = urllib.parse.urlsplit(url).netloc.rpartition("@")[2] or hide_secrets(url)
    if isinstance(error, urllib.error.HTTPError):
        return f"{host} answered {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return f"cannot download from {host}: {text}"


def _validator(part: Path) -> Path:
    """File with the ETag or Last-Modified of the body that ``part`` was started from."""
    return part.with_name(f"{part.name}.tag")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator(part).unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="latin-1") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield ``update(done, total)`` in bytes: a bar on a terminal, else a line at start and end and some between."""
    if not draws_bars():
        done_bytes = 0
        lines = ProgressLines(label, lambda size: f"{size / 1e6:.1f} MB", _LINE_SECONDS)

        def note(done: int, total: int | None) -> None:
            nonlocal done_bytes
            done_bytes = done
            lines.update(done, total)

        log.info("downloading %s", label)
        yield note
        log.info("downloaded %s (%.1f MB)", label, done_bytes / 1e6)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def extract_zip(archive: Path, out: Path, members: Iterable[str]) -> None:
    """Unpack ``members`` of a zip's single top folder (or of its root) as the new folder ``out``, all or nothing.

    Only these names are ever written, whatever paths the archive holds, and at most :func:`_most_bytes`. Raises
    :class:`UserError` for a damaged archive or a missing member.
    """
    with _damaged(archive), zipfile.ZipFile(archive) as source:
        entries = {info.filename: info for info in source.infolist() if not info.is_dir()}
        chosen = {name: entries[path] for name, path in _choose(archive, entries, members).items()}
        _check_size(archive, sum(info.file_size for info in chosen.values()))
        with new_folder(out, recorded=True) as folder:
            for name, info in chosen.items():
                with source.open(info) as content:  # read to its end, its checksum is compared
                    _write(folder / name, content)


def extract_tar(archive: Path, out: Path, members: Iterable[str]) -> None:
    """Unpack ``members`` of a tar archive (plain or compressed); otherwise as :func:`extract_zip`.

    The archive is read twice: to its end, where the checksum of what was compressed stands, before anything is written.
    """
    with _damaged(archive):
        with _tar(archive) as source:
            entries = {info.name: info for info in source if info.isreg()}  # of doubled names the last one
        chosen = {entries[path].offset: name for name, path in _choose(archive, entries, members).items()}
        with _tar(archive) as source, new_folder(out, recorded=True) as folder:
            for info in source:
                if info.offset in chosen:
                    content = source.extractfile(info)
                    assert content is not None  # only regular files were chosen
                    _write(folder / chosen[info.offset], content)


@contextlib.contextmanager
def _tar(archive: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive to be read in its order; what the caller leaves of it is read when the block ends."""
    with _decompressed(archive) as file:
        stream = _Bounded(archive, file)
        with tarfile.open(fileobj=stream, mode="r|") as source:
            yield source
        while stream.read(_CHUNK):
            pass


def _decompressed(archive: Path) -> io.BufferedIOBase:
    with archive.open("rb") as file:
        start = file.read(6)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(archive, "rb")
    if start.startswith(b"BZh"):
        return bz2.open(archive, "rb")
    if start.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(archive, "rb")
    return archive.open("rb")


class _Bounded(io.BufferedIOBase):
    """A stream that raises :class:`UserError` once an archive has become larger than it may."""

    def __init__(self, archive: Path, file: io.BufferedIOBase) -> None:
        self.archive, self.file, self.done = archive, file, 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = self.file.read(size)
        self.done += len(content)
        _check_size(self.archive, self.done)
        return content


def _most_bytes(archive: Path) -> int:
    """What may come out of an archive: 30 times its size, and 16 MiB. GLUE's texts have 6 times, weights 2 at most."""
    return 30 * archive.stat().st_size + (16 << 20)


def _check_size(archive: Path, size: int) -> None:
    if size > _most_bytes(archive):
        raise DataError(
            f"{archive} holds more than {_most_bytes(archive) >> 20} MiB in {archive.stat().st_size} bytes, as no "
            "archive of texts or weights does; delete it and get it again"
        )


def _choose(archive: Path, paths: Iterable[str], members: Iterable[str]) -> dict[str, str]:
    """Map each member to its path in the archive."""
    tops: dict[str, dict[str, str]] = {}
    for path in paths:
        parts = PurePosixPath(path).parts
        if len(parts) <= 2 and not {"..", "/", "__MACOSX"} & set(parts):
            tops.setdefault("".join(parts[:-1]), {})[parts[-1]] = path
    wanted = list(members)
    best = max(tops.values(), key=lambda names: len(names.keys() & set(wanted)), default={})
    missing = [name for name in wanted if name not in best]
    if missing:
        raise DataError(f"{archive} holds no {', '.join(missing)} in its top folder; delete it and run again")
    return {name: best[name] for name in wanted}


def _write(path: Path, content: IO[bytes]) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(content, file, _CHUNK)


@contextlib.contextmanager
def _damaged(archive: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a damaged archive the libraries raise anything
        reason = first_line(error, 200)
        raise DataError(f"{archive} is not a readable archive: {reason}; delete it and run again") from error
