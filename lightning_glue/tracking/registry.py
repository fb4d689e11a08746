"""Register a run's best model as ``glue-<task>``: ``python -m lightning_glue.registry RUN_ID``.

Every finished training does so by itself (``tracking.register``); models of generated data are ``glue-<task>-sample``,
those of data of one's own have their name.
The model is the run's exported fairseq directory itself, with an MLmodel file beside the weights: nothing is copied.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.errors import TrackingError
from lightning_glue.tasks import Task
from lightning_glue.tracking.own_tasks import whole_task
from lightning_glue.utils.paths import local_folder
from lightning_glue.utils.redact import first_line, hide_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
_EXPORT = "fairseq"  # the run's artifact folder
_LINEAGE, _DATA, _SCORE = ("lineage.", "mlflow.source.git.commit"), "data.", "score"  # tags of a version
MAJORITY = "majority"  # tag of a run: the selection metric of saying the most frequent class
_CONTEST = "contest"  # tag of a version: another value each time that it asks to be champion


def describe_model(task: Task, run_id: str, folder: Path) -> None:
    """Write MLmodel, environment, signature and input example of an exported directory into ``folder``."""
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    from lightning_glue.tasks import input_columns
    from lightning_glue.tracking.requirements import write_environment

    texts = input_columns(task)
    outputs: list[ColSpec | TensorSpec] = [ColSpec(DataType.double, "score")]
    if task.labels:
        probabilities = [ColSpec(DataType.double, f"probability_{label}") for label in task.labels]
        several = ColSpec(Array(DataType.string), "labels")
        outputs = [several if task.multilabel else ColSpec(DataType.string, "label"), *probabilities]
    inputs = Schema([ColSpec(DataType.string, name) for name in texts])
    signature = ModelSignature(inputs, Schema(outputs))
    meaning = {"labels": dict(zip(task.labels, task.meanings))} if task.meanings else None
    model = Model(run_id=run_id, artifact_path=_EXPORT, signature=signature, metadata=meaning)
    pyfunc.add_to_model(model, loader_module="lightning_glue.serving", **write_environment(folder))
    example = pd.DataFrame({name: ["A sentence of the input."] for name in texts})
    (folder / "input_example.json").write_text(json.dumps(example.to_dict(orient="split", index=False)))
    model.saved_input_example_info = {
        "artifact_path": "input_example.json", "type": "dataframe", "pandas_orient": "split",
    }  # fmt: skip
    model.save(str(folder / "MLmodel"))


def dataset_digests(run: Run) -> dict[str, str]:
    """Digest of each split that a run was trained and scored on."""
    datasets = [entry.dataset for entry in run.inputs.dataset_inputs] if run.inputs else []
    return {dataset.name.rpartition("/")[2]: dataset.digest for dataset in datasets}


def difference(one: dict[str, str], other: dict[str, str]) -> str:
    """Which splits differ between two sets of digests, in words."""
    names = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    return "; ".join(f"{name} {one.get(name, 'none')[:12]} against {other.get(name, 'none')[:12]}" for name in names)


def selection_value(run: Run, task: Task) -> float:
    name = f"best/{task.selection_metric}"
    if name not in run.data.metrics:
        raise TrackingError(f"run {run.info.run_id} has no metric {name}: it was not trained to its end")
    return run.data.metrics[name]


def majority_of(run: Run) -> float | None:
    """The selection metric of saying the most frequent class for every example; None where the run does not say."""
    try:
        value = float(run.data.tags.get(MAJORITY, "nan"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def promote(client: MlflowClient, name: str, version: ModelVersion, task: Task) -> str:
    """Make a version the champion if it beats the holder on the same dev data; says what was decided.

    What is compared stands on the versions themselves, so that a holder whose run was deleted can still be beaten.
    The store has no comparison and assignment in one. Of trainings that end together each marks its version first,
    and once it has set the alias looks whether another was marked meanwhile: the last one gives it to the best.
    """
    before = _contests(client, name)
    client.set_model_version_tag(name, version.version, _CONTEST, uuid.uuid4().hex)
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    if number is not None and str(number) != str(version.version):
        holder = client.get_model_version(name, number)
        if reason := _incomparable(holder, version):
            return f"not compared with the champion, version {number}: {reason}"
        if _score(version) <= _score(holder):
            return _stays(holder, version, task)
    client.set_registered_model_alias(name, CHAMPION, version.version)
    rivals = [
        rival for rival, mark in _contests(client, name).values() if before.get(rival.version, ("", ""))[1] != mark
    ]
    better = [rival for rival in rivals if not _incomparable(rival, version) and _score(rival) > _score(version)]
    if better:
        best = max(better, key=_score)
        client.set_registered_model_alias(name, CHAMPION, best.version)
        return _stays(best, version, task)
    return f"the champion: {task.selection_metric} {_score(version):.4f}"


def _contests(client: MlflowClient, name: str) -> dict[str, tuple[ModelVersion, str]]:
    """The versions of a model that ever asked to be champion, by number, with the mark of the last time."""
    found = client.search_model_versions(f"name = '{name}'")
    return {version.version: (version, version.tags[_CONTEST]) for version in found if _CONTEST in version.tags}


def _incomparable(one: ModelVersion, other: ModelVersion) -> str:
    """Why two versions are not compared; empty if they can be."""
    try:
        _score(one)
    except (KeyError, ValueError):  # registered by hand
        return f"its tag {_SCORE!r} is no number"
    return difference(_dev_data(one), _dev_data(other))


def _score(version: ModelVersion) -> float:
    return float(version.tags[_SCORE])


def _stays(holder: ModelVersion, version: ModelVersion, task: Task) -> str:
    scores = f"{task.selection_metric} {_score(holder):.4f} against {_score(version):.4f}"
    return f"version {holder.version} stays champion: {scores}"


def _dev_data(version: ModelVersion) -> dict[str, str]:
    return {key.removeprefix(_DATA): value for key, value in version.tags.items() if key.startswith(_DATA + "dev")}


def register(client: MlflowClient, run_id: str) -> tuple[str, str, str]:
    """Register a finished run's best model once.

    A model no better than saying the most frequent class is registered like any other; what is said of it warns.

    Returns:
        The registered name, the version, and what became of the alias ``champion``.

    Raises:
        UserError: an unfinished or a diverged run, or one without an exported model.
        MlflowException, OSError: the server is away or refuses.
    """
    run = client.get_run(run_id)
    if run.info.status != "FINISHED" or "task.name" not in run.data.params:
        raise TrackingError(f"run {run_id} is {run.info.status}; only a finished training can be registered")
    task = whole_task(client, run)
    selection_value(run, task)
    lost = [name for name, value in run.data.metrics.items() if name.startswith("best/") and not math.isfinite(value)]
    if lost:
        raise TrackingError(f"run {run_id}: {lost[0]} is no finite number, so the training diverged; not registered")
    if not client.list_artifacts(run_id, _EXPORT):
        raise TrackingError(f"run {run_id} has no folder {_EXPORT!r}: train with tracking.checkpoints=true")
    name = task.place(run.data.params.get("data.source", "glue"))
    version = _version_of(client, name, run_id) or _new_version(client, name, run, task)
    decided = promote(client, name, version, task)
    level, value = majority_of(run), selection_value(run, task)
    if level is not None and value <= level:
        decided += f"; warning: no better than {task.constant_answer} ({value:.4f} against {level:.4f})"
    return name, version.version, decided


def locate_version(reference: str, uri: str | None) -> Path:
    """The exported model behind ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.

    Raises:
        TrackingError: the store has no such model, or cannot be used.
        UserError: its files are gone or damaged.
    """
    from mlflow.exceptions import MlflowException

    from lightning_glue.tracking.artifacts import locate
    from lightning_glue.tracking.client import connect

    found = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if not found:
        raise TrackingError(f"{reference} names no model; expected models:/<name>@champion or models:/<name>/<version>")
    name, alias, number = found.groups()
    try:
        client = connect(uri, retries=2)
        version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except (MlflowException, OSError) as error:
        raise TrackingError(f"{reference}: {first_line(error)}") from None
    if version.run_id:
        return locate(version.run_id, uri)
    folder = local_folder(version.source or "")
    if not folder:
        raise TrackingError(f"{reference} is of no run, and its files at {hide_secrets(str(version.source))} not here")
    return folder


def _version_of(client: MlflowClient, name: str, run_id: str) -> ModelVersion | None:
    """The run's version, the first one if there are several; its model may be registered under other names, too."""
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return min(found, key=lambda version: int(version.version), default=None)


