"""Checkpoints of earlier runs: found by path or MLflow run id, read without executing anything in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_glue import tokenizer
from lightning_glue.errors import UserError, first_line
from lightning_glue.journal import delivered_run
from lightning_glue.model import HEAD, RobertaModel, build_model
from lightning_glue.pretrained import Pretrained, fairseq_args, file_sha256, safe_load
from lightning_glue.store import connect
from lightning_glue.tasks import Task, get_task
from lightning_glue.tokenizer import Tokenizer

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_PREFIX = "model."  # of the RobertaModel in a Lightning checkpoint of GlueModule


@dataclass(frozen=True)
class FineTuned:
    """A model fine-tuned by a run, its head's outputs in the order of ``Task.labels``."""

    model: RobertaModel
    task: Task
    tokenizer: Tokenizer
    path: Path
    sha256: str


def locate(reference: str, uri: str | None) -> Path:
    """The checkpoint file behind a path (file or exported directory) or an MLflow run id.

    Raises:
        UserError: nothing is there; names what was looked for.
    """
    path = Path(reference).expanduser()
    if _RUN_ID.fullmatch(reference) and not path.exists():
        path = _download_export(delivered_run(reference), uri)
    if path.is_dir():
        path = path / "checkpoint_best.pt"
    if not path.is_file():
        raise UserError(f"{reference}: no checkpoint there; expected a file, a fairseq directory or an MLflow run id")
    return path


def _download_export(run_id: str, uri: str | None) -> Path:
    from mlflow.exceptions import MlflowException

    try:
        return Path(connect(uri, retries=2).download_artifacts(run_id, "fairseq"))
    except (MlflowException, OSError) as error:
        raise UserError(f"run {run_id}: no fairseq directory to be had ({first_line(error)})") from None


def model_state(path: Path) -> dict[str, torch.Tensor]:
    """fairseq state dict of a checkpoint: a fairseq ``*.pt``, or a ``*.ckpt`` that training wrote."""
    state = safe_load(path)
    if "state_dict" in state:
        return {
            name.removeprefix(_PREFIX): tensor
            for name, tensor in state["state_dict"].items()
            if name.startswith(_PREFIX)
        }
    fairseq_args(state, path)  # raises where this is no fairseq checkpoint
    return state["model"]


def load_fine_tuned(reference: str, uri: str | None) -> FineTuned:
    """Load an exported directory (or a run's) for evaluation and prediction."""
    path = locate(reference, uri)
    state = safe_load(path)
    if "glue_task" not in state:
        raise UserError(f"{path} was not exported by a training run (its 'glue_task' is missing)")
    task, encoder = get_task(state["glue_task"]), tokenizer.exported(path.parent)
    start = Pretrained(fairseq_args(state, path), state["model"], encoder, file_sha256(path))
    model = build_model(start, task.num_outputs, {})
    model.load_state_dict(_head_in_registry_order(state, task), strict=True)
    return FineTuned(model.eval(), task, encoder, path, start.sha256)


def _head_in_registry_order(state: dict[str, Any], task: Task) -> dict[str, torch.Tensor]:
    """Undo the label order of the fairseq layout (see :func:`lightning_glue.export.fairseq_state`)."""
    weights = dict(state["model"])
    if not task.is_regression:
        order = [state["glue_labels"].index(label) for label in task.labels]
        for kind in ("weight", "bias"):
            name = f"classification_heads.{HEAD}.out_proj.{kind}"
            weights[name] = weights[name][order]
    return weights
