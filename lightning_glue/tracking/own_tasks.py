"""The task of a stored run: a built-in one by name, one of data of one's own by the description that the run has."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.config.escape import unescaped
from lightning_glue.errors import ConfigError, TrackingError
from lightning_glue.tasks import TRAINABLE, Task, described_task, get_task

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TASK = "lightning_glue.task"  # tag of a run on data of one's own: its description
_CONFIG_FILE = "config.yaml"  # the run's artifact, see lightning_glue.training.describe
_MOST = 6000  # characters of a tag, which MLflow limits to 8000


def task_tag(description: Mapping[str, Any]) -> dict[str, str]:
    """The tag of a run; of very many labels it has their number alone, they are in the run's configuration."""
    text = json.dumps(description, ensure_ascii=False)
    if len(text.encode()) > _MOST:
        short = {**description, "labels": len(description["labels"]), "class_weights": None}
        text = json.dumps(short, ensure_ascii=False)
    return {TASK: text}


def is_known(run: Run) -> bool:
    """Whether the task of a run is a built-in one, or the run says what it is."""
    if TASK not in run.data.tags:
        return run.data.params.get("task.name") in TRAINABLE
    try:
        return bool(task_of_run(run).dev and "task.name" in run.data.params)
    except ConfigError:  # anybody may have written it
        return False


def task_of_run(run: Run) -> Task:
    """The task of a training. Of very many labels it has numbers in place of their names, see :func:`whole_task`.

    Raises:
        ConfigError: it is neither a built-in task, nor does the run say what it is.
    """
    said = _said(run)
    if said is None:
        return get_task(run.data.params["task.name"])
    count = said.get("labels")
    return described_task({**said, "labels": [*map(str, range(count))]} if isinstance(count, int) else said)


def _said(run: Run) -> dict[str, Any] | None:
    text = run.data.tags.get(TASK)
    if text is None:
        return None
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict) or not isinstance(said.get("files"), dict):
        raise ConfigError(f"run {run.info.run_id}: its tag {TASK} is no description of a task")
    return said


def whole_task(client: MlflowClient, run: Run) -> Task:
    """:func:`task_of_run` with the names of all labels, for which the run's configuration may have to be fetched.

    Raises:
        TrackingError: the run has none.
    """
    said = _said(run)
    if said is None or not isinstance(said.get("labels"), int):
        return task_of_run(run)
    import yaml

    with tempfile.TemporaryDirectory(prefix="lightning-glue-") as folder:
        path = Path(client.download_artifacts(run.info.run_id, _CONFIG_FILE, folder))
        try:
            config = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            return described_task(unescaped(config["task"]["description"]))
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise TrackingError(f"run {run.info.run_id}: its {_CONFIG_FILE} has no description ({error})") from None
