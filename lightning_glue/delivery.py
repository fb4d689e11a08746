"""From a journal to the tracking server: in order, in batches, each record once, however often it is interrupted.

The position is kept after every call. What a call was killed in is sent again, and does nothing the second time: the
run is looked up by its journal's id before it is created, and MLflow's stores keep one row for a metric of equal key,
time, step and value.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from lightning_glue import atomic
from lightning_glue.errors import UserError
from lightning_glue.journal import Journal, Record, State, final_status, try_lock
from lightning_glue.store import connect, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

JOURNAL_TAG = "lightning_glue.journal"  # id of the journal that writes the run
MANIFEST = "checkpoints/manifest.json"
_CHECKPOINT = re.compile(r"checkpoints/[\w.-]+\.ckpt", re.ASCII)
_METRICS, _PARAMS = 1000, 100  # what a call of log_batch may carry
_PARAM_LIMIT = 6000  # characters of a value MLflow stores


class Undelivered(Exception):
    """The server did not take a record; what follows it waits."""


def checkpoint_name(text: str) -> str:
    """A checkpoint's path below a run's artifacts, as a manifest or a journal names it.

    Raises:
        UserError: it is anything else, which could lead out of the folder.
    """
    if not isinstance(text, str) or not _CHECKPOINT.fullmatch(text):
        raise UserError(f"{str(text)[:200]!r} is no checkpoint's name; expected checkpoints/<name>.ckpt")
    return text


def local_folder(artifact_uri: str) -> Path | None:
    """The folder behind an artifact URI; None for a remote store."""
    parsed = urlparse(artifact_uri)
    return Path(url2pathname(parsed.path)) if artifact_uri and parsed.scheme in ("", "file") else None


class Courier:
    """Delivers one journal.

    Args:
        uri: where to, instead of where the training wanted it.
    """

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self.folder, self.uri = folder, uri
        self.journal, self.state = Journal(folder), State(folder)
        self._client: MlflowClient | None = None
        self._others: dict[str, set[int]] | None = None

    def deliver(self, *, wait: bool = False) -> int:
        """Send everything new; the number of records sent.

        Args:
            wait: where another process is delivering this journal, until it is through; else that one does it.

        Raises:
            Undelivered: the server is away or refuses.
        """
        import sqlalchemy.exc
        from mlflow.exceptions import MlflowException

        with try_lock(self.folder / "delivery.lock", wait=wait) as mine:
            if not mine:
                return 0
            self.state = State(self.folder)  # another process may have been here
            sent = 0
            try:
                for records, end in _batches(self.journal.read(self.state.offset)):
                    self._send(records)
                    self.state.offset, self.state.error = end, None
                    self._keep_state()
                    sent += len(records)
            except (MlflowException, OSError, sqlalchemy.exc.SQLAlchemyError) as error:
                self.state.error = reason(error)
                self.state.fatal = not self.state.run_id and self._hopeless(error)
                self._keep_state()
                raise Undelivered(self.state.error) from error
            if sent and self._is_complete():
                shutil.rmtree(self.folder / "artifacts", ignore_errors=True)
            return sent

    def _is_complete(self) -> bool:
        """Whether the training is finished and all of it delivered: more may have been written meanwhile."""
        records = self.journal.read()
        return final_status(records) == "FINISHED" and self.state.offset == records[-1][1]

    def _keep_state(self) -> None:
        with suppress(OSError):  # on a full disk records are sent again, which changes nothing
            self.state.save()

    def _hopeless(self, error: Exception) -> bool:
        """Whether an error before there is a run is the user's: a bad address, no rights, a database that is none."""
        from mlflow.exceptions import MlflowException

        remote = str(self.state.uri).startswith("http")
        return not remote or (isinstance(error, MlflowException) and error.get_http_status_code() < 500)

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            self._client = connect(self.uri or self.state.uri)
        return self._client

    def _send(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        (kind,) = records[0]
        value = records[0][kind]
        if kind == "metrics":
            points = [Metric(*point) for record in records for point in record["metrics"] if self._is_new(point)]
            for i in range(0, len(points), _METRICS):
                self.client.log_batch(self.state.run_id, metrics=points[i : i + _METRICS])
        elif kind == "start":
            self._create(value)
        elif kind == "artifact":
            for path in dict.fromkeys(record["artifact"] for record in records):
                self._upload(path)
        elif kind == "inputs":
            self.client.log_inputs(self.state.run_id, datasets=_dataset_inputs(value))
        elif self._taken_over() is not None:
            return  # another machine resumed the run: its tags and status count
        elif kind == "tags":
            self._tag(value)
        elif kind == "resume":
            self.client.update_run(self.state.run_id, status="RUNNING")
            self._tag(value["tags"])
        elif kind == "status":
            self.client.set_terminated(self.state.run_id, value[0], end_time=value[1])
        elif kind == "register":
            self._register()
        elif kind == "evict":
            self._evict(value)

    def _register(self) -> None:
        """Register the finished run's model; what is refused for good is said once and not tried again."""
        from mlflow.exceptions import MlflowException

        from lightning_glue.registry import register

        try:
            name, version, decision = register(self.client, self.state.run_id)
            self.state.registered = f"{name} version {version}, {decision}"
        except (UserError, MlflowException) as error:
            if isinstance(error, MlflowException) and error.get_http_status_code() >= 500:
                raise
            self.state.registered = f"not registered: {reason(error)}"

    def _tag(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.state.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def _create(self, start: Record) -> None:
        """Create the run, or find the one that an interrupted delivery created."""
        from mlflow.entities import Param

        self.state.uri = self.uri or start["uri"]
        self.state.uri = self.client.tracking_uri
        experiment = self._experiment(start["experiment"])
        tags = start["tags"] | {JOURNAL_TAG: start["id"]}
        if start["run_id"]:  # resumed without its journal
            run = self.client.get_run(start["run_id"])
            self.client.update_run(start["run_id"], status="RUNNING")
        else:
            found = self.client.search_runs([experiment], f"tags.`{JOURNAL_TAG}` = '{start['id']}'", max_results=1)
            run = found[0] if found else self.client.create_run(experiment, start["time"], tags, start["name"])
        self.state.run_id, self.state.run_name = run.info.run_id, run.info.run_name
        self.state.artifact_uri = run.info.artifact_uri
        self._tag(tags)
        params = [Param(key, str(value)[:_PARAM_LIMIT]) for key, value in start["params"].items()]
        for i in range(0, len(params), _PARAMS):
            self.client.log_batch(self.state.run_id, params=params[i : i + _PARAMS])

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if not found:
            try:
                return self.client.create_experiment(name)
            except MlflowException:  # another training was faster
                found = self.client.get_experiment_by_name(name)
                if not found:
                    raise
        return found.experiment_id

    def _taken_over(self) -> dict[str, set[int]] | None:
        """Steps of every metric that the server has, where the run was resumed with another journal; else None."""
        if self._others is None:
            self._others = {}
            run = self.client.get_run(self.state.run_id)
            if run.data.tags.get(JOURNAL_TAG, self.folder.name) != self.folder.name:
                for name in run.data.metrics:
                    history = self.client.get_metric_history(self.state.run_id, name)
                    self._others[name] = {point.step for point in history}
                self._others.setdefault("", set())
        return self._others or None

    def _is_new(self, point: list[Any]) -> bool:
        others = self._taken_over()
        return others is None or point[3] not in others.get(point[0], ())

    def _upload(self, path: str) -> None:
        """Bring an artifact to its store, unless it was written there; a checkpoint replaces the one before."""
        local = local_folder(self.state.artifact_uri)
        source = self.journal.artifact(path)
        if local and not source.exists():
            source = local / path
        if not source.exists():
            return  # delivered before, and cleared away when the run was finished
        is_checkpoint = path.startswith("checkpoints/")
        if local and source == local / path:
            if is_checkpoint:
                self._write_manifest(path, path, sha256(source), local / MANIFEST)
            return
        if not is_checkpoint:
            self.client.log_artifact(self.state.run_id, str(source), os.path.dirname(path) or None)
            return
        self._mirror(path, source)

    def _mirror(self, path: str, source: Path) -> None:
        """Upload under a name of its own, then point the manifest there, then delete the one before."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        fixed = self.folder / "upload" / source.name  # the training may replace ``source`` meanwhile
        fixed.parent.mkdir(exist_ok=True)
        fixed.unlink(missing_ok=True)
        os.link(source, fixed)
        digest = sha256(fixed)
        before = self.state.uploaded.get(path)
        if digest != before:
            store = get_artifact_repository(self.state.artifact_uri, tracking_uri=self.state.uri)
            named = fixed.rename(fixed.with_name(_version(path, digest)))
            store.log_artifact(str(named), "checkpoints")
            manifest = self.folder / "upload" / Path(MANIFEST).name
            self._write_manifest(path, f"checkpoints/{named.name}", digest, manifest)
            store.log_artifact(str(manifest), "checkpoints")
            if before:
                store.delete_artifacts(f"checkpoints/{_version(path, before)}")
            self.state.uploaded[path] = digest
            fixed = named
        fixed.unlink()

    def _evict(self, path: str) -> None:
        """Take a checkpoint out of the manifest, then out of its store."""
        local = local_folder(self.state.artifact_uri)
        if local:
            self._write_manifest(path, None, "", local / MANIFEST)
            (local / path).unlink(missing_ok=True)
        elif path in self.state.uploaded:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            store = get_artifact_repository(self.state.artifact_uri, tracking_uri=self.state.uri)
            manifest = self.folder / "upload" / Path(MANIFEST).name
            self._write_manifest(path, None, "", manifest)
            store.log_artifact(str(manifest), "checkpoints")
            store.delete_artifacts(f"checkpoints/{_version(path, self.state.uploaded.pop(path))}")

    def _write_manifest(self, path: str, stored: str | None, digest: str, manifest: Path) -> None:
        """Say where a checkpoint is and what its SHA-256 is; None: that it is no more."""
        entries = json.loads(manifest.read_text()) if manifest.exists() else {}
        entries.pop(path, None)
        if stored:
            entries[path] = {"file": stored, "sha256": digest}
        with atomic.new_file(manifest) as file:
            json.dump(entries, file, indent=2)


def _version(path: str, digest: str) -> str:
    return f"{Path(path).stem}-{digest[:12]}{Path(path).suffix}"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _batches(records: list[tuple[Record, int]]) -> Iterator[tuple[list[Record], int]]:
    """Neighbours that one call can carry, with the position behind them."""
    batch: list[Record] = []
    size = end = 0
    for record, after in records:
        (kind,) = record
        length = len(record[kind]) if kind == "metrics" else 1
        joins = batch and kind in batch[0] and kind in ("metrics", "artifact") and size + length <= _METRICS
        if batch and not joins:
            yield batch, end
            batch, size = [], 0
        batch.append(record)
        size, end = size + length, after
    if batch:
        yield batch, end


def _dataset_inputs(datasets: list[dict[str, Any]]) -> list[Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(
                name=dataset["name"],
                digest=dataset["profile"]["sha256"][:32],
                source_type="local",
                source=json.dumps({"uri": dataset["file"]}),
                profile=json.dumps(dataset["profile"]),
            ),
            [InputTag("mlflow.data.context", dataset["split"])],
        )
        for dataset in datasets
    ]
