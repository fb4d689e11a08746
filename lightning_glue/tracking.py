"""One MLflow run per training: parameters, metrics in batches, inputs, artifacts and a true final status."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn

from lightning_glue import environment
from lightning_glue.errors import UserError
from lightning_glue.figures import History
from lightning_glue.preprocess import SplitInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

_BATCH = 1000  # metrics a call of log_batch may carry
_FLUSH_SECONDS = 5.0
_PARAM_LIMIT = 6000  # characters of a value MLflow stores
# MLflow retries a dead server for eight minutes by default; training must not wait that long.
_HTTP_DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class MLflowTracker(Logger):
    """A Lightning logger on an MLflow run that process 0 owns; in other processes every method does nothing.

    A server that fails during training costs no training: metrics wait in memory and go out with a later batch.
    """

    def __init__(self, uri: str | None, experiment: str, run_name: str) -> None:
        super().__init__()
        self.uri, self._experiment, self._run_name = uri, experiment, run_name
        self.history: History = {}
        self.run_id = ""
        self._buffer: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()
        self._client: MlflowClient | None = None
        self._monitor: SystemMetricsMonitor | None = None

    @property
    def name(self) -> str:
        return self._experiment

    @property
    def version(self) -> str:
        return self.run_id

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            raise RuntimeError("start() has not been called in this process")
        return self._client

    @rank_zero_only
    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], system_metrics: float | None) -> None:
        """Create the run.

        Args:
            system_metrics: seconds between two samples of the machine's use; None: no samples.

        Raises:
            UserError: the tracking server or database cannot be used.
        """
        for name, value in _HTTP_DEFAULTS.items():
            os.environ.setdefault(name, value)
        import mlflow
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        try:
            self._client = mlflow.MlflowClient(tracking_uri=self.uri)
            experiment = self._client.get_experiment_by_name(self._experiment)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment)
            run = self._client.create_run(experiment_id, run_name=self._run_name, tags=dict(tags))
            self.run_id, self._experiment_id = run.info.run_id, experiment_id
            self._run_name, self._artifact_uri = run.info.run_name, run.info.artifact_uri
            stored = [Param(key, str(value)[:_PARAM_LIMIT]) for key, value in params.items()]
            for i in range(0, len(stored), 100):
                self._client.log_batch(self.run_id, params=stored[i : i + 100])
        except (MlflowException, OSError) as error:
            reason = str(error).splitlines()[0][:300]
            self.uri = self.uri or mlflow.get_tracking_uri()
            raise UserError(f"MLflow at {self.uri} cannot be used: {reason}; see tracking.uri") from None
        self.uri = self._client.tracking_uri
        if system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self.run_id, system_metrics, tracking_uri=self.uri)
            self._monitor.start()

    @rank_zero_only
    def log_inputs(self, task: str, splits: Mapping[str, SplitInfo]) -> None:
        """Record each split's file, digest and row counts as an MLflow dataset input."""
        import json

        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for name, info in splits.items():
            profile = {"rows": info.rows, "dropped": info.dropped, "skipped": info.skipped, "sha256": info.sha256}
            dataset = Dataset(
                name=f"{task}/{name}",
                digest=info.sha256[:32],
                source_type="local",
                source=json.dumps({"uri": info.file}),
                profile=json.dumps(profile),
            )
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", name)]))
        with self._tolerated("dataset inputs"):
            self.client.log_inputs(self.run_id, datasets=inputs)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook; the configuration is logged whole by :meth:`start`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            if name != "epoch":
                self._buffer.append((name, float(value), now, step or 0))
                self.history.setdefault(name, []).append((step or 0, float(value)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS or len(self._buffer) >= _BATCH:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Send buffered metrics; what cannot be sent stays in the buffer."""
        from mlflow.entities import Metric

        self._flushed = time.monotonic()
        while self._buffer:
            batch = self._buffer[:_BATCH]
            with self._tolerated(f"{len(self._buffer)} metrics") as outcome:
                self.client.log_batch(self.run_id, metrics=[Metric(*metric) for metric in batch])
            if not outcome["sent"]:
                return
            del self._buffer[: len(batch)]

    @contextmanager
    def _tolerated(self, what: str) -> Iterator[dict[str, bool]]:
        """Turn a failing server into a warning; ``sent`` tells whether the call went through."""
        from mlflow.exceptions import MlflowException

        outcome = {"sent": False}
        try:
            yield outcome
            outcome["sent"] = True
        except (MlflowException, OSError) as error:
            rank_zero_warn(f"MLflow at {self.uri} did not take {what}: {str(error).splitlines()[0][:200]}")

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, str]) -> None:
        with self._tolerated("tags"):
            for key, value in tags.items():
                self.client.set_tag(self.run_id, key, value)

    @rank_zero_only
    def log_text(self, text: str, path: str) -> None:
        with self._tolerated(path):
            self.client.log_text(self.run_id, text, path)

    @rank_zero_only
    def log_figures(self, figures: Mapping[str, Figure]) -> None:
        with self._tolerated("figures"):
            for name, figure in figures.items():
                self.client.log_figure(self.run_id, figure, f"figures/{name}")

    @contextmanager
    def artifact_folder(self, name: str) -> Iterator[Path]:
        """A folder whose content becomes the run's artifact folder ``name``.

        In a local artifact store it is that folder, so large files are written once; else it is uploaded at the end.
        """
        local = self.local_artifacts
        if local:
            (local / name).mkdir(parents=True, exist_ok=True)
            yield local / name
            return
        staging = Path(tempfile.mkdtemp(prefix="lightning-glue-"))
        try:
            yield staging
            with self._tolerated(name):
                self.client.log_artifacts(self.run_id, str(staging), name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @property
    def local_artifacts(self) -> Path | None:
        """The run's artifact folder on this machine, or None for a remote store."""
        from mlflow.utils.file_utils import local_file_uri_to_path
        from mlflow.utils.uri import is_local_uri

        return Path(local_file_uri_to_path(self._artifact_uri)) if is_local_uri(self._artifact_uri) else None

    @rank_zero_only
    def finish(self, status: str) -> None:
        """Send what is left and set the run's status: FINISHED, FAILED or KILLED."""
        if self._monitor:
            self._monitor.finish()
        self.save()
        if self._buffer:
            rank_zero_warn(f"{len(self._buffer)} metrics of run {self.run_id} were never sent")
        with self._tolerated(f"status {status}"):
            self.client.set_terminated(self.run_id, status)

    @rank_zero_only
    def describe(self) -> str:
        """Where the run is, for a person."""
        return f"{self._experiment} / {self._run_name} ({self.run_id}) at {self.uri}"


def run_tags() -> dict[str, str]:
    """Tags that say what ran where: commit, versions, hardware, command line."""
    commit = environment.git_commit()
    tags = {
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
