"""From a journal to the tracking server: in order, in batches, each record once, however often it is interrupted.

The position is kept after every call. What a call was killed in is sent again, and does nothing the second time: the
run is looked up by its journal's id before it is created, and MLflow's stores keep one row for a metric of equal key,
time, step and value. Artifacts follow behind: see :mod:`lightning_glue.tracking.uploads`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.errors import TrackingError, UserError
from lightning_glue.tracking.client import connect, is_missing, store_uri
from lightning_glue.tracking.journal import Journal, Record, try_lock
from lightning_glue.tracking.mirror import http_status
from lightning_glue.tracking.runs import JOURNAL_TAG, experiment_id, own_run, shared_run, tagged_run
from lightning_glue.tracking.state import State
from lightning_glue.tracking.uploads import KINDS, Undelivered, Uploads
from lightning_glue.utils.paths import sqlite_file
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Param

_PARENT_TAG = "mlflow.parentRunId"
_METRICS, _PARAMS = 1000, 100  # what a call of log_batch may carry
_PARAM_LIMIT = 6000  # characters of a value MLflow stores
_PIECE = 1 << 20  # bytes of a journal that are read at once
_PARENT_SECONDS = 15.0  # between two looks for the parent run


class Courier:
    """Delivers one journal.

    Args:
        uri: where to, instead of where the training wanted it. A run that is known already stays where it is, unless
            both are servers and this one has it, too: then it is a new address.
        background: artifacts are delivered in a thread, which the records do not wait for.
    """

    def __init__(self, folder: Path, uri: str | None = None, *, background: bool = False) -> None:
        self.folder, self.uri, self.background = folder, uri, background
        self.journal, self.state = Journal(folder), State(folder)
        self.uploads = Uploads(folder, self._connect_known, None if background else self.journal)
        self._thread: threading.Thread | None = None
        self._client: MlflowClient | None = None
        self._others: dict[str, set[int]] | None = None
        self._began: Record | None = None
        self._resumed: tuple[int, Record] = (0, {})  # up to where it was looked for, and the last one
        self._looked = 0.0  # for the parent run

    def deliver(self, *, wait: bool = False, again: bool = False, last: bool = False) -> int:
        """Send everything new; the number of records sent.

        Args:
            wait: where another process is delivering this journal, until it is through; else that one does it.
            again: try what was refused for good once more.
            last: the training is gone.

        Raises:
            Undelivered: the server is away or refuses.
        """
        sent = self._deliver_records(wait, again)
        if not self.background:
            return sent + self.uploads.deliver(wait=wait, again=again, last=last)
        if not (self._thread and self._thread.is_alive()) and self.uploads.is_due(self.state.offset, last):
            self._thread = threading.Thread(target=self._upload, args=(last,), daemon=True)
            self._thread.start()
        return sent

    def left(self) -> int:
        """How many records are not delivered, those that were refused for good aside."""
        return undelivered(self.journal, State(self.folder))

    def uploads_fail(self) -> bool:
        """Whether artifacts are left that the store did not take, and none is on its way."""
        on_its_way = self._thread is not None and self._thread.is_alive()
        return not on_its_way and State(self.folder).upload_error is not None

    def _upload(self, last: bool) -> None:
        with suppress(Undelivered, OSError):  # noted in the state; a folder that is gone needs no delivery
            self.uploads.deliver(last=last)

    def _deliver_records(self, wait: bool, again: bool) -> int:
        with try_lock(self.folder / "delivery.lock", wait=wait) as mine:
            if not mine:
                return 0
            self.state = State(self.folder)  # another process may have been here
            if again:
                self.state.note = ""
            sent, refused = 0, len(self.state.left_out)
            try:
                if again and self.state.run_id and undelivered(self.journal, self.state):
                    self._client = self._connect_known()  # its address may be another now, for artifacts as well
                    self._keep_state()
                for piece in self._new_records():
                    for records, end in _batches(piece):
                        self._send(records)
                        self._advance(end)
                        sent += sum(not any(kind in record for kind in KINDS) for record in records)
                        self._call_uploads(records)
                if len(self.state.left_out) > refused:
                    self.uploads.called = True  # it says so on the run
                self._find_parent(bool(sent) or again)
            except Exception as error:  # of MLflow, of a database's driver, of a value that no store takes
                self.state.record_error = first_line(error)
                self.state.fatal = not self.state.run_id and is_hopeless(error)
                self._keep_state()
                raise Undelivered(self.state.record_error) from error
            return sent

    def _call_uploads(self, records: list[Record]) -> None:
        """Have the artifacts looked at where a record is of them, or the run's end, which they may have waited for."""
        if any(kind in record for record in records for kind in (*KINDS, "status")):
            self.uploads.called = True

    def _new_records(self) -> Iterator[list[tuple[Record, int]]]:
        """What is behind the position, brought to the disk before the position is; all of it where that is lost.

        Piece by piece: of a long backlog no more is read than the store takes, and no more is held.
        """
        state = self.state
        if self.journal.position(state.offset, state.prefix) is None:
            state.offset, state.prefix = 0, None
            state.note = f"{self.journal.path} is not what was delivered of it; everything is sent once more"
        for records in self.journal.pieces(state.offset, _PIECE):
            self.journal.sync()
            yield records

    def _advance(self, end: int) -> None:
        self.state.prefix = self.journal.advance(self.state.offset, end, self.state.prefix)
        self.state.offset, self.state.record_error, self.state.fatal = end, None, False
        self._keep_state()

    def _keep_state(self) -> None:
        with suppress(OSError):  # on a full disk records are sent again, which changes nothing
            self.state.save()

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            if not self.state.run_id:
                self.state.uri = self.uri or self._start().get("uri")
                self.state.uri = store_uri(self.state.uri)
                self._client = connect(self.state.uri)
            else:
                self._client = self._connect_known()
        return self._client

    @property
    def _run_id(self) -> str:
        """MLflow's id of the run: known since the start was sent, which is before everything else."""
        assert self.state.run_id
        return self.state.run_id

    def terminate(self, status: str) -> None:
        """Set the run's status on the server, whatever the journal says."""
        self.client.set_terminated(self._run_id, status)

    def _connect_known(self) -> MlflowClient:
        """A client of the store that has the run."""
        return self._moved_server() or connect(self._remembered())

    def _remembered(self) -> str | None:
        """The address of the store that has the run; a database that is gone is not made anew."""
        if is_missing(self.state.uri):
            raise Undelivered(
                f"{sqlite_file(self.state.uri)}, which has run {self.state.run_id}, is gone; put it back, or remove "
                f"{self.state.path} to send everything to a new database"
            )
        return self.state.uri

    def _moved_server(self) -> MlflowClient | None:
        """A client of the server that is given now, where it has the run and another one is remembered."""
        given = self.uri or self._last_resume().get("uri") or os.environ.get("MLFLOW_TRACKING_URI")
        if not (given and given.startswith("http") and str(self.state.uri).startswith("http")):
            return None
        if given.rstrip("/") == str(self.state.uri).rstrip("/"):
            return None
        with suppress(Exception):  # another server, or one that is away: what is remembered holds
            client = connect(given)
            client.get_run(str(self.state.run_id))
            self.state.uri = given
            return client
        return None

    def _start(self) -> Record:
        """What the journal begins with; empty where it does not tell."""
        if self._began is None:
            self._began = self.journal.start() or {}
        return self._began

    def _last_resume(self) -> Record:
        """The last record that the run was gone on with; empty where there is none. Looks at what is new since."""
        looked, last = self._resumed
        end = self.journal.end()
        found = self.journal.newest(b'{"resume"', after=looked)
        self._resumed = (end, found[0]["resume"] if found else last)
        return self._resumed[1]

    def _send(self, records: list[Record]) -> None:
        """Send records of one kind; of several, those that the store does not refuse for what they are."""
        kind = next(iter(records[0]))
        if kind in KINDS:
            return
        if kind != "start" and not self.state.run_id:
            raise TrackingError(
                f"{self.journal.path} does not begin with the start of a run: there is none to deliver to"
            )
        try:
            self._call(kind, records)
        except Exception as error:
            if kind in ("start", "status", "resume") or not self._is_about_the_record(error):
                raise
            if len(records) > 1:
                for record in records:
                    self._send([record])
            else:
                self.state.left_out[f"{kind} {str(records[0][kind])[:60]}"] = first_line(error, 200)

    def _is_about_the_record(self, error: Exception) -> bool:
        """Whether a store that takes others refused a record: the run is there, and active."""
        if getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE" and http_status(error) not in (413, 422):
            return False
        return self.client.get_run(self._run_id).info.lifecycle_stage == "active"

    def _call(self, kind: str, records: list[Record]) -> None:
        from mlflow.entities import Metric

        value = records[0][kind]
        if kind == "metrics":
            points = [Metric(*point) for record in records for point in record["metrics"] if self._is_new(point)]
            for i in range(0, len(points), _METRICS):
                self.client.log_batch(self._run_id, metrics=points[i : i + _METRICS])
        elif kind == "start":
            self._create(value)
        elif kind == "inputs":
            self.client.log_inputs(self._run_id, datasets=_dataset_inputs(value))
        elif self._taken_over() is not None:
            return  # another machine resumed the run: its tags and status count
        elif kind == "tags":
            self._tag(value)
        elif kind == "resume":
            self.client.update_run(self._run_id, status="RUNNING")
            self._tag(value["tags"])
        elif kind == "status":
            self.client.set_terminated(self._run_id, value[0], end_time=value[1])

    def _tag(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self._run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def _create(self, start: Record) -> None:
        """Create the run, or find the one that an interrupted delivery created."""
        state, client = self.state, self.client
        run, tags = (shared_run if start.get("shared") else own_run)(client, start, state.run_id)
        state.run_id, state.run_name = run.info.run_id, run.info.run_name
        state.uri, state.artifact_uri = client.tracking_uri, run.info.artifact_uri
        state.experiment_id = run.info.experiment_id
        state.orphan = bool(start.get("parent"))
        self._tag(tags)
        known = run.data.params if start.get("shared") else {}
        self._log_params({key: value for key, value in start["params"].items() if key not in known})

    def _find_parent(self, now_at_once: bool) -> None:
        """Put the run below the one it belongs to, as soon as that is there; nothing waits for it."""
        if not self.state.orphan or not (now_at_once or time.monotonic() - self._looked > _PARENT_SECONDS):
            return
        self._looked = time.monotonic()
        start = self._start()
        parent = tagged_run(self.client, experiment_id(self.client, start["experiment"]), start["parent"])
        if parent:
            self._tag({_PARENT_TAG: parent.info.run_id})
            self.state.orphan = False
            self._keep_state()

    def _log_params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:_PARAM_LIMIT]) for key, value in params.items()]
        for i in range(0, len(entries), _PARAMS):
            chunk = entries[i : i + _PARAMS]
            try:
                self.client.log_batch(self._run_id, params=chunk)
            except Exception as error:
                if not self._is_about_the_record(error):
                    raise
                self._log_params_singly(chunk)

    def _log_params_singly(self, entries: list[Param]) -> None:
        for entry in entries:
            try:
                self.client.log_batch(self._run_id, params=[entry])
            except Exception as error:
                if not self._is_about_the_record(error):
                    raise
                self.state.left_out[f"parameter {entry.key[:60]}"] = first_line(error, 200)

    def _taken_over(self) -> dict[str, set[int]] | None:
        """Steps of every metric that the server has, where the run was resumed with another journal; else None."""
        if self._others is None:
            self._others = {}
            run = self.client.get_run(self._run_id)
            mine = self._start().get("shared") or run.data.tags.get(JOURNAL_TAG, self.folder.name) == self.folder.name
            if not mine:
                for name in run.data.metrics:
                    history = self.client.get_metric_history(self._run_id, name)
                    self._others[name] = {point.step for point in history}
                self._others.setdefault("", set())
        return self._others or None

    def _is_new(self, point: list[Any]) -> bool:
        others = self._taken_over()
        return others is None or point[3] not in others.get(point[0], ())


def is_hopeless(error: Exception) -> bool:
    """Whether an error before there is a run is the user's: a bad address, no rights, a database that is none."""
    wrong = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")  # said by MLflow itself
    if isinstance(error, UserError) or getattr(error, "error_code", "") in wrong:
        return True
    return http_status(error) in (401, 403)


def undelivered(journal: Journal, state: State) -> int:
    """How many records of a journal have not arrived, those that were refused for good aside."""
    return sum(
        end > state.offset or (end > state.uploads and any(kind in record for kind in KINDS))
        for records in journal.pieces(min(state.offset, state.uploads), _PIECE)
        for record, end in records
    )


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
