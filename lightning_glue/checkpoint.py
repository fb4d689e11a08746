"""Checkpoints of earlier runs: found by path or MLflow run id, read without executing anything in them."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_glue import tokenizer
from lightning_glue.addresses import hide_secrets
from lightning_glue.errors import UserError, first_line
from lightning_glue.journal import delivered_run
from lightning_glue.model import HEAD, RobertaModel, build_model
from lightning_glue.pretrained import Pretrained, fairseq_args, file_sha256, safe_load, weights_file
from lightning_glue.store import connect
from lightning_glue.tasks import Task, get_task
from lightning_glue.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlflow import MlflowClient

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_PREFIX = "model."  # of the RobertaModel in a Lightning checkpoint of GlueModule


_EXPORT = "fairseq"  # the run's artifact folder
_READ = ("checkpoint_best.pt", "input0/dict.txt", "vocab.json", "merges.txt", "bpecodes")  # what is read of it
EXPORT_DIGEST = "lineage.export_sha256"  # the run's tag: SHA-256 of the exported checkpoint
# Settings of a run (see export.settings) and what they are; what a file has besides is not looked at.
_SETTINGS: dict[str, Any] = {
    "data.source": str,
    "data.glue_dir": str,
    "GLUE_DIR": str,
    "data.on_bad_row": str,
    "data.max_tokens": int,
    "data.eval_tokens": int | None,
    "trainer.precision": str,
    "sha256": dict,
}


@dataclass(frozen=True)
class FineTuned:
    """A model fine-tuned by a run, its head's outputs in the order of ``Task.labels``.

    Attributes:
        settings: of the run, see :func:`lightning_glue.export.settings`; empty for exports of earlier versions.
    """

    model: RobertaModel
    task: Task
    tokenizer: Tokenizer
    path: Path
    sha256: str
    settings: dict[str, Any]


@contextmanager
def reading(name: str) -> Iterator[None]:
    """One line that says ``name``, whatever the content of a foreign file makes the libraries raise."""
    try:
        yield
    except MemoryError:
        raise
    except UserError as error:
        raise (error if name in str(error) else UserError(f"{name}: {error}")) from error
    except Exception as error:
        said = hide_secrets(" ".join(str(error).split()))[:300]
        raise UserError(f"{name} does not hold a model as expected ({type(error).__name__}: {said})") from error


def locate(reference: str, uri: str | None) -> Path:
    """The checkpoint file behind a path (file or exported directory) or an MLflow run id.

    Raises:
        UserError: nothing is there, or not what the run left; names what was looked for.
    """
    path = Path(reference).expanduser()
    if _RUN_ID.fullmatch(reference) and not path.exists():
        return _exported_by(delivered_run(reference), uri)
    if path.is_dir():
        path = weights_file(path)
    if not path.is_file():
        raise UserError(f"{reference}: no checkpoint there; expected a file, a fairseq directory or an MLflow run id")
    return path


def _exported_by(run_id: str, uri: str | None) -> Path:
    """The checkpoint in a run's fairseq directory: where it is on this machine, else downloaded until the exit."""
    from mlflow.exceptions import MlflowException

    from lightning_glue.paths import local_folder

    try:
        client = connect(uri, retries=2)
        run = client.get_run(run_id)
        store = local_folder(run.info.artifact_uri)
        path = (store / _EXPORT if store else _download_export(client, run_id)) / "checkpoint_best.pt"
    except (MlflowException, OSError) as error:
        raise UserError(f"run {run_id}: no fairseq directory to be had ({first_line(error)})") from None
    if not path.is_file():
        raise UserError(f"run {run_id}: no fairseq directory to be had (no {_EXPORT}/{path.name} among its artifacts)")
    expected = run.data.tags.get(EXPORT_DIGEST)
    if expected and file_sha256(path) != expected:
        raise UserError(f"run {run_id}: {path} is damaged: its SHA-256 is not the one that the run noted")
    return path


