"""Predictions for unlabelled splits, written as the GLUE leaderboard wants them: ``index<TAB>prediction``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from lightning_glue.atomic import new_file
from lightning_glue.batching import EvalSampler
from lightning_glue.console import progress_bar
from lightning_glue.data import TokenizedSplit, load_split
from lightning_glue.errors import UserError
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


def submission_lines(task: Task, outputs: torch.Tensor, index: list[str]) -> list[str]:
    """A leaderboard file's lines: label names, or scores clipped to the task's scale with three decimals.

    Raises:
        UserError: an output is NaN, so that it predicts nothing.
    """
    if lost := int(outputs.isnan().any(-1).sum()):
        raise UserError(f"{task.name}: the model's outputs are NaN for {lost} of {len(outputs)} rows: it has diverged")
    if task.is_regression:
        scores = (outputs.squeeze(-1).double() * task.label_scale).clamp(0, task.label_scale)
        predictions = [f"{score:.3f}" for score in scores.tolist()]
    else:
        predictions = [task.labels[label] for label in outputs.argmax(-1).tolist()]
    return ["index\tprediction\n", *(f"{i}\t{label}\n" for i, label in zip(index, predictions, strict=True))]


def read_indices(task: Task, prepared: Prepared) -> dict[str, list[str]]:
    """The index column of every unlabelled split that is there, by name.

    Raises:
        UserError: a row has none, or that of another row.
    """
    indices = {split.name: prepared.index(split.name) for split in task.test if split.name in prepared.splits}
    for name, index in indices.items():
        lines: dict[str, int] = {}
        for line, entry in enumerate(index, 2):  # behind the header; such a file has no blank or malformed lines
            fault = "" if entry else "no index"
            if entry in lines:
                fault = f"index {entry[:80]!r} stands in line {lines[entry]} already"
            if fault:
                file = prepared.splits[name].file
                raise UserError(f"{file}:{line}: {fault}; predictions go by index: give every row one of its own")
            lines[entry] = line
    return indices


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
    indices = read_indices(task, prepared)
    for split, name in zip(task.test, task.submission_files):
        if split.name not in indices:
            continue
        outputs = predict(model, load_split(task, split, prepared.directory, max_tokens), eval_tokens, precision)
        with new_file(out / name) as file:
            file.writelines(submission_lines(task, outputs, indices[split.name]))
        written.append(out / name)
    return written
