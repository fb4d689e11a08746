"""Files and folders that appear whole or not at all, and a lock between processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightning_glue.errors import UserError
from lightning_glue.utils import digests

CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR})


def cannot_write(path: Path, error: OSError) -> str:
    """A user's words for an error in :data:`CANNOT_WRITE`."""
    return (
        f"cannot write {path}: {error.strerror}; free space, get rights there, or choose another folder "
        "(LIGHTNING_GLUE_CACHE: for caches)"
    )


def make_folder(folder: Path, option: str) -> None:
    """Make the folder a user named with ``option``; raises :class:`UserError` where none can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be made: {error.strerror}; choose another folder") from None


def sync(path: Path) -> None:
    """Bring a file or the names in a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_file(target: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Yield a temporary file that takes the place of ``target`` when the block ends without an error."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of ``target`` across processes and threads; its folder is made. Not reentrant."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.with_name(f".{target.name}.lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write below {target.parent}: {error.strerror}; set LIGHTNING_GLUE_CACHE to a writable folder"
        ) from error
    with file:  # closing the file releases the lock
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def leftovers(target: Path) -> list[Path]:
    """Temporary folders of :func:`new_folder` for ``target``: of a process at work, or of one that was killed."""
    return [path for path in target.parent.glob(".*.part") if _target_name(path) == target.name and path.is_dir()]


def _target_name(part: Path) -> str | None:
    found = re.fullmatch(r"\.(.+)\.[^.]+\.part", part.name)
    return found[1] if found else None


def sweep(target: Path) -> None:
    """Remove what killed processes left of ``target``, whose lock the caller holds, and of its neighbours."""
    for part in leftovers(target):
        shutil.rmtree(part, ignore_errors=True)
    for part in target.parent.glob(".*.part"):
        name = _target_name(part)
        lock = part.with_name(f".{name}.lock")
        if name == target.name or not part.is_dir() or not lock.is_file():
            continue
        with contextlib.suppress(OSError), lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by a process at work on it
            shutil.rmtree(part, ignore_errors=True)


def discard(target: Path) -> None:
    """Remove a file or folder at once, as far as other processes see: its lock is held by the caller."""
    away = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    target.rename(away)
    if away.is_dir() and not away.is_symlink():
        shutil.rmtree(away, ignore_errors=True)
    else:
        away.unlink()


@contextmanager
def new_folder(target: Path, *, recorded: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``target`` when the block ends without an error.

    A ``target`` that is there already and not empty raises :class:`UserError` before anything is done.

    Args:
        recorded: the digests of its files are written into it (see :mod:`lightning_glue.utils.digests`).
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists already; remove it or choose another folder")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if recorded:
            digests.record(temporary)
        for path in sorted(temporary.rglob("*")):
            sync(path)
        os.rename(temporary, target)
        sync(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            raise UserError(cannot_write(target, error)) from error
        raise
