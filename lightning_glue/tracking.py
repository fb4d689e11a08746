"""One MLflow run per training: everything goes to its journal, and from there, in another process, to the server."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from lightning_glue import config as configuration
from lightning_glue import environment
from lightning_glue.atomic import new_file
from lightning_glue.config import Config
from lightning_glue.delivery import local_folder
from lightning_glue.errors import UserError
from lightning_glue.figures import History
from lightning_glue.journal import (
    JOURNALS,
    Journal,
    Record,
    State,
    final_status,
    find_journal,
    is_alive,
    journals,
    now,
    try_lock,
)
from lightning_glue.preprocess import SplitInfo
from lightning_glue.store import connect, reason
from lightning_glue.watcher import is_watching, watch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CONFIGURATION = "lightning_glue.configuration"  # tag: digest of what makes two trainings the same
_START_SECONDS = 30.0  # for the server to create the run; then training begins without
# For the server to take the rest, then it is left to the watcher or to sync; a scheduler that stops us is impatient.
_FINISH_SECONDS, _STOP_SECONDS = 60.0, 10.0
_CHECK_SECONDS = 2.0  # between two looks at how the delivery is doing


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


class MLflowTracker(Logger):
    """A Lightning logger whose run process 0 owns; in other processes every method does nothing.

    Nothing here waits for the network but :meth:`start` and :meth:`finish`, both for a limited time.

    Args:
        journal: folder of the journals.
    """

    def __init__(self, uri: str | None, experiment: str, run_name: str, journal: str | Path | None = None) -> None:
        super().__init__()
        self.uri, self._experiment, self._run_name = uri, experiment, run_name
        self._root = Path(journal or JOURNALS)
        self.history: History = {}
        self.journal_id = ""
        self._logged: dict[str, int] = {}  # last step of each metric before the run was resumed
        self._state: State | None = None
        self._artifacts = Path()
        self._locks = ExitStack()
        self._finished = self._warned = False
        self._checked = 0.0

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
            UserError: the server refuses, the database cannot be used, or the run is finished or still at work. A
                server that does not answer is a warning.
        """
        folder = find_journal(self._root, resume) if resume else None
        if folder:
            self._reopen(folder, tags)
        else:
            folder = self._open(params, tags, system_metrics, resume)
        watch(folder)
        self._wait_for_run(folder)
        self._artifacts = local_folder(self._state.artifact_uri) or folder / "artifacts"

    def _open(
        self, params: Mapping[str, Any], tags: Mapping[str, str], system_metrics: float | None, run_id: str | None
    ) -> Path:
        """A new journal, for a new run or for one whose journal is on another machine."""
        self.journal_id = uuid.uuid4().hex
        folder = self._root / self.journal_id
        if run_id:
            self._read_history(run_id)
        start: Record = {
            "id": self.journal_id,
            "uri": self.uri,
            "experiment": self._experiment,
            "name": self._run_name,
            "run_id": run_id,
            "time": now(),
            "params": {} if run_id else {key: str(value) for key, value in params.items()},
            "tags": dict(tags),
            "system_metrics": system_metrics,
            "config": dict(params),
        }
        try:
            folder.mkdir(parents=True)
            self._lock(folder)
            self._journal = Journal(folder)
            self._append({"start": start})
        except OSError as error:
            raise UserError(f"cannot write the journal {folder}: {error.strerror}; see tracking.journal") from None
        return folder

    def _reopen(self, folder: Path, tags: Mapping[str, str]) -> None:
        self.journal_id = folder.name
        self._lock(folder)
        self._journal = Journal(folder)
        records = self._journal.read()
        if final_status(records) == "FINISHED":
            raise UserError(f"run {State(folder).run_id or folder.name} is finished; there is nothing to resume")
        points = [point for record, _ in records for point in record.get("metrics", ())]
        self._remember((key, step, value) for key, value, _time, step in points)
        self._append({"resume": {"time": now(), "tags": dict(tags)}})

    def _read_history(self, run_id: str) -> None:
        """What the server has of a run whose journal is on another machine."""
        from mlflow.exceptions import MlflowException

        try:
            client = connect(self.uri)
            run = client.get_run(run_id)
            if run.info.status == "FINISHED":
                raise UserError(f"run {run_id} is finished; there is nothing to resume")
            for name in run.data.metrics:
                history = client.get_metric_history(run_id, name)
                self._remember((name, point.step, point.value) for point in history)
        except (MlflowException, OSError) as error:
            raise UserError(f"run {run_id} cannot be read: {reason(error)}") from None

    def _remember(self, points: Iterator[tuple[str, int, float]]) -> None:
        for name, step, value in points:
            self.history.setdefault(name, []).append((step, value))
            self._logged[name] = max(step, self._logged.get(name, -1))

    def _lock(self, folder: Path) -> None:
        deadline = time.monotonic() + 5  # a watcher looks whether the lock is free
        while not self._locks.enter_context(try_lock(folder / "alive")):
            if time.monotonic() > deadline:
                raise UserError(f"run {State(folder).run_id or folder.name} is being trained by another process")
            time.sleep(0.05)

    def _wait_for_run(self, folder: Path) -> None:
        """Wait until the watcher has created the run, or knows that it cannot."""
        deadline = time.monotonic() + _START_SECONDS
        self._state = State(folder)
        while not self._state.run_id and not self._state.error and time.monotonic() < deadline:
            time.sleep(0.02)
            self._state = State(folder)
        if self._state.fatal and not self._state.run_id:
            self._discard(folder)
            raise UserError(f"MLflow at {self._state.uri} cannot be used: {self._state.error}; see tracking.uri")
        self.uri, self._run_name = self._state.uri or self.uri, self._state.run_name or self._run_name
        self._check_delivery()

    def _discard(self, folder: Path) -> None:
        import shutil

        self._journal.close()
        self._locks.close()
        shutil.rmtree(folder)
        for parent in (self._root, self._root.parent):
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def _append(self, record: Record) -> None:
        try:
            self._journal.append(record)
        except OSError as error:
            raise UserError(
                f"cannot write the journal {self._journal.folder}: {error.strerror}; nothing before is lost: free "
                f"space, then --resume {self.run_id}"
            ) from None
        if self._finished:
            watch(self._journal.folder)

    def _check_delivery(self) -> None:
        """Say once that the server is away; start a watcher where it is gone."""
        self._checked = time.monotonic()
        self._state = State(self._journal.folder)
        if self._state.error and not self._warned:
            self._warned = True
            _warn(
                f"MLflow at {self.uri} does not answer ({self._state.error[:160]}); training goes on, and the journal "
                f"{self._journal.folder} keeps everything for it"
            )
        if not is_watching():
            watch(self._journal.folder)

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
        points = [
            [name, float(value), time_ms, step]
            for name, value in metrics.items()
            if name != "epoch" and step > self._logged.get(name, -1)
        ]
        if points:
            self._append({"metrics": points})
        for name, value, *_ in points:
            self.history.setdefault(name, []).append((step, value))
        if time.monotonic() - self._checked > _CHECK_SECONDS:
            self._check_delivery()

    @rank_zero_only
    def save(self) -> None:
        """Bring the journal to the disk."""
        self._journal.sync()

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._append({"tags": dict(tags)})

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
        target = self._artifacts / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_file(target) as file:
            file.write(text)
        self.log_artifact(path)

    @rank_zero_only
    def log_figures(self, figures: Mapping[str, Figure]) -> None:
        with self.artifact_folder("figures") as folder:
            for name, figure in figures.items():
                figure.savefig(folder / name)

    @contextmanager
    def artifact_folder(self, name: str) -> Iterator[Path]:
        """A folder whose content becomes the run's artifact folder ``name``, written once if local."""
        folder = self._artifacts / name
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.log_artifact(str(path.relative_to(self._artifacts)))

    @property
    def local_artifacts(self) -> Path | None:
        """The run's artifact folder on this machine, or None for a remote store."""
        return local_folder(self._state.artifact_uri) if self._state else None

    @rank_zero_only
    def finish(self, status: str, register: bool = False) -> None:
        """Set the run's status, FINISHED, FAILED or KILLED, and wait a while for the server to take what is left.

        Args:
            register: the run's exported model, see :mod:`lightning_glue.registry`.
        """
        self._append({"status": [status, now()]})
        if register:
            self._append({"register": True})
        self._journal.sync()
        self._locks.close()
        self._finished = True
        self._check_delivery()
        deadline = time.monotonic() + (_FINISH_SECONDS if status == "FINISHED" else _STOP_SECONDS)
        end = self._journal.path.stat().st_size
        while self._state.offset < end and not self._state.error and time.monotonic() < deadline:
            time.sleep(0.02)
            self._state = State(self._journal.folder)
        left = len(self._journal.read(self._state.offset))
        if left:
            _warn(
                f"{left} records of run {self.run_id} have not reached MLflow at {self.uri}; a background process "
                f"tries for a minute, then: python -m lightning_glue.sync {self.run_id}"
            )

    @property
    def registered(self) -> str:
        """What became of the model: its registered name, version and rank; empty where the server does not say yet."""
        return self._state.registered if self._state else ""

    @rank_zero_only
    def describe(self) -> str:
        """Where the run is, for a person."""
        return f"{self._experiment} / {self._run_name} ({self.run_id}) at {self.uri}"