def _new_version(client: MlflowClient, name: str, run: Run, task: Task) -> ModelVersion:
    with tempfile.TemporaryDirectory(prefix="lightning-glue-") as folder:
        describe_model(task, run.info.run_id, Path(folder))
        client.log_artifacts(run.info.run_id, folder, _EXPORT)
    _make_registered_model(client, name, f"RoBERTa fine-tuned on {task.name}")
    tags = {key: value for key, value in run.data.tags.items() if key.startswith(_LINEAGE)}
    tags |= {f"{_DATA}{split}": digest for split, digest in dataset_digests(run).items()}
    tags[_SCORE] = repr(selection_value(run, task))
    source = f"{run.info.artifact_uri}/{_EXPORT}"
    described = _describe(client, run, task)
    # The version is there when the call returns; to wait for it would be said on the terminal.
    made = client.create_model_version(name, source, run.info.run_id, tags, description=described, await_creation_for=0)
    first = _version_of(client, name, run.info.run_id) or made
    if first.version != made.version:  # another process registered the same run just now
        client.delete_model_version(name, made.version)
    return first


def _describe(client: MlflowClient, run: Run, task: Task) -> str:
    """:func:`describe_version` with the model's card behind it, where the run's export has one."""
    from lightning_glue.tracking.card_of_run import completed, facts_of
    from lightning_glue.tracking.model_card import description

    first = describe_version(run, task)
    facts = facts_of(client, run, _EXPORT)
    return description(*completed(facts, client, run), first) if facts else first


def describe_version(run: Run, task: Task) -> str:
    """What is to be known of a version at a glance: its score, its run, and what its labels mean."""
    score = f"{task.selection_metric} {selection_value(run, task):.4f}, of run {run.info.run_name or run.info.run_id}"
    meanings = ", ".join(f"{label} is {meaning}" for label, meaning in zip(task.labels, task.meanings))
    return f"{score}. Labels: {meanings}." if meanings else f"{score}."


def _make_registered_model(client: MlflowClient, name: str, description: str) -> None:
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):  # it exists, or another training is just making it
        client.create_registered_model(name, description=description)
    client.get_registered_model(name)  # raises what really went wrong
