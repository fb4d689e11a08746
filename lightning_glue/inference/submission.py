"""Predictions for unlabelled splits, written as the GLUE leaderboard wants them: ``index<TAB>prediction``."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_glue.data.binarize import Prepared
from lightning_glue.data.datamodule import load_split
from lightning_glue.errors import DataError
from lightning_glue.inference.predict import on_scale, predict, present_labels
from lightning_glue.model.roberta import RobertaModel
from lightning_glue.tasks import Task
from lightning_glue.utils.files import new_file


def submission_lines(task: Task, outputs: torch.Tensor, index: list[str]) -> list[str]:
    """A leaderboard file's lines: label names, or scores clipped to the task's scale with three decimals.

    Of data of one's own scores have seven digits, and any number of labels are divided as they are in the files.

    Raises:
        UserError: an output is NaN, so that it predicts nothing.
    """
    if lost := int(outputs.isnan().any(-1).sum()):
        raise DataError(f"{task.name}: the model's outputs are NaN for {lost} of {len(outputs)} rows: it has diverged")
    if task.is_regression:
        digits = ".7g" if task.own else ".3f"
        predictions = [f"{score:{digits}}" for score in on_scale(task, outputs.squeeze(-1).double()).tolist()]
    elif task.multilabel:
        assert task.own
        predictions = [task.own.label_separator.join(names) for names in present_labels(task, outputs)]
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
                raise DataError(f"{file}:{line}: {fault}; predictions go by index: give every row one of its own")
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