def unfinished_runs(root: Path, uri: str | None, experiment: str, digest: str) -> list[str]:
    """Ids of the runs of a configuration that neither finished nor are at work, the newest first.

    MLflow knows the runs of other machines. One that is RUNNING there is left alone: its watcher would have ended it.
    """
    found_here = []
    for folder in journals(root):
        records = Journal(folder).read()
        tags = records[0][0]["start"]["tags"] if records else {}
        if "mlflow.parentRunId" in tags:
            continue  # a trial of a study, which sees to its own
        if tags.get(_CONFIGURATION) == digest and final_status(records) != "FINISHED" and not is_alive(folder):
            found_here.append(folder.name)
    if not str(uri).startswith("http"):
        return found_here
    from mlflow.exceptions import MlflowException

    try:
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        filters = f"tags.`{_CONFIGURATION}` = '{digest}' and attributes.status != 'FINISHED'"
        newest_first = ["attributes.start_time DESC"]
        runs = client.search_runs([found.experiment_id], filters, order_by=newest_first) if found else []
    except (MlflowException, OSError) as error:
        raise UserError(f"--resume auto: MLflow at {uri} does not answer: {reason(error)}") from None
    known = {State(root / name).run_id for name in found_here}
    there = [run for run in runs if "mlflow.parentRunId" not in run.data.tags and run.info.run_id not in known]
    return found_here + [run.info.run_id for run in there if run.info.status in ("KILLED", "FAILED")]


def run_tags(config: Config) -> dict[str, str]:
    """Tags that say what ran where: configuration, commit, versions, hardware, command line."""
    commit = environment.git_commit()
    tags = {
        _CONFIGURATION: configuration.digest(config),
        "mlflow.source.name": environment.command_line(),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": environment.user(),
        **{f"version.{name}": version for name, version in environment.versions().items()},
        **{f"hardware.{name}": value for name, value in environment.hardware().items()},
    }
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["git.dirty"] = str(bool(environment.git_diff())).lower()
    return tags
