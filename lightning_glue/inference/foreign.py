"""A classifier of Hugging Face that says no task: a description of one, from ``id2label`` and ``problem_type``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_glue.data.own import usual_metrics
from lightning_glue.errors import CheckpointError
from lightning_glue.model.huggingface import HEAD
from lightning_glue.tasks import Task, name_fault

if TYPE_CHECKING:
    from lightning_glue.model.huggingface import HuggingFace

_KINDS = {
    "regression": "regression",
    "single_label_classification": "classes",
    "multi_label_classification": "multi-label",
}


def outputs_by_name(found: HuggingFace) -> list[str]:
    """The labels in the order of the head's outputs: ``id2label``, without it ``LABEL_0`` and so on as transformers.

    Raises:
        CheckpointError: there is no head, or ``id2label`` is none.
    """
    head = found.state.get(f"{HEAD}out_proj.weight")
    if head is None:
        raise CheckpointError("it has no classifier, only an encoder: train with the folder as the model")
    names = found.config.get("id2label")
    if names is None:
        return [f"LABEL_{i}" for i in range(len(head))]
    labels = [names[key] for key in sorted(names, key=int)]
    if not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"its id2label has {str(labels)[:200]}, expected names")
    return labels


def describe(found: HuggingFace, folder: Path, labels: list[str]) -> dict[str, Any]:
    """A resolved description (see :mod:`lightning_glue.data.own`) of no files.

    An example is one text, or two where ``config.json`` says ``"lightning_glue": {"texts": 2}`` or a label is about
    entailment.

    Raises:
        CheckpointError: its outputs are no task that can be predicted.
    """
    asked = found.config.get("problem_type") or ("regression" if len(labels) == 1 else "single_label_classification")
    kind = _KINDS.get(str(asked))
    if kind is None or (kind == "regression" and len(labels) > 1):
        raise CheckpointError(
            f"its problem_type is {str(asked)[:40]!r} of {len(labels)} outputs, which is no task here"
        )
    if kind != "regression":
        fault = next(filter(None, map(name_fault, labels)), "")
        if fault or len(set(labels)) < len(labels):
            raise CheckpointError(f"its id2label has {fault or 'a label twice'}; expected a name for each output")
    own = found.config.get("lightning_glue")
    texts = own.get("texts") if isinstance(own, dict) else None
    texts = texts if texts in (1, 2) else 1 + any("entail" in label.casefold() for label in labels)
    return {
        "name": re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.absolute().name).strip("-._")[:64] or "classifier",
        "kind": kind,
        "labels": [] if kind == "regression" else labels,
        "metrics": usual_metrics(kind, len(labels)),
        "files": {},
        "text": ["text", "text_pair"][:texts],
        "label": "label",
        "index": None,
        "header": True,
        "separator": ",",
        "quoting": "none",
        "label_separator": "|",
        "dev_share": None,
        "dev_seed": 1,
        "class_weights": None,
        "range": None,
        "bounded": False,
    }


def refuse_pairs_of_bert(found: HuggingFace, task: Task) -> None:
    """Raise CheckpointError for a BERT that was fine-tuned on pairs: it marks the second text by segments."""
    if found.config["model_type"] == "bert" and task.num_texts == 2:
        raise CheckpointError(
            "it is a BERT fine-tuned on pairs, whose second text has segment 1, which fairseq's RoBERTa has not: its "
            "answers would be others; train with the folder as the model"
        )
