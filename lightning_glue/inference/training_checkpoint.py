"""A ``*.ckpt`` that training wrote, as a model to predict with.

It holds weights and the run's configuration; the tokenizer and the architecture come from the run's exported directory
where that lies beside it, else from what the configuration names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.data import tokenizer
from lightning_glue.errors import CheckpointError
from lightning_glue.inference.finetuned import FineTuned, load_fine_tuned
from lightning_glue.model.checkpoint_file import fairseq_args, reading, safe_load
from lightning_glue.model.pretrained import Pretrained, load_pretrained
from lightning_glue.model.roberta import build_model
from lightning_glue.tasks import get_task
from lightning_glue.utils.digests import file_sha256

_RECORD = "lightning_glue"  # see lightning_glue.training.checkpoints
_PREFIX = "model."  # of the RobertaModel in GlueModule


def load_any(path: Path) -> FineTuned:
    """A ``*.ckpt`` of a training, or an export; raises what the loaders of either do."""
    return load_training_checkpoint(path) if path.suffix == ".ckpt" else load_fine_tuned(path)


def load_training_checkpoint(path: Path) -> FineTuned:
    """Load ``checkpoints/best.ckpt`` of a run, or another one of it.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint of a training; or its tokenizer is not to be had.
    """
    state = safe_load(path)
    record = state.get(_RECORD)
    if not isinstance(record, dict) or "state_dict" not in state:
        raise CheckpointError(f"{path} is no checkpoint of a training; expected checkpoints/best.ckpt of a run")
    with reading(str(path)):
        config = _config(record)
        task = configuration.task_of(config) if config.task.description else get_task(str(record.get("task")))
        start = _start(path, config, str(record.get("lineage", {}).get("tokenizer_sha256", "")))
        found = state["state_dict"].items()
        weights = {name.removeprefix(_PREFIX): tensor for name, tensor in found if name.startswith(_PREFIX)}
        model = build_model(replace(start, state=weights), task.num_outputs, {})
        if any(tensor.dtype == torch.float64 for tensor in weights.values()):
            model.double()
        model.load_state_dict(weights, strict=True)
        if lost := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise CheckpointError(f"{lost[0]} holds NaN or infinite values: the training diverged")
        settings: dict[str, Any] = {"data.max_tokens": config.data.max_tokens}
        return FineTuned(model.eval(), task, start.tokenizer, path, file_sha256(path), settings)


def _config(record: dict[str, Any]) -> Config:
    """The run's configuration; keys that are newer than the run have their defaults."""
    return configuration.unflatten(configuration.flatten(configuration.compose()) | dict(record.get("config", {})))


def _start(path: Path, config: Config, digest: str) -> Pretrained:
    """Architecture and tokenizer of the model."""
    exported = path.absolute().parent.parent / "fairseq"
    if (exported / "checkpoint_best.pt").is_file():
        file = exported / "checkpoint_best.pt"
        start = Pretrained(fairseq_args(safe_load(file, mapped=True), file), None, tokenizer.exported(exported), "")
    else:
        model = config.model
        start = load_pretrained(model.source, model.tokenizer, config.data.bpe_dir, model.architecture)
    if digest and start.tokenizer.digest != digest:
        where = exported if exported.is_dir() else config.model.source
        raise CheckpointError(f"the tokenizer of {where} is not the one that it was trained with")
    return start
