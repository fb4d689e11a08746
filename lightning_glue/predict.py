"""Predictions for unlabelled splits, written as the GLUE leaderboard wants them: ``index<TAB>prediction``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from lightning_glue.atomic import new_file
from lightning_glue.batching import EvalSampler
from lightning_glue.console import progress_bar
from lightning_glue.data import TokenizedSplit, load_split
from lightning_glue.model import HEAD, RobertaModel, logits
from lightning_glue.preprocess import Prepared
from lightning_glue.tasks import Task


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """What Lightning computes within at ``trainer.precision``; its 16-mixed is bf16-mixed on a CPU."""
    if not precision.endswith("-mixed"):
        return nullcontext()
    half = torch.float16 if precision == "16-mixed" and device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, dtype=half, cache_enabled=False)


@torch.inference_mode()
def predict(model: RobertaModel, split: TokenizedSplit, eval_tokens: int, precision: str = "32-true") -> torch.Tensor:
    """Head outputs (examples, classes) in the order of the rows, on the CPU; the model is put in eval mode.

    Args:
        precision: Lightning's name of it, as in :func:`lightning_glue.hardware.resolve_precision`.
    """
    model.eval()
    if precision == "64-true":
        model.double()
    device = next(model.parameters()).device
    outputs = torch.empty(len(split), model.classification_heads[HEAD].out_proj.out_features)
    with progress_bar(f"predict {split.name}", len(split), "examples") as advance, autocast(precision, device):
        for batch in EvalSampler(split.lengths, eval_tokens):
            part = split[batch]
            outputs[part["ids"]] = logits(model, part["tokens"].to(device)).float().cpu()
            advance(len(part["ids"]))
    return outputs


def submission_lines(task: Task, outputs: torch.Tensor) -> list[str]:
    """A leaderboard file's lines: label names, or scores clipped to the task's scale with three decimals."""
    if task.is_regression:
        scores = (outputs.squeeze(-1).double() * task.label_scale).clamp(0, task.label_scale)
        predictions = [f"{score:.3f}" for score in scores.tolist()]
    else:
        predictions = [task.labels[label] for label in outputs.argmax(-1).tolist()]
    return ["index\tprediction\n", *(f"{i}\t{prediction}\n" for i, prediction in enumerate(predictions))]


def write_submissions(
    model: RobertaModel,
    task: Task,
    prepared: Prepared,
    out: Path,
    *,
    eval_tokens: int,
    max_tokens: int,
    precision: str = "32-true",
) -> list[Path]:
    """Predict every unlabelled split that is there and write its leaderboard file into ``out``."""
    written = []
    for split, name in zip(task.test, task.submission_files):
        if split.name not in prepared.splits:
            continue
        outputs = predict(model, load_split(task, split, prepared.directory, max_tokens), eval_tokens, precision)
        with new_file(out / name) as file:
            file.writelines(submission_lines(task, outputs))
        written.append(out / name)
    return written
