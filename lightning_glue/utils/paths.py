"""Names and addresses that become paths of this machine: checked first, for they come from stores and journals."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlparse

from lightning_glue.errors import ConfigError, UserError

_CHECKPOINT = re.compile(r"checkpoints/[A-Za-z0-9_][\w.-]*\.ckpt", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_WEIGHTS = (".pt", ".ckpt", ".bin", ".safetensors")
_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///([^?]*)")


def checkpoint_name(text: object) -> str:
    """``text`` if it names a checkpoint among a run's artifacts, such as ``checkpoints/last.ckpt``.

    Raises:
        UserError: it is something else, a path that leads elsewhere for instance.
    """
    if not isinstance(text, str) or not _CHECKPOINT.fullmatch(text):
        raise UserError(f"{str(text)[:100]!r} names no checkpoint of a run; expected checkpoints/<name>.ckpt")
    return text


def artifact_path(text: object) -> str:
    """``text`` if it is a path below a folder of artifacts, relative and without detours.

    Raises:
        UserError: it is something else.
    """
    plain = isinstance(text, str) and not re.search(r"[\\\x00-\x1f\x7f]", text)
    if not plain or any(part in ("", ".", "..") for part in str(text).split("/")):
        raise UserError(f"{str(text)[:100]!r} is no path of an artifact; expected one below the run's artifact folder")
    return str(text)


def local_folder(artifact_uri: str) -> Path | None:
    """The folder behind an artifact URI; None for a remote store.

    What has no scheme is a path as it stands; only a ``file:`` URI is quoted. MLflow unquotes both: where a run's files
    went to the unquoted path, that is it.
    """
    if artifact_uri.startswith("file:"):
        from urllib.request import url2pathname  # brings http.client along, which no argument error needs

        return Path(url2pathname(urlparse(artifact_uri).path))
    if not artifact_uri or re.match(r"[A-Za-z][\w+.-]+:", artifact_uri):
        return None
    path, unquoted = Path(artifact_uri), Path(unquote(artifact_uri))
    return unquoted if path != unquoted and unquoted.exists() and not path.exists() else path


def artifact_uri(folder: Path) -> str:
    """The address of a local artifact folder that MLflow reads rightly, whatever the folder is called."""
    return folder.as_uri() if re.search("[#?%]", str(folder)) else str(folder)


def sqlite_file(uri: str | None) -> Path | None:
    """The database behind an SQLite address, absolute; None for another store and for a database in memory."""
    found = _SQLITE.match(uri or "")
    name = unquote(found[1]) if found else ""
    return Path(name).absolute() if name and not name.startswith((":memory:", "file:")) else None


def sqlite_uri(database: Path) -> str:
    """The address of a database; what SQLAlchemy would take for more than a path is quoted, and nothing else."""
    return f"sqlite:///{str(database.absolute()).replace('%', '%25').replace('?', '%3F')}"


def plain_name(text: object, what: str) -> str:
    """``text`` if it may be the name of a folder, of an experiment and of a registered model alike.

    Raises:
        ConfigError: it is something else, a path for instance.
    """
    if not isinstance(text, str) or not _NAME.fullmatch(text):
        raise ConfigError(
            f"{what} {str(text)[:80]!r} cannot be a name; expected letters of ASCII, digits, '_', '-' and '.', a "
            "letter or digit first, 64 at most"
        )
    return text


def is_hub_name(text: str) -> bool:
    """Whether ``text`` is ``owner/name`` of a model of the Hugging Face hub; a path that exists is always a path."""
    return bool(_HUB.fullmatch(text)) and not text.endswith(_WEIGHTS) and not Path(text).exists()
