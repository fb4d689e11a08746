"""What a tracking store knows of runs that are to be gone on with."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.errors import TrackingError, UserError
from lightning_glue.tracking import provenance
from lightning_glue.tracking.client import connect, is_missing
from lightning_glue.tracking.journal import Journal, Record, is_alive, warn
from lightning_glue.tracking.journals import journals
from lightning_glue.tracking.state import State
from lightning_glue.utils.paths import sqlite_file
from lightning_glue.utils.redact import first_line, hide_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_CONFIGURATION = "lightning_glue.configuration"  # tag: digest of what makes two trainings the same
_PARENT = "mlflow.parentRunId"  # tag: of the trials of a study, which sees to its own
_USER = "mlflow.user"
_AWAY = re.compile(r"failed with exception|connection|timed out|max retries|error code 50[234]", re.IGNORECASE)
_UNKNOWN = "RESOURCE_DOES_NOT_EXIST"


def is_away(error: str) -> bool:
    """Whether an error tells of a server that does not answer, not of an answer."""
    return bool(_AWAY.search(error))


def advice(uri: str, error: str) -> str:
    """What to do about a store that cannot be used."""
    if "experiment" in error.lower() and "delete" in error.lower():
        return "mlflow experiments restore brings it back; or choose another one with tracking.experiment="
    if "://" not in uri and "http://" not in error:
        return f"see tracking.uri; did you mean http://{uri}?"
    return "see tracking.uri"


def trouble_with(store: Path) -> str | None:
    """Why artifacts cannot be written to a folder, which is made; None where they can."""
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or type(error).__name__
    return None if os.access(store, os.W_OK | os.X_OK) else "Permission denied"


class Stores:
    """The stores that journals are delivered to, asked about their runs; one that does not answer is asked once."""

    def __init__(self) -> None:
        self._clients: dict[str | None, MlflowClient | None] = {}

    def loss(self, folder: Path) -> str | None:
        """What became of the run of a journal that nothing can be added to any more; None where nobody says so."""
        state = State(folder)
        where = f"MLflow at {hide_secrets(str(state.uri))}"
        if not state.run_id or self._clients.get(state.uri, 0) is None:
            return None
        if is_missing(state.uri):  # MLflow would make an empty one
            return f"is in {sqlite_file(state.uri)}, which is gone"
        try:
            client = self._clients[state.uri] = self._clients.get(state.uri) or connect(state.uri)
            run = client.get_run(state.run_id)
        except Exception as error:  # of MLflow, or of a database's driver
            if getattr(error, "error_code", "") == _UNKNOWN:
                return f"is not known to {where}"
            self._clients[state.uri] = None
            return None
        deleted = f"was deleted from {where}; mlflow runs restore --run-id {state.run_id} brings it back"
        return deleted if run.info.lifecycle_stage == "deleted" else None


def history(uri: str | None, run_id: str) -> Iterator[tuple[str, int, float]]:
    """Name, step and value of every point of a run whose journal is on another machine.

    Raises:
        UserError: it cannot be read, or not be gone on with.
    """
    try:
        client = connect(uri)
        run = client.get_run(run_id)
        if run.info.status == "FINISHED":
            raise TrackingError(f"run {run_id} is finished; there is nothing to resume")
        if run.info.lifecycle_stage == "deleted":
            raise TrackingError(f"run {run_id} was deleted; mlflow runs restore --run-id {run_id} brings it back")
        for name in run.data.metrics:
            for point in client.get_metric_history(run_id, name):
                yield name, point.step, point.value
    except UserError:
        raise
    except Exception as error:  # of MLflow, or of a database's driver
        raise TrackingError(f"run {run_id} cannot be read: {first_line(error)}") from None


def _unfinished_there(uri: str, experiment: str, digest: str) -> list[Run]:
    """The user's own runs of a configuration that have FAILED or were KILLED, newest first, those of studies aside.

    One that is RUNNING is left alone: its watcher would have ended it. Others' runs are, too: what is resumed is read
    from the run.

    Raises:
        UserError: the store does not answer.
    """
    try:
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        filters = f"tags.`{_CONFIGURATION}` = '{digest}' and attributes.status != 'FINISHED'"
        newest_first = ["attributes.start_time DESC"]
        runs = client.search_runs([found.experiment_id], filters, order_by=newest_first) if found else []
    except Exception as error:  # of MLflow, or of a database's driver
        what = "does not answer" if is_away(str(error)) else "cannot be asked"
        raise TrackingError(f"--resume auto: MLflow at {hide_secrets(uri)} {what}: {first_line(error)}") from None
    own = [run for run in runs if run.data.tags.get(_USER) == provenance.user() and _PARENT not in run.data.tags]
    return [run for run in own if run.info.status in ("KILLED", "FAILED")]


def unfinished_runs(root: Path, uri: str | None, experiment: str, digest: str) -> list[str]:
    """Ids of the user's own runs of a configuration that neither finished nor are at work, newest first.

    The journals know those of this machine, a store that others use too those of all. What was deleted there is passed
    over, and said.

    Raises:
        UserError: no journal here has one, and the store does not answer.
    """
    stores = Stores()
    found: list[tuple[float, str]] = []
    folders = journals(root)
    for folder in folders:
        start = Journal(folder).start() or {}
        if not _is_own(start, digest) or is_alive(folder) or Journal(folder).status() == "FINISHED":
            continue
        if loss := stores.loss(folder):
            warn(f"--resume auto passes over run {State(folder).run_id}, which {loss}")
        else:
            found.append((start["time"], folder.name))
    if uri and "://" in uri and not uri.startswith(("sqlite", "file")):
        here = {State(folder).run_id for folder in folders}
        try:
            runs = [run for run in _unfinished_there(uri, experiment, digest) if run.info.run_id not in here]
        except UserError as error:
            if not found:
                raise
            warn(f"{error}; of the runs of this machine the newest is taken")
            runs = []
        found += [(run.info.start_time, run.info.run_id) for run in runs]
    return [run_id for _, run_id in sorted(found, reverse=True)]


def _is_own(start: Record, digest: str) -> bool:
    """Whether a journal's run is a training of this configuration and user, and none of a study's."""
    tags = start.get("tags")
    if (
        not isinstance(tags, dict)
        or tags.get(_CONFIGURATION) != digest
        or not isinstance(start.get("time"), int | float)
    ):
        return False
    nested = _PARENT in tags or "parent" in start or "shared" in start
    return not nested and tags.get(_USER, provenance.user()) == provenance.user()


def run_tags(config: Config) -> dict[str, str]:
    """Tags that say what ran where: configuration, commit, versions, hardware, command line."""
    commit = provenance.git_commit()
    tags = {
        _CONFIGURATION: configuration.digest(config),
        "mlflow.source.name": provenance.command_line(),
        "mlflow.source.type": "LOCAL",
        "mlflow.user": provenance.user(),
        **{f"version.{name}": version for name, version in provenance.versions().items()},
        **{f"hardware.{name}": value for name, value in provenance.hardware().items()},
    }
    if commit:
        tags["mlflow.source.git.commit"] = commit
        tags["git.dirty"] = str(bool(provenance.git_diff())).lower()
    return tags
