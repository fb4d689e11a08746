"""A fine-tuned model as a fairseq directory that unmodified fairseq loads.

``checkpoint_best.pt``, ``input0/dict.txt``, ``label/dict.txt`` and the encoder's files under the names
``RobertaModel.from_pretrained`` looks for in a checkpoint's folder (``fairseq/hub_utils.py``), so that it works
wherever the folder is moved, with ``data_name_or_path="."`` or with the ``RTE-bin`` of preprocessing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_glue.data.labels import LabelOrder
from lightning_glue.data.tokenizer import BOS, EOS, Tokenizer
from lightning_glue.model.roberta import HEAD, RobertaModel, with_outputs
from lightning_glue.tasks import Task
from lightning_glue.utils.files import new_file

# from_pretrained overrides every configuration key named bpe_vocab, bpe_merges or bpe_codes with the path of
# vocab.json, merges.txt or bpecodes beside the checkpoint; the encoder's own keys then refer to these.
_BPE_CONFIG: dict[str, dict[str, str | bool]] = {
    "gpt2": {"gpt2_encoder_json": "${bpe_files.bpe_vocab}", "gpt2_vocab_bpe": "${bpe_files.bpe_merges}"},
    "bert": {"bpe_cased": False, "bpe_vocab_file": "${bpe_files.bpe_codes}"},
}


def fairseq_config(args: dict[str, Any], task: Task, tokenizer: Tokenizer) -> dict[str, Any]:
    """The checkpoint's ``cfg``: plain values only, so that it loads with ``weights_only=True``."""
    return {
        "_name": None,
        "common": {"_name": None, "seed": 1},
        "checkpoint": {"_name": None},
        "model": {**args, "_name": "roberta", "arch": "roberta"},
        "task": {
            "_name": "sentence_prediction",
            "data": ".",
            "num_classes": task.num_outputs,
            "init_token": BOS,
            "separator_token": EOS,
            "max_positions": args["max_positions"],
            "regression_target": task.is_regression,
            "classification_head_name": HEAD,
            "seed": 1,
        },
        "criterion": {
            "_name": "sentence_prediction",
            "classification_head_name": HEAD,
            "regression_target": task.is_regression,
        },
        "bpe": {"_name": tokenizer.bpe, **_BPE_CONFIG[tokenizer.bpe]},
        "bpe_files": {"bpe_vocab": None, "bpe_merges": None, "bpe_codes": None},
    }


def fairseq_state(model: RobertaModel, order: LabelOrder) -> dict[str, torch.Tensor]:
    """The model's state dict with the head's outputs in fairseq's order."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return state if order.task.is_regression else with_outputs(state, order.to_fairseq)


def export(
    model: RobertaModel,
    task: Task,
    tokenizer: Tokenizer,
    label_symbols: list[str],
    updates: int,
    out: Path,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the directory ``out``.

    Args:
        label_symbols: labels in the order of the preprocessed ``label/dict.txt``; empty for regression.
        updates: optimizer steps taken, which fairseq calls ``num_updates``.
        settings: of the run, see :func:`settings`.
    """
    order = LabelOrder(task, tuple(label_symbols))
    labels = order.labels
    (out / "input0").mkdir(parents=True, exist_ok=True)
    (out / "input0" / "dict.txt").write_text(tokenizer.dictionary_text, encoding="utf-8")
    if labels:
        (out / "label").mkdir(exist_ok=True)
        (out / "label" / "dict.txt").write_text("".join(f"{label} 1\n" for label in labels), encoding="utf-8")
    for name, content in tokenizer.files.items():
        (out / name).write_bytes(content)
    state = {
        "cfg": fairseq_config(model_args(model), task, tokenizer),
        "args": None,
        "model": fairseq_state(model, order),
        "optimizer_history": [
            {
                "criterion_name": "SentencePredictionCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": updates,
            }
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
        "glue_task": task.name,
        "glue_description": task.description,
        "glue_labels": labels,
        "glue_tokenizer": tokenizer.digest,
        "glue_settings": dict(settings or {}),
    }
    with new_file(out / "checkpoint_best.pt", "wb") as file:
        torch.save(state, file)
    return out


def model_args(model: RobertaModel) -> dict[str, Any]:
    """The architecture as plain values (fairseq's dataclass defaults and private entries left out)."""
    plain = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in vars(model.args).items()
        if isinstance(value, plain) and not name.startswith("_") and name != "load_checkpoint_heads"
    }
