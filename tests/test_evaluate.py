"""Evaluation in real DDP processes: the value of one process, to the last digit."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
from conftest import run

from lightning_glue import config, preprocess, pretrained, sources
from lightning_glue.export import export
from lightning_glue.model import build_model
from lightning_glue.tasks import TASKS


def export_random(name: str, bpe_dir: Path, cache: Path, out: Path) -> Path:
    """A random model of the task as a run would have exported it."""
    task = TASKS[name]
    architecture = config.compose(model="tiny").model.architecture
    start = pretrained.load_pretrained("random", "gpt2", str(bpe_dir), architecture)
    prepared = preprocess.prepare(task, sources.glue_directory(task, "sample", None), start.tokenizer, cache)
    pl.seed_everything(0, verbose=False)
    symbols = [] if task.is_regression else preprocess.read_label_symbols(prepared.directory)
    return export(build_model(start, task.num_outputs, {}), task, start.tokenizer, symbols, 0, out)


@pytest.mark.parametrize(
    ("name", "several"),
    [
        ("STS-B", (2, 3, 4)),  # continuous
        ("MRPC", (2, 3)),  # accuracy and F1
        ("WNLI", (4,)),  # fewer batches than processes
    ],
)
def test_metrics_are_those_of_one_process(
    name: str, several: tuple[int, ...], cache: Path, bpe_dir: Path, tmp_path: Path
) -> None:
    folder = export_random(name, bpe_dir, cache, tmp_path / "model")
    arguments = ["lightning_glue.evaluate", str(folder), "--data", "sample", "--gpus", "0"]
    budget = "data.eval_tokens=1000" if name != "WNLI" else "data.eval_tokens=8192"
    printed = {procs: run(*arguments, "--procs", str(procs), budget, cwd=tmp_path).stdout for procs in (1, *several)}
    names = [line.split()[0] for line in printed[1].splitlines()]
    assert names == sorted(f"dev/{metric}" for metric in (*TASKS[name].metrics, "loss"))
    assert {procs: printed[1] for procs in printed} == printed  # every digit: values are printed with repr


def test_only_a_task_with_the_same_labels_is_scored(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    folder = export_random("WNLI", bpe_dir, cache, tmp_path / "model")
    result = run("lightning_glue.evaluate", str(folder), "--task", "RTE", cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: the model was trained on WNLI and cannot be evaluated on RTE: other labels\n"


def test_an_unknown_run_is_one_line(cache: Path, tmp_path: Path) -> None:
    result = run("lightning_glue.evaluate", "0" * 32, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: run {'0' * 32}: no fairseq directory to be had")
    assert result.stderr.count("\n") == 1


def test_predictions_go_where_they_can_and_their_lack_is_said(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    folder = export_random("WNLI", bpe_dir, cache, tmp_path / "model")
    (tmp_path / "file").touch()
    command = ["lightning_glue.evaluate", str(folder), "--gpus", "0"]
    result = run(*command, "--data", "sample", "--predict", "file", cwd=tmp_path, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --predict file cannot be made: File exists; choose another folder\n"

    official = sources.glue_directory(TASKS["WNLI"], "sample", None) / "WNLI"
    (tmp_path / "glue" / "WNLI").mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "glue" / "WNLI" / name).write_bytes((official / name).read_bytes())
    result = run(*command, "--predict", "out", cwd=tmp_path, check=False, GLUE_DIR=str(tmp_path / "glue"))
    assert result.returncode == 2
    assert "error: WNLI: nothing to predict, no test.tsv beside the dev files" in result.stderr
