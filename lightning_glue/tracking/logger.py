"""One MLflow run per training: everything goes to its journal, and from there, in another process, to the server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from lightning_glue.errors import TrackingError
from lightning_glue.tracking.courier import undelivered
from lightning_glue.tracking.held_journal import HeldJournal
from lightning_glue.tracking.journal import Record, now, warn
from lightning_glue.tracking.journals import JOURNALS, find_journal, sync_command
from lightning_glue.tracking.known_runs import advice, history, is_away, trouble_with
from lightning_glue.tracking.mirror import usable_folder
from lightning_glue.tracking.state import State
from lightning_glue.tracking.watcher import is_watching, watch
from lightning_glue.utils.files import CANNOT_WRITE, new_file
from lightning_glue.utils.paths import local_folder
from lightning_glue.utils.redact import hide_secrets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_glue.data.binarize import SplitInfo

History = dict[str, list[tuple[int, float]]]  # metric -> (step, value)

_START_SECONDS = 30.0  # for the server to create the run; then training begins without
# For the server to take the rest, then it is left to the watcher or to sync; a scheduler that stops us is impatient.
_FINISH_SECONDS, _STOP_SECONDS = 60.0, 10.0
_TROUBLE_SECONDS = 5.0  # so long a server may answer with an error at the end: a database that another one holds, say
_CHECK_SECONDS = 2.0  # between two looks at how the delivery is doing


def _shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are recorded, where everybody may read them."""
    return {key: hide_secrets(value) if isinstance(value, str) else value for key, value in values.items()}


