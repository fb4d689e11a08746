"""SHA-256 of files, and a record of them in every folder of the cache, compared when the folder is used."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lightning_glue.errors import UserError

RECORD = ".sha256sums"  # in the format of the program sha256sum, paths below the folder

_known: dict[tuple[str, int, int, int], str] = {}


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """:func:`file_sha256`, remembered in this process for as long as the file is not written to or replaced."""
    state = os.stat(path)
    key = (os.fspath(path), state.st_ino, state.st_size, state.st_mtime_ns)
    if key not in _known:
        _known[key] = file_sha256(path)
    return _known[key]


def record(folder: Path) -> None:
    """Write the digests of all files in ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    lines = [f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / RECORD).write_text("".join(lines), encoding="utf-8")


def recorded(folder: Path) -> dict[str, str]:
    """The digests in the record of ``folder`` by path below it; empty where there is none.

    Raises:
        UserError: the record is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        pairs = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        return {name: digest for digest, name in pairs}
    except (ValueError, OSError):
        raise UserError(f"{path} is damaged; delete {folder} and run again") from None


def expected_sha256(path: Path, *folders: Path) -> str | None:
    """The digest that the record of one of ``folders`` has for ``path``."""
    found = (recorded(folder).get(path.relative_to(folder).as_posix()) for folder in folders)
    return next((digest for digest in found if digest), None)


def check(path: Path, found: str | None, *folders: Path) -> None:
    """Raise UserError where ``path``, with the digest ``found`` (None: it is gone), is not as recorded."""
    for folder in folders:
        expected = expected_sha256(path, folder)
        if expected and expected != found:
            state = f"has sha256 {found}, expected {expected}" if found else "is gone"
            raise UserError(f"{path} is not what was put into the cache: it {state}; delete {folder} and run again")


def fault(folder: Path) -> str:
    """What is wrong with a folder that must be exactly as it was made; empty if nothing is."""
    if not folder.is_dir():
        return "is no folder"
    try:
        digests = recorded(folder)
        wrong = [name for name, digest in digests.items() if known_sha256(folder / name) != digest]
    except (UserError, OSError, ValueError) as error:
        return f"is damaged ({error})"
    if wrong:
        return f"is damaged ({wrong[0]} has another sha256 than when it was made)"
    return "" if digests else "has no digests"