def _download_export(client: MlflowClient, run_id: str) -> Path:
    """Bring here those files of a run's export that are read, and no other name that its store may list."""
    target = Path(tempfile.mkdtemp(prefix="lightning-glue-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    listed = {item.path for item in client.list_artifacts(run_id, _EXPORT)}
    for name in _READ:
        if f"{_EXPORT}/{name.partition('/')[0]}" in listed:
            folder = (target / name).parent
            folder.mkdir(exist_ok=True)
            client.download_artifacts(run_id, f"{_EXPORT}/{name}", str(folder))
    return target


def model_state(path: Path) -> dict[str, torch.Tensor]:
    """fairseq state dict of a checkpoint: a fairseq ``*.pt``, or a ``*.ckpt`` that training wrote."""
    state = safe_load(path)
    with reading(str(path)):
        if "state_dict" in state:
            return {
                name.removeprefix(_PREFIX): tensor
                for name, tensor in state["state_dict"].items()
                if name.startswith(_PREFIX)
            }
        fairseq_args(state, path)  # raises where this is no fairseq checkpoint
        return state["model"]


def load_fine_tuned(reference: str, uri: str | None) -> FineTuned:
    """Load an exported directory (or a run's) for evaluation and prediction.

    Raises:
        UserError: nothing is there, or no model of ours that can be scored; names the file.
    """
    path = locate(reference, uri)
    state = safe_load(path)
    if "glue_task" not in state:
        raise UserError(f"{path} was not exported by a training run (its 'glue_task' is missing)")
    with reading(str(path)):
        task, encoder = get_task(state["glue_task"]), tokenizer.exported(path.parent)
        if state.get("glue_tokenizer", encoder.digest) != encoder.digest:
            raise UserError(f"the files of its tokenizer in {path.parent} are not those that it was exported with")
        weights = _head_in_registry_order(state, task)
        start = Pretrained(fairseq_args(state, path), state["model"], encoder, file_sha256(path))
        model = build_model(start, task.num_outputs, {})
        if any(tensor.dtype == torch.float64 for tensor in weights.values()):
            model.double()  # trained with trainer.precision=64-true
        model.load_state_dict(weights, strict=True)
        _check_finite(model)
        return FineTuned(model.eval(), task, encoder, path, start.sha256, _settings(state))


def _head_in_registry_order(state: dict[str, Any], task: Task) -> dict[str, torch.Tensor]:
    """Undo the label order of the fairseq layout (see :func:`lightning_glue.export.fairseq_state`)."""
    weights = dict(state["model"])
    head = f"classification_heads.{HEAD}"
    names = [f"{head}.out_proj.{kind}" for kind in ("weight", "bias")]
    missing = {f"{head}.dense.weight", f"{head}.dense.bias", *names} - weights.keys()
    if missing or any(len(weights[name]) != task.num_outputs for name in names):
        raise UserError(f"its head is none of {task.name}: expected {head} with {task.num_outputs} outputs")
    if not task.is_regression:
        labels = state.get("glue_labels")
        if not isinstance(labels, list) or sorted(map(str, labels)) != sorted(task.labels):
            raise UserError(f"its 'glue_labels' are {labels!r}, expected {task.name}'s: {', '.join(task.labels)}")
        order = [labels.index(label) for label in task.labels]
        for name in names:
            weights[name] = weights[name][order]
    return weights


def _check_finite(model: RobertaModel) -> None:
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds NaN or infinite values: the training diverged, there is nothing to score")


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that a checkpoint brings; what they may be, ``config`` checks."""
    found = state.get("glue_settings", {})
    if not isinstance(found, dict):
        raise UserError(f"its 'glue_settings' are {found!r}, expected a dictionary")
    for key, kind in _SETTINGS.items():
        if key in found and (not isinstance(found[key], kind) or "${" in str(found[key])):
            raise UserError(f"its 'glue_settings' has {key}={found[key]!r}")
    return {key: found[key] for key in _SETTINGS if key in found}
