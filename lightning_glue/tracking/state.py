"""How far a journal is delivered: what its courier remembers beside it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from lightning_glue.errors import UserError
from lightning_glue.utils import files
from lightning_glue.utils.paths import artifact_uri, checkpoint_name, local_folder, sqlite_file, sqlite_uri

Manifest = dict[str, dict[str, str]]  # checkpoint: {"file": where in the store, "sha256": of it}
_RELATIVE = "journal:"  # in front of a path from the journal's folder: it holds where the project is moved
_RECORDS = {"uri": str, "run_id": str, "run_name": str, "artifact_uri": str, "offset": int, "prefix": int}
_RECORDS |= {"record_error": str, "fatal": bool, "note": str, "orphan": bool, "left_out": dict, "experiment_id": str}
_UPLOADS = {"uploads": int, "uploads_prefix": int, "manifest": dict, "leftover": list, "refused": dict}
_UPLOADS |= {"adopted": bool, "noted": str, "registered": str, "upload_error": str}


class State:
    """Two positions in one journal, each kept in a file of its own that is replaced whole.

    ``delivery.json``: parameters, metrics, tags, inputs and status. ``uploads.json``: artifacts, never further on.
    Only known values of the right type are read. A file that cannot be read counts as missing: what it knew is found
    again, and sending twice changes nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri: str | None = None
        self.run_id: str | None = None
        self.run_name = ""
        self.experiment_id = ""  # unknown to journals of earlier versions
        self.artifact_uri = ""
        self.offset = 0
        self.prefix: int | None = None  # CRC-32 of the journal up to the offset
        self.record_error: str | None = None  # why the last attempt failed
        self.fatal = False  # it will never work
        self.orphan = False  # the run that belongs above this one is not known yet
        self.note = ""  # what a person should know
        self.left_out: dict[str, str] = {}  # record: why the store refused it for good
        self.uploads = 0
        self.uploads_prefix: int | None = None
        self.manifest: Manifest = {}  # of the checkpoints in a remote store
        self.adopted = False  # whether the store was asked for what it has
        self.leftover: list[str] = []  # checkpoints that may be in the store and are in no manifest
        self.refused: dict[str, str] = {}  # artifact: why the store refused it for good
        self.noted = ""  # what the run's tag says about that
        self.registered = ""  # name and version of the run's model
        self.upload_error: str | None = None
        self._read()

    @property
    def path(self) -> Path:
        return self.folder / "delivery.json"

    @property
    def uploads_path(self) -> Path:
        return self.folder / "uploads.json"

    @property
    def error(self) -> str | None:
        """Why the last attempt failed."""
        return self.record_error or self.upload_error

    def is_delivered(self, size: int) -> bool:
        """Whether the first ``size`` bytes of the journal have reached the server, or were refused for good."""
        return self.offset >= size and self.uploads >= size

    def save(self) -> None:
        """Keep what is known of the records."""
        kept = {name: getattr(self, name) for name in _RECORDS}
        _write(self.path, kept | self._addresses())

    def save_uploads(self) -> None:
        """Keep what is known of the artifacts."""
        _write(self.uploads_path, {name: getattr(self, name) for name in _UPLOADS})

    def _read(self) -> None:
        found = self._load(self.path, _RECORDS)
        older = _load(self.path) or {}
        if found and "prefix" not in older:  # of an earlier version: one position, one file
            self.uploads, self.uploads_prefix = self.offset, None
            self.record_error = older.get("error") if isinstance(older.get("error"), str) else None
            self.registered = str(older.get("registered") or "")
            self.manifest = _earlier_manifest(older.get("uploaded"))
        self._load(self.uploads_path, _UPLOADS)
        self.manifest = clean_manifest(self.manifest)
        self.leftover = [name for name in self.leftover if _is_checkpoint(name)]
        self.offset, self.uploads = max(self.offset, 0), max(self.uploads, 0)
        self.uri, self.artifact_uri = self._found_again()

    def _load(self, path: Path, known: dict[str, type]) -> bool:
        values = _load(path)
        if values is None:
            if path.exists():
                self.note = f"{path} was damaged; what it said is found again, and everything is sent once more"
            return False
        for name, kind in known.items():
            value = values.get(name)
            if type(value) is kind:
                setattr(self, name, value)
        return True

    def _addresses(self) -> dict[str, str | None]:
        """Addresses as they are kept: inside of the project that has the journal relative to that."""
        database, store = sqlite_file(self.uri), local_folder(self.artifact_uri)
        here = self.folder.resolve()
        if not database or database.parent.resolve() not in here.parents:
            return {"uri": self.uri, "artifact_uri": self.artifact_uri}
        kept: dict[str, str | None] = {"artifact_uri": self.artifact_uri}
        kept["uri"] = _RELATIVE + os.path.relpath(database.resolve(), here)
        if store and database.parent.resolve() in store.resolve().parents:
            kept["artifact_uri"] = _RELATIVE + os.path.relpath(store.resolve(), here)
        return kept

    def _found_again(self) -> tuple[str | None, str]:
        """The addresses as they are now. What is remembered as an absolute path is looked for where this journal is."""
        here = self.folder.resolve()
        uri, store = self.uri, self.artifact_uri
        if uri and uri.startswith(_RELATIVE):
            uri = sqlite_uri(Path(os.path.normpath(here / uri.removeprefix(_RELATIVE))))
        if store.startswith(_RELATIVE):
            return uri, artifact_uri(Path(os.path.normpath(here / store.removeprefix(_RELATIVE))))
        before = sqlite_file(uri)
        if before and not before.exists():
            moved = next((parent for parent in here.parents if (parent / before.name).is_file()), None)
            old = local_folder(store)
            if moved:
                uri = sqlite_uri(moved / before.name)
                if old and before.parent in old.parents and not old.exists():
                    store = artifact_uri(moved / old.relative_to(before.parent))
        return uri, store


def clean_manifest(values: Any) -> Manifest:
    """What of a manifest's content can be trusted: entries that name checkpoints, each with a SHA-256."""
    kept: Manifest = {}
    for path, entry in values.items() if isinstance(values, dict) else ():
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            continue
        if _is_checkpoint(path) and _is_checkpoint(entry.get("file")):
            kept[path] = {"file": entry["file"], "sha256": digest}
    return kept


def version_name(path: str, digest: str) -> str:
    """Where a checkpoint is kept in a remote store: under a name of its own for every content."""
    return f"checkpoints/{Path(path).stem}-{digest[:12]}{Path(path).suffix}"


def _earlier_manifest(uploaded: Any) -> Manifest:
    known = uploaded.items() if isinstance(uploaded, dict) else ()
    return clean_manifest({path: {"file": version_name(path, str(sha)), "sha256": sha} for path, sha in known})


def _is_checkpoint(name: Any) -> bool:
    try:
        return bool(checkpoint_name(name))
    except UserError:
        return False


def _load(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _write(path: Path, values: dict[str, Any]) -> None:
    with files.new_file(path) as file:
        os.fchmod(file.fileno(), 0o600)  # an address may hold a password
        json.dump(values, file)
