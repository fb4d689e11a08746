"""What a fine-tuned model says of every row of a split."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from lightning_glue.data.batching import EvalSampler, Packed, moved, padded_size, split_rows
from lightning_glue.data.datamodule import TokenizedSplit
from lightning_glue.model.frozen import Frozen, supports
from lightning_glue.model.roberta import HEAD, RobertaModel, logits
from lightning_glue.tasks import Task
from lightning_glue.utils.console import progress_bar

_CACHED_TOKENS = 2048  # padding included; four times as many took 1.4 times as long


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """What Lightning computes within at ``trainer.precision``; its 16-mixed is bf16-mixed on a CPU."""
    if not precision.endswith("-mixed"):
        return nullcontext()
    return torch.autocast(device.type, dtype=product_type(precision, device), cache_enabled=False)


def product_type(precision: str, device: torch.device) -> torch.dtype:
    """In which matrices are multiplied at ``trainer.precision``."""
    if not precision.endswith("-mixed"):
        return torch.float64 if precision == "64-true" else torch.float32
    return torch.float16 if precision == "16-mixed" and device.type == "cuda" else torch.bfloat16


def scoring(model: RobertaModel, precision: str) -> Callable[[Packed], torch.Tensor]:
    """Head outputs (examples, classes) of a model that is not trained as long as they are asked for.

    To be called within :func:`autocast` of the same ``precision``, with rows sorted by length. On a CPU these are
    :class:`~lightning_glue.model.frozen.Frozen`'s, where that knows the model.
    """
    device = next(model.parameters()).device
    dtype = product_type(precision, device)
    if supports(model, dtype):
        return Frozen(model, model.classification_heads[HEAD], dtype)
    return partial(_in_parts if device.type == "cpu" else logits, model)


def _in_parts(model: RobertaModel, batch: Packed) -> torch.Tensor:
    """:func:`~lightning_glue.model.roberta.logits` of as many rows at once as a CPU's caches hold."""
    parts = split_rows(batch, -(-padded_size(batch) // _CACHED_TOKENS))
    return torch.cat([logits(model, part) for part in parts])


def on_scale(task: Task, outputs: torch.Tensor) -> torch.Tensor:
    """Scores on the task's own scale, within its range where that is a rule, of a regression's outputs (examples,)."""
    scores = outputs * task.label_scale + task.label_offset
    return scores.clamp(task.label_offset, task.label_offset + task.label_scale) if task.bounded else scores


def present_labels(task: Task, outputs: torch.Tensor) -> list[tuple[str, ...]]:
    """The labels whose probability is above 0.5, of outputs (examples, labels)."""
    return [tuple(name for name, output in zip(task.labels, row) if output > 0) for row in outputs.tolist()]


@torch.inference_mode()
def predict(model: RobertaModel, split: TokenizedSplit, eval_tokens: int, precision: str = "32-true") -> torch.Tensor:
    """Head outputs (examples, classes) in the order of the rows, on the CPU; the model is put in eval mode.

    Args:
        precision: Lightning's name of it, as in :func:`lightning_glue.training.devices.resolve_precision`.
    """
    model.eval()
    if precision == "64-true":
        model.double()
    device = next(model.parameters()).device
    outputs_of = scoring(model, precision)
    found, order = [], []
    with progress_bar(f"predict {split.name}", len(split), "examples") as advance, autocast(precision, device):
        for batch in EvalSampler(split.lengths, eval_tokens):
            part = split[batch]
            found.append(outputs_of(moved(part, device)).float())
            order.append(part["rows"])
            advance(len(part["rows"]))
    outputs = torch.empty(len(split), model.classification_heads[HEAD].out_proj.out_features)
    outputs[torch.cat(order)] = torch.cat(found).cpu()
    return outputs
