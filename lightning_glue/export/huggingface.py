"""A fine-tuned model as a folder that transformers loads: ``AutoModelForSequenceClassification``, ``pipeline``.

Written without transformers: ``config.json``, ``model.safetensors`` and the tokenizer's files. The architecture is
RoBERTa's, whatever the model came from; that of ``minilm`` has its WordPiece in ``tokenizer.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_glue.data import huggingface_tokenizer
from lightning_glue.data.tokenizer import Tokenizer
from lightning_glue.errors import CheckpointError
from lightning_glue.model import huggingface, unpadded
from lightning_glue.model.roberta import RobertaModel, token_limit
from lightning_glue.tasks import Task
from lightning_glue.utils.files import new_file

WEIGHTS = "model.safetensors"
# Arguments of fairseq's model, and what transformers' RoBERTa has in their place.
_FIXED = {
    "activation_fn": "gelu",
    "pooler_activation_fn": "tanh",
    "no_scale_embedding": True,
    "layernorm_embedding": True,
    "untie_weights_roberta": False,
    "spectral_norm_classification_head": False,
}


def export(model: RobertaModel, task: Task, tokenizer: Tokenizer, out: Path, settings: Mapping[str, Any]) -> None:
    """Write the folder ``out``, which is there.

    Args:
        settings: of the run, see :func:`lightning_glue.training.run.settings`.

    Raises:
        CheckpointError: transformers has no such architecture.
    """
    from safetensors.torch import save_file

    from lightning_glue.export.fairseq import model_args

    check(model)
    args, state = model_args(model), model.state_dict()
    names = huggingface_tokenizer.token_names(tokenizer)
    weights = huggingface.to_huggingface(state, args["encoder_layers"], len(names))
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    config = huggingface.make_config(args, state, len(names)) | task_config(task, settings)
    with new_file(out / "config.json") as file:
        file.write(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    (out / WEIGHTS).chmod((out / "config.json").stat().st_mode)  # the library lets the owner alone read it
    limit = token_limit(model, settings.get("data.max_tokens", 512))
    huggingface_tokenizer.write(tokenizer, out, limit)


def check(model: RobertaModel) -> None:
    """Raise CheckpointError where transformers' RoBERTa computes something else."""
    args = vars(model.args)
    other = {name: args[name] for name, value in _FIXED.items() if args.get(name, value) != value}
    if other or not unpadded.supports(model):
        found = (
            ", ".join(f"{name}={value}" for name, value in other.items()) or "its encoder's layers are of another kind"
        )
        raise CheckpointError(f"the model has no counterpart in transformers' RoBERTa: {found}")


def task_config(task: Task, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says of the head; outputs are in the order of ``Task.labels``."""
    labels = task.labels or ("score",)
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": task.problem_type,
        "lightning_glue": {
            "task": task.name,
            "description": getattr(task, "description", ""),
            "label_scale": task.label_scale,
            "label_offset": getattr(task, "label_offset", 0.0),
            "settings": dict(settings),
        },
    }
