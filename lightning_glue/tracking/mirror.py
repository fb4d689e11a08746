"""Artifacts on their way from a journal to the run's store, and the manifest of the checkpoints there."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lightning_glue.tracking.state import Manifest, State, clean_manifest, version_name
from lightning_glue.utils import digests, files
from lightning_glue.utils.paths import artifact_path, checkpoint_name, local_folder
from lightning_glue.utils.redact import first_line, hide_secrets

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

MANIFEST = "checkpoints/manifest.json"
_CHECKPOINTS = "checkpoints/"
_VERSION = re.compile(r"checkpoints/[\w.-]+-[0-9a-f]{12}\.ckpt", re.ASCII)  # as version_name makes them
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_LEAST_SECONDS, _BYTES_PER_SECOND = 120, 1e6  # a server may pass an upload on to another store before it answers
_TEMPORARY = frozenset({404, 408, 409, 423, 425, 429, 499})  # a proxy on its way up, or a busy one
_SOON = frozenset({"RequestTimeout", "RequestTimeTooSkewed", "Throttling", "ThrottlingException", "SlowDown",
                   "RequestLimitExceeded", "ExpiredToken", "RequestExpired"})  # codes of S3 that pass by  # fmt: skip
_NEVER = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
                    errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL})  # fmt: skip
_SETUP = frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError",
                    "ModuleNotFoundError", "ImportError"})  # fmt: skip


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it was raised from: stores wrap each other's."""
    seen: set[int] = set()
    while error and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def http_status(error: BaseException) -> int | None:
    """What a server answered, where that made an error of MLflow, requests or a cloud's client."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore
            if response.get("Error", {}).get("Code") in _SOON:
                return 503
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            code = getattr(one, "code", None)
            status = getattr(response, "status_code", None) or getattr(one, "status_code", None) or code
        if isinstance(status, int) and status >= 400:
            return int(status)
        if hasattr(one, "get_http_status_code") and one.get_http_status_code() != 500:
            return one.get_http_status_code()
    return None


def is_refusal(error: BaseException) -> bool:
    """Whether a store refused an artifact for good, so that trying again is in vain until a person does something."""
    status = http_status(error)
    if status is not None:
        missing = status == 404 and any(isinstance(getattr(one, "response", None), dict) for one in _chain(error))
        return missing or status in (501, 505) or (400 <= status < 500 and status not in _TEMPORARY)
    return any(
        type(one).__name__ in _SETUP or (isinstance(one, OSError) and one.errno in _NEVER) for one in _chain(error)
    )


def is_unreachable(error: BaseException) -> bool:
    """Whether nobody answered: then the next artifact need not be tried."""
    import requests

    lost = (requests.ConnectionError, requests.Timeout, ConnectionError, TimeoutError)
    return http_status(error) is None and any(isinstance(one, lost) for one in _chain(error))


@contextmanager
def _patience(size: int) -> Iterator[None]:
    """Let calls of this process wait as long as a file of so many bytes may take; MLflow asks the environment."""
    before = os.environ.get(_TIMEOUT)
    os.environ[_TIMEOUT] = str(max(_LEAST_SECONDS, math.ceil(size / _BYTES_PER_SECOND), int(before or 0)))
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TIMEOUT]
        else:
            os.environ[_TIMEOUT] = before


def read_manifest(path: Path) -> Manifest:
    """The trustworthy entries of a manifest; none where it is missing or damaged."""
    try:
        return clean_manifest(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def newest_copy(journal: Path, path: str, artifact_uri: str) -> Path:
    """Where the newer copy of an artifact is: in the run's local store, or waiting in its journal's folder."""
    staged, store = journal / "artifacts" / path, local_folder(artifact_uri)
    stored = store / path if store else None
    if not stored or not stored.exists():
        return stored if stored and not staged.exists() else staged
    newer = staged.exists() and staged.stat().st_mtime_ns > stored.stat().st_mtime_ns
    return staged if newer else stored


class Mirror:
    """The artifact store of one run.

    Args:
        state: where the store is and what it has; changed and saved as that changes.
    """

    def __init__(self, folder: Path, state: State) -> None:
        self.folder, self.state = folder, state
        self.local = local_folder(state.artifact_uri)
        self._store: ArtifactRepository | None = None

    @property
    def store(self) -> ArtifactRepository:
        if self._store is None:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            self._store = get_artifact_repository(self.state.artifact_uri, tracking_uri=self.state.uri)
        return self._store

    def put(self, path: str) -> None:
        """Bring an artifact to its store, unless it was written there; a checkpoint replaces the one before.

        Raises:
            UserError: the name leads elsewhere.
            Exception: the store is away or refuses.
        """
        artifact_path(path)
        is_checkpoint = path.startswith(_CHECKPOINTS)
        if is_checkpoint:
            checkpoint_name(path)
        source = newest_copy(self.folder, path, self.state.artifact_uri)
        if not source.is_file():
            return  # replaced by nothing, or delivered before and cleared away when the run was finished
        if self.local:
            self._keep(path, source, self.local / path)
        elif is_checkpoint:
            self._replace(path, source)
        else:
            with _patience(source.stat().st_size):
                self.store.log_artifact(str(source), os.path.dirname(path) or None)

    def evict(self, path: str) -> None:
        """Take a checkpoint out of the manifest, then out of its store."""
        checkpoint_name(path)
        (self.folder / "artifacts" / path).unlink(missing_ok=True)
        if self.local:
            if (self.local / MANIFEST).parent.is_dir():
                self._note_local(path, None)
                (self.local / path).unlink(missing_ok=True)
            return
        self._adopt()
        if path in self.state.manifest:
            self.state.leftover.append(self.state.manifest.pop(path)["file"])
            self.state.save_uploads()
            self._publish()

    def _adopt(self) -> None:
        """Learn once what checkpoints the store has: another machine may have begun the run."""
        if self.state.adopted:
            return
        stored = [item.path for item in self.store.list_artifacts(os.path.dirname(MANIFEST))]
        if MANIFEST in stored:
            with tempfile.TemporaryDirectory(prefix="lightning-glue-") as folder:
                self.store.download_artifacts(MANIFEST, folder)
                self.state.manifest = read_manifest(Path(folder, MANIFEST)) | self.state.manifest
        self.state.leftover = [*dict.fromkeys([*self.state.leftover, *filter(_VERSION.fullmatch, stored)])]
        self.state.adopted = True
        self.state.save_uploads()

    def _keep(self, path: str, source: Path, target: Path) -> None:
        """Put what was staged into a local store, whole or not at all; note a checkpoint in the manifest."""
        if source != target:
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
            try:
                shutil.copy2(source, part)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
        if path.startswith(_CHECKPOINTS):
            self._note_local(path, digests.file_sha256(target))

    def _note_local(self, path: str, digest: str | None) -> None:
        """Say which checkpoint there is and what its SHA-256 is; None: it is no more. A lost manifest is made anew."""
        assert self.local
        manifest = self.local / MANIFEST
        entries = read_manifest(manifest)
        if manifest.exists() and not entries:
            found = (f"{_CHECKPOINTS}{one.name}" for one in manifest.parent.glob("*.ckpt"))
            files = {name: {"file": name, "sha256": digests.file_sha256(self.local / name)} for name in found}
            entries = clean_manifest(files)
        entries.pop(path, None)
        if digest:
            entries[path] = {"file": path, "sha256": digest}
        _write(manifest, entries)

    def _replace(self, path: str, source: Path) -> None:
        """Upload under a name of its own, then point the manifest there, then delete all that no manifest names."""
        self._adopt()
        upload = self.folder / "upload"
        upload.mkdir(exist_ok=True)
        fixed = _fix(source, upload / source.name)  # the training may replace ``source`` meanwhile
        digest = digests.file_sha256(fixed)
        before = self.state.manifest.get(path)
        if before is None or digest != before["sha256"]:
            name = version_name(path, digest)
            self.state.leftover = [*dict.fromkeys([*self.state.leftover, name, *([before["file"]] if before else [])])]
            self.state.save_uploads()  # before the upload: what it leaves behind when it breaks off is known
            named = fixed.rename(upload / PurePosixPath(name).name)
            try:
                with _patience(named.stat().st_size):
                    self.store.log_artifact(str(named), os.path.dirname(MANIFEST))
            finally:
                named.unlink(missing_ok=True)
            self.state.manifest[path] = {"file": name, "sha256": digest}
        fixed.unlink(missing_ok=True)
        if self.state.leftover:
            self._publish()

    def _publish(self) -> None:
        """Upload the manifest, then delete the checkpoints that it does not name."""
        manifest = self.folder / "upload" / PurePosixPath(MANIFEST).name
        manifest.parent.mkdir(exist_ok=True)
        _write(manifest, self.state.manifest)
        with _patience(0):
            self.store.log_artifact(str(manifest), os.path.dirname(MANIFEST))
        named = {entry["file"] for entry in self.state.manifest.values()}
        self.state.leftover = [name for name in self.state.leftover if name not in named]
        self.state.save_uploads()
        for name in list(self.state.leftover):
            self._delete(name)
            self.state.leftover.remove(name)
        self.state.save_uploads()

    def _delete(self, name: str) -> None:
        try:
            self.store.delete_artifacts(name)
        except Exception as error:
            if not is_refusal(error) and http_status(error) != 404:  # gone, or kept by a store that deletes nothing
                raise


def _fix(source: Path, target: Path) -> Path:
    """Another name of a file that keeps its content; a copy where the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _write(manifest: Path, entries: dict[str, Any]) -> None:
    with files.new_file(manifest) as file:
        json.dump(entries, file, indent=2)


def usable_folder(artifact_uri: str) -> Path | None:
    """The run's artifact folder on this machine, made; None for a remote store, and where no such folder can be."""
    folder = local_folder(artifact_uri)
    if folder is None:
        return None
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


def brief(error: BaseException) -> str:
    """Why a store failed or refused: on one line, short enough for a tag."""
    cause = re.search(r"Caused by \w+\((.{1,150}?)\)*$", str(error))  # urllib3 says it last, and much before
    status = http_status(error)
    return (f"HTTP {status}: " if status else "") + (
        hide_secrets(cause[1].strip("'")) if cause else first_line(error, 200)
    )
