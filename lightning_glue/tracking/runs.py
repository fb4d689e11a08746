"""Which run of the tracking store a journal writes: its own, one taken over from another machine, or a shared one."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.errors import TrackingError
from lightning_glue.tracking.journal import Record, now
from lightning_glue.tracking.uploads import Undelivered
from lightning_glue.utils.paths import artifact_uri, sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

JOURNAL_TAG = "lightning_glue.journal"  # id of the journal that writes the run
_JOURNALS_TAG = "lightning_glue.journals"  # ids of all that have, where machines have changed
_SHARED_MS = 120_000  # after which a shared run is created by whoever comes
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)  # what may stand in a condition of a search


def own_run(client: MlflowClient, start: Record, known: str | None) -> tuple[Run, dict[str, str]]:
    """The run that a journal alone writes, or has taken over: found or created; with the tags it gets.

    Args:
        start: the journal's first record.
        known: id of the run, where that is remembered.
    """
    run_id = known or start["run_id"]  # the latter: resumed without its journal
    run = client.get_run(run_id) if run_id else _find(client, start)
    tags = start["tags"] | {JOURNAL_TAG: start["id"]}
    if run is None:
        experiment = experiment_id(client, start["experiment"])
        return client.create_run(experiment, start["time"], tags, start["name"]), tags
    writer, earlier = run.data.tags.get(JOURNAL_TAG), run.data.tags.get(_JOURNALS_TAG, "").split()
    if start["id"] in earlier and writer != start["id"]:
        return run, {}  # another machine has resumed it since
    if start["run_id"]:
        client.update_run(start["run_id"], status="RUNNING")
    if writer and writer != start["id"]:
        tags[_JOURNALS_TAG] = " ".join(dict.fromkeys([*earlier, writer, start["id"]]))
    return run, tags


def _find(client: MlflowClient, start: Record) -> Run | None:
    if not _PLAIN.fullmatch(str(start["id"])):
        raise TrackingError(f"{str(start['id'])[:60]!r} is no id of a journal")
    experiment = experiment_id(client, start["experiment"])
    for condition in (f"tags.`{JOURNAL_TAG}` = '{start['id']}'", f"tags.`{_JOURNALS_TAG}` LIKE '%{start['id']}%'"):
        if found := client.search_runs([experiment], condition, max_results=1):
            return found[0]
    return None


def shared_run(client: MlflowClient, start: Record, known: str | None) -> tuple[Run, dict[str, str]]:
    """The run that several journals write, known by a tag: found or created; with the tags it gets.

    Raises:
        Undelivered: it is not there, and another journal is expected to create it.
    """
    shared = start["shared"]
    tags = start["tags"] | {shared["tag"]: shared["value"]}
    experiment = experiment_id(client, start["experiment"])
    run = client.get_run(known) if known else tagged_run(client, experiment, shared)
    if run:
        client.update_run(run.info.run_id, status="RUNNING")
        return run, tags
    if not shared.get("create") and now() - start["time"] < _SHARED_MS:
        raise Undelivered("the study's run is not there yet")
    made = client.create_run(experiment, start["time"], tags, start["name"])
    run = tagged_run(client, experiment, shared) or made
    if run.info.run_id != made.info.run_id:  # two created it at once
        client.delete_run(made.info.run_id)
    return run, tags


def tagged_run(client: MlflowClient, experiment: str, mark: dict[str, str]) -> Run | None:
    """The oldest run with a tag: ``mark`` has its name, ``tag``, and its ``value``."""
    if not all(_PLAIN.fullmatch(str(mark.get(part))) for part in ("tag", "value")):
        raise TrackingError(f"no run can be found by {str(mark)[:100]}; expected the name and the value of a tag")
    found = client.search_runs([experiment], f"tags.`{mark['tag']}` = '{mark['value']}'", max_results=100)
    return min(found, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def experiment_id(client: MlflowClient, name: str) -> str:
    """Id of an experiment, which is created if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if not found:
        try:
            return client.create_experiment(name, _artifact_location(client))
        except MlflowException:  # another training was faster
            found = client.get_experiment_by_name(name)
            if not found:
                raise
    return found.experiment_id


def _artifact_location(client: MlflowClient) -> str | None:
    """Where the runs of a new experiment have their artifacts; None: where MLflow puts them.

    Below a folder whose name MLflow would not read back as it is, a quoted address.
    """
    quoted = artifact_uri(Path.cwd() / "mlruns" / uuid.uuid4().hex)
    return quoted if sqlite_file(client.tracking_uri) and quoted.startswith("file:") else None
