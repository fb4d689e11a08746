"""Leaderboard files: the index is the test file's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_glue import config
from lightning_glue.data import binarize
from lightning_glue.data.binarize import Prepared
from lightning_glue.errors import UserError
from lightning_glue.inference import submission
from lightning_glue.model import pretrained
from lightning_glue.model.roberta import build_model
from lightning_glue.tasks import TASKS


def prepare(name: str, indices: list[str], bpe_dir: Path, folder: Path) -> Prepared:
    """A task of one labelled row a split, whose test files have these indices."""
    task = TASKS[name]
    for split in task.splits:
        rows = [["-"] * len(split.columns) for _ in (["0"] if split.labelled else indices)]
        for number, row in enumerate(rows):
            for column in split.text_columns:
                row[column] = f"text {number}"
            row[split.label_column or 0] = task.labels[0] if split.labelled else indices[number]
        path = folder / "glue" / task.directory / split.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join("\t".join(row) + "\n" for row in [split.columns, *rows]), encoding="utf-8")
    tokenizer = pretrained.load_tokenizer("gpt2", str(bpe_dir))
    return binarize.prepare(task, folder / "glue", tokenizer, folder / "cache")


def submit(name: str, prepared: Prepared, bpe_dir: Path, out: Path, **weights: float) -> list[str]:
    """Write the files of a random model and return the index column of the last."""
    task = TASKS[name]
    start = pretrained.load_pretrained("random", "gpt2", str(bpe_dir), config.compose(model="tiny").model.architecture)
    model = build_model(start, task.num_outputs, {})
    if "bias" in weights:
        torch.nn.init.constant_(
            model.classification_heads["sentence_classification_head"].out_proj.bias, weights["bias"]
        )
    written = submission.write_submissions(model, task, prepared, out, eval_tokens=2048, max_tokens=512)
    return [line.split("\t")[0] for line in written[-1].read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["RTE", "MNLI", "AX", "QQP"])
@pytest.mark.parametrize("indices", [["507", "12", "0088"], ["ax-3", "ax-1", "\u00e9\u2028x"], ["0", "1", "2"]])
def test_the_index_is_copied(name: str, indices: list[str], bpe_dir: Path, tmp_path: Path) -> None:
    prepared = prepare(name, indices, bpe_dir, tmp_path)
    (tmp_path / "glue").rename(tmp_path / "elsewhere")  # the cache holds all that a prediction needs
    task = TASKS[name]
    lines = submission.submission_lines(task, torch.eye(3, task.num_outputs), prepared.index(task.test[-1].name))
    assert lines == ["index\tprediction\n", *(f"{i}\t{label}\n" for i, label in zip(indices, _labels(name)))]


def _labels(name: str) -> list[str]:
    labels = TASKS[name].labels
    return [*labels, labels[0]][:3]


def test_files_are_written_with_it(bpe_dir: Path, tmp_path: Path) -> None:
    prepared = prepare("MNLI", ["507", "12", "88"], bpe_dir, tmp_path)
    assert submit("MNLI", prepared, bpe_dir, tmp_path) == ["index", "507", "12", "88"]


@pytest.mark.parametrize(
    ("indices", "fault"),
    [
        (["3", "4", "3"], r"test\.tsv:4: index '3' stands in line 2 already; predictions go by index: give every row"),
        (["3", " ", "5"], r"test\.tsv:3: no index; predictions go by index"),
    ],
)
def test_rows_that_cannot_be_told_apart_are_refused(
    indices: list[str], fault: str, bpe_dir: Path, tmp_path: Path
) -> None:
    prepared = prepare("RTE", indices, bpe_dir, tmp_path)
    with pytest.raises(UserError, match=fault):
        submit("RTE", prepared, bpe_dir, tmp_path / "out")


def test_a_model_of_nan_predicts_nothing(bpe_dir: Path, tmp_path: Path) -> None:
    prepared = prepare("RTE", ["0", "1"], bpe_dir, tmp_path)
    with pytest.raises(UserError, match=r"RTE: the model's outputs are NaN for 2 of 2 rows: it has diverged"):
        submit("RTE", prepared, bpe_dir, tmp_path, bias=float("nan"))
    assert not (tmp_path / "RTE.tsv").exists()