class MLflowTracker(Logger):
    """A Lightning logger whose run process 0 owns; in other processes every method does nothing.

    Nothing here waits for the network but :meth:`start` and :meth:`finish`, both for a limited time.

    Args:
        journal: folder of the journals.
    """

    _journal: HeldJournal  # from start() on

    def __init__(self, uri: str | None, experiment: str, run_name: str, journal: str | Path | None = None) -> None:
        super().__init__()
        self.uri, self._experiment, self._run_name = uri, experiment, run_name
        self._given = uri  # None: the default, which moves with the project
        self._root = Path(journal or JOURNALS)
        # A tag, {"tag": name, "value": ...}, that tells the run this one belongs to (``parent``), or a run that several
        # processes write together (``shared``; with "create": whether it is this one's to create).
        self.parent: dict[str, Any] | None = None
        self.shared: dict[str, Any] | None = None
        self.history: History = {}
        self.journal_id = ""
        self._logged: dict[str, int] = {}  # last step of each metric before the run was resumed
        self._state: State | None = None
        self._artifacts = Path()
        self._warned: set[bool] = set()
        self._refused: set[str] = set()  # what was said to be
        self._finished, self._checked = False, 0.0

    @property
    def name(self) -> str:
        return self._experiment

    @property
    def version(self) -> str:
        return self.run_id

    @property
    def folder(self) -> Path:
        """The run's journal."""
        return self._root / self.journal_id

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; until the server was reached, the journal's."""
        return (self._state and self._state.run_id) or self.journal_id

    @property
    def minutes(self) -> float:
        """Wall time since the run began, as its journal tells."""
        start = self._journal.start()
        return (now() - start["time"]) / 60_000 if start else 0.0

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment; empty until the server was reached."""
        return self._state.experiment_id if self._state else ""

    @rank_zero_only
    def start(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        system_metrics: float | None,
        resume: str | None = None,
    ) -> None:
        """Open the run, or go on with an unfinished one.

        Args:
            system_metrics: seconds between two samples of the machine's use; None: no samples.
            resume: id of the run to go on with, or of its journal. What it has is not logged a second time.

        Raises:
            UserError: the server refuses, the database or the artifact folder cannot be used, or the run is finished,
                deleted or still at work. A server that does not answer is a warning.
        """
        folder = find_journal(self._root, resume) if resume else None
        if folder:
            self._reopen(folder, tags)
        else:
            self._open(params, tags, system_metrics, resume)
        self._watch()
        self._wait_for_run()
        self._artifacts = self._artifact_folder()

    def _open(
        self, params: Mapping[str, Any], tags: Mapping[str, str], system_metrics: float | None, run_id: str | None
    ) -> None:
        """A new journal, for a new run or for one whose journal is on another machine."""
        self.journal_id = uuid.uuid4().hex
        if run_id:
            self._remember(history(self.uri, run_id))
        start: Record = {
            "id": self.journal_id,
            "uri": self._given,
            "experiment": self._experiment,
            "name": self._run_name,
            "run_id": run_id,
            "time": now(),
            "params": {} if run_id else {key: hide_secrets(str(value)) for key, value in params.items()},
            "tags": _shown(tags),
            "system_metrics": system_metrics,
            "config": _shown(params),
        }
        start |= {key: mark for key, mark in {"parent": self.parent, "shared": self.shared}.items() if mark}
        self._journal = HeldJournal.create(self.folder, start)

    def _reopen(self, folder: Path, tags: Mapping[str, str]) -> None:
        self.journal_id = folder.name
        self._journal, records = HeldJournal.reopen(folder)
        points = [point for record, _ in records for point in record.get("metrics", ())]
        self._remember((key, step, value) for key, value, _time, step in points)
        self._append({"resume": {"time": now(), "tags": _shown(tags), "uri": self._given}})

    def _remember(self, points: Iterator[tuple[str, int, float]]) -> None:
        for name, step, value in points:
            self.history.setdefault(name, []).append((step, value))
            self._logged[name] = max(step, self._logged.get(name, -1))

    def _watch(self) -> None:
        try:
            watch(self.folder)
        except OSError as error:
            later = sync_command(self.run_id, self._root)
            warn(f"no process can be started that sends what is logged ({error.strerror}); {later} does")

    def _wait_for_run(self) -> None:
        """Wait until the watcher has created the run, or knows that it cannot."""
        deadline = time.monotonic() + _START_SECONDS
        state = self._look()
        while not state.run_id and not state.error and time.monotonic() < deadline:
            time.sleep(0.02)
            state = self._look()
        self.uri = state.uri or self.uri or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
        if state.fatal and not state.run_id:
            error = str(state.error)
            if self._journal.is_new:
                self._journal.discard()
            raise TrackingError(
                f"MLflow at {hide_secrets(self.uri)} cannot be used: {hide_secrets(error)}; {advice(self.uri, error)}"
            )
        self._run_name = state.run_name or self._run_name
        self._check_delivery()

    def _look(self) -> State:
        """How far the journal is delivered now."""
        self._state = State(self.folder)
        return self._state

    def _artifact_folder(self) -> Path:
        """Where artifacts are written: a local store's folder, which is tried, else the journal's."""
        store = local_folder(self._state.artifact_uri) if self._state else None
        trouble = store and trouble_with(store)
        if trouble:
            self._append({"status": ["FAILED", now()]})
            self._journal.release()
            raise TrackingError(
                f"run {self.run_id}: MLflow at {hide_secrets(str(self.uri))} wants its artifacts in {store}, and that "
                f"cannot be written here: {trouble}; where it is a folder of the server's machine, start the server "
                "with --serve-artifacts, and use another tracking.experiment"
            )
        return store or self.folder / "artifacts"

    def _append(self, record: Record) -> None:
        self._journal.record(record)
        if self._finished:
            self._watch()

    def _check_delivery(self) -> None:
        """Say once that the server is away, and once that it refuses; have the journal watched where it is not."""
        self._checked = time.monotonic()
        state = self._look()
        error = state.error
        if error and is_away(error) not in self._warned:
            self._warned.add(is_away(error))
            what = "does not answer" if is_away(error) else "does not take what is logged"
            warn(
                f"MLflow at {self.uri} {what} ({error[:160]}); training goes on, and the journal {self.folder} keeps "
                "everything for it"
            )
        self._tell_refused(state)
        if not is_watching(self.folder):
            self._watch()

    def _tell_refused(self, state: State) -> None:
        """Say once what the server or its artifact store refused for good."""
        for what, why in (state.left_out | state.refused).items():
            if what not in self._refused:
                self._refused.add(what)
                warn(f"{what} of run {self.run_id} was refused and is only here, in {self.folder}: {why}")

    @rank_zero_only
    def log_inputs(self, task: str, splits: Mapping[str, SplitInfo]) -> None:
        """Record each split's file, digest and row counts as an MLflow dataset input."""
        inputs = [
            {
                "name": f"{task}/{name}",
                "split": name,
                "file": info.file,
                "profile": {"rows": info.rows, "dropped": info.dropped, "skipped": info.skipped, "sha256": info.sha256},
            }
            for name, info in splits.items()
        ]
        self._append({"inputs": inputs})

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook; the configuration is logged whole by :meth:`start`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        step, time_ms = step or 0, now()
        values = {
            name: float(value)
            for name, value in metrics.items()
            if name != "epoch" and step > self._logged.get(name, -1)
        }
        if values:
            self._append({"metrics": [[name, value, time_ms, step] for name, value in values.items()]})
        for name, value in values.items():
            self.history.setdefault(name, []).append((step, value))
        if time.monotonic() - self._checked > _CHECK_SECONDS:
            self._check_delivery()

    @rank_zero_only
    def save(self) -> None:
        """Bring the journal to the disk."""
        self._journal.sync()

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append({"tags": _shown(tags)})

    @rank_zero_only
    def log_artifact(self, path: str) -> None:
        """Record that the file ``path`` below :attr:`artifacts` was written or replaced."""
        self._append({"artifact": path})

    @rank_zero_only
    def evict_artifact(self, path: str) -> None:
        """Record that the checkpoint ``path`` below :attr:`artifacts` was deleted."""
        self._append({"evict": path})

    @property
    def artifacts(self) -> Path:
        """Where this process writes artifacts: a local artifact store itself, else a folder of the journal."""
        return self._artifacts

    @rank_zero_only
    def log_text(self, text: str, path: str) -> None:
        """Write a small artifact; where its store's disk takes no more, into the journal, and else say so."""
        reason = None
        for folder in (self._artifacts, self.folder / "artifacts"):
            try:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                with new_file(folder / path) as file:
                    file.write(hide_secrets(text))
                return self.log_artifact(path)
            except OSError as error:
                reason = error.strerror
        warn(f"{path} of run {self.run_id} cannot be written to {self._artifacts}: {reason}")

    @rank_zero_only
    def log_figures(self, figures: Mapping[str, Figure]) -> None:
        with self.artifact_folder("figures") as folder:
            for name, figure in figures.items():
                figure.savefig(folder / name)

    @contextmanager
    def artifact_folder(self, name: str) -> Iterator[Path]:
        """A folder whose content becomes the run's artifact folder ``name``, written once if local."""
        folder = self._artifacts / name
        writing = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writing = True
            yield folder
        except OSError as error:
            if writing and error.errno not in CANNOT_WRITE:
                raise  # of what the caller reads
            raise TrackingError(f"cannot write {folder}: {error.strerror}; free space or get rights there") from error
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.log_artifact(str(path.relative_to(self._artifacts)))

    @property
    def local_artifacts(self) -> Path | None:
        """The run's artifact folder on this machine, or None for a store that is remote or cannot be written."""
        return usable_folder(self._state.artifact_uri) if self._state else None

    @rank_zero_only
    def finish(self, status: str, register: bool = False) -> None:
        """Set the run's status, FINISHED, FAILED or KILLED, and wait a while for the server to take what is left.

        Args:
            register: the run's exported model, see :mod:`lightning_glue.tracking.registry`.
        """
        self._append({"status": [status, now()]})
        if register:
            self._append({"register": True})
        with suppress(OSError):
            self._journal.sync()
        self._journal.release()
        self._finished = True
        self._watch()  # which has it looked at now
        self._check_delivery()
        state = self._wait_for_delivery(_FINISH_SECONDS if status == "FINISHED" else _STOP_SECONDS)
        self._tell_refused(state)
        left = undelivered(self._journal, state)
        if left:
            warn(
                f"{left} records of run {self.run_id} have not reached MLflow at {self.uri}; a background process "
                f"tries for a minute, then: {sync_command(self.run_id, self._root)}"
            )

    def _wait_for_delivery(self, seconds: float) -> State:
        """Wait until the server has everything, is away, or takes nothing for a while.

        Whoever stops waiting leaves the end to the watcher, which a scheduler may end together with the job.
        """
        deadline, worked = time.monotonic() + seconds, time.monotonic()
        while True:
            # The position first, then the end: a journal that is delivered may be made shorter between the two.
            state = self._look()
            if state.is_delivered(self._journal.end()) or time.monotonic() >= deadline:
                return state
            if not state.error:
                worked = time.monotonic()
            elif is_away(state.error) or state.fatal or time.monotonic() - worked > _TROUBLE_SECONDS:
                return state
            time.sleep(0.02)

    @property
    def registered(self) -> str:
        """What became of the model: its registered name, version and rank; empty where the server does not say yet."""
        return self._state.registered if self._state else ""

    def describe(self) -> str:
        """Where the run is, for a person."""
        return f"{self._experiment} / {self._run_name} ({self.run_id}) at {hide_secrets(str(self.uri))}"
