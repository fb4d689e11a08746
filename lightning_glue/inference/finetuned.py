"""A model that a run exported, read again without executing anything in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_glue.data import tokenizer
from lightning_glue.data.labels import LabelOrder
from lightning_glue.data.tokenizer import Tokenizer
from lightning_glue.errors import CheckpointError
from lightning_glue.inference.foreign import describe, outputs_by_name, refuse_pairs_of_bert
from lightning_glue.model import huggingface
from lightning_glue.model.checkpoint_file import fairseq_args, reading, safe_load, weights_file
from lightning_glue.model.pretrained import Pretrained
from lightning_glue.model.roberta import HEAD, RobertaModel, build_model, head_names, with_outputs
from lightning_glue.tasks import TASKS, Task, described_task, get_task
from lightning_glue.utils.digests import file_sha256

# Settings of a run (see training.run.settings) and what they are; what a file has besides is not looked at.
_SETTINGS: dict[str, Any] = {
    "data.source": str,
    "data.glue_dir": str,
    "GLUE_DIR": str,
    "data.on_bad_row": str,
    "data.max_tokens": int,
    "data.eval_tokens": int | None,
    "trainer.precision": str,
    "sha256": dict,
    "temperature": float,  # fitted on the dev set, see lightning_glue.inference.calibration
}


@dataclass(frozen=True)
class FineTuned:
    """A model fine-tuned by a run, its head's outputs in the order of ``Task.labels``.

    Attributes:
        settings: of the run, see :func:`lightning_glue.training.run.settings`; empty for exports of earlier versions.
    """

    model: RobertaModel
    task: Task
    tokenizer: Tokenizer
    path: Path
    sha256: str
    settings: dict[str, Any]


def load_fine_tuned(path: Path) -> FineTuned:
    """Load an exported directory, the checkpoint in one, or a classifier of Hugging Face, to evaluate and predict.

    Raises:
        UserError: nothing is there, or no model of a task that can be scored; names the file.
    """
    if theirs := huggingface.folder_of(path):
        return _load_huggingface(theirs)
    path = weights_file(path)
    state = safe_load(path)
    if "glue_task" not in state:
        raise CheckpointError(f"{path} was not exported by a training run (its 'glue_task' is missing)")
    with reading(str(path)):
        task, encoder = _task(state), tokenizer.exported(path.parent)
        if state.get("glue_tokenizer", encoder.digest) != encoder.digest:
            raise CheckpointError(
                f"the files of its tokenizer in {path.parent} are not those that it was exported with"
            )
        weights = _head_in_registry_order(state, task)
        start = Pretrained(fairseq_args(state, path), state["model"], encoder, file_sha256(path))
        model = build_model(start, task.num_outputs, {})
        if any(tensor.dtype == torch.float64 for tensor in weights.values()):
            model.double()  # trained with trainer.precision=64-true
        model.load_state_dict(weights, strict=True)
        _check_finite(model.state_dict())
        return FineTuned(model.eval(), task, encoder, path, start.sha256, _settings(state))


def _task(state: dict[str, Any]) -> Task:
    """The task of an export: a built-in one, or the one that is described in it as JSON."""
    description = state.get("glue_description")
    if not description:
        return get_task(state["glue_task"])
    try:
        return described_task(json.loads(description))
    except (TypeError, ValueError, RecursionError):
        raise CheckpointError("its 'glue_description' is damaged") from None


def _load_huggingface(folder: Path) -> FineTuned:
    """A ``*ForSequenceClassification``: what :mod:`lightning_glue.export.huggingface` wrote, or anybody's of a task.

    ``config.json`` says which task it is (``lightning_glue``, or ``finetuning_task`` as transformers' own scripts
    write it), and ``id2label`` the order of its outputs. Where it names none, :mod:`.foreign` makes a task of it.
    """
    found = huggingface.load(folder)
    with reading(str(folder)):
        state = _record(found, folder)
        task = _task(state)
        refuse_pairs_of_bert(found, task)
        weights = _head_in_registry_order(state, task)
        start = Pretrained(found.args, found.state, found.tokenizer, found.sha256)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same lm_head each time: such a folder has none
            model = build_model(start, task.num_outputs, {})
        if any(tensor.dtype == torch.float64 for tensor in weights.values()):
            model.double()
        model.load_state_dict(model.state_dict() | weights, strict=True)
        _check_finite(model.state_dict())
        return FineTuned(model.eval(), task, found.tokenizer, folder, found.sha256, _settings(state))


def _record(found: huggingface.HuggingFace, folder: Path) -> dict[str, Any]:
    """What an export of fairseq says of itself, from a folder's ``config.json``."""
    own = found.config.get("lightning_glue")
    own = own if isinstance(own, dict) else {}
    labels = outputs_by_name(found)
    name, description = own.get("task") or _task_called(str(found.config.get("finetuning_task", ""))), ""
    if not name:
        said = describe(found, folder, labels)
        name, description = said["name"], json.dumps(said)
    return {
        "model": found.state,
        "glue_task": str(name),
        "glue_description": own.get("description", "") or description,
        "glue_labels": labels,
        "glue_settings": own.get("settings", {}),
    }


def _task_called(name: str) -> str:
    """The task whose name, as transformers' scripts have it (``sst2``, ``stsb``), this is; empty if none."""
    plain = name.lower().replace("-", "").replace("_", "")
    return next((task for task in TASKS if task.lower().replace("-", "") == plain), "")


def fine_tuned_weights(path: Path, task: Task) -> dict[str, torch.Tensor]:
    """The weights of another export of a task, its head's outputs in the order of ``Task.labels``.

    They stay in the file, whose pages are read when they are used.

    Raises:
        UserError: as :func:`load_fine_tuned`, and where the model is of another task.
    """
    path = weights_file(path)
    state = safe_load(path, mapped=True)
    if state.get("glue_task") != task.name:
        raise CheckpointError(f"{path} is a model of {state.get('glue_task')}, expected one of {task.name}")
    with reading(str(path)):
        weights = _head_in_registry_order(state, task)
        _check_finite(weights)
        return weights


def _head_in_registry_order(state: dict[str, Any], task: Task) -> dict[str, torch.Tensor]:
    """Undo the label order of the fairseq layout (see :func:`lightning_glue.export.fairseq.fairseq_state`)."""
    weights, names = state["model"], head_names("out_proj")
    missing = {*head_names("dense"), *names} - weights.keys()
    if missing or any(len(weights[name]) != task.num_outputs for name in names):
        raise CheckpointError(
            f"its head is none of {task.name}: expected classification_heads.{HEAD} with {task.num_outputs} outputs"
        )
    if task.is_regression:
        return weights
    labels = state.get("glue_labels")
    if not isinstance(labels, list) or sorted(map(repr, labels)) != sorted(map(repr, task.labels)):
        raise CheckpointError(f"its 'glue_labels' are {labels!r}, expected {task.name}'s: {', '.join(task.labels)}")
    return with_outputs(weights, LabelOrder(task, tuple(labels)).from_fairseq)


def _check_finite(weights: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{name} holds NaN or infinite values: the training diverged, there is nothing to score"
            )


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that a checkpoint brings; what they may be, ``config`` checks."""
    found = state.get("glue_settings", {})
    if not isinstance(found, dict):
        raise CheckpointError(f"its 'glue_settings' are {found!r}, expected a dictionary")
    for key, kind in _SETTINGS.items():
        if key in found and (not isinstance(found[key], kind) or "${" in str(found[key])):
            raise CheckpointError(f"its 'glue_settings' has {key}={found[key]!r}")
    return {key: found[key] for key in _SETTINGS if key in found}
