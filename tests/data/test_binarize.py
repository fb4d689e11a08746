"""Our binary layout against fairseq's own script, and fairseq training from it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.project import run, torture

from lightning_glue.data import binarize, reader, sources
from lightning_glue.errors import UserError
from lightning_glue.model import pretrained
from lightning_glue.tasks import TASKS

FAIRSEQ = Path(find_spec("fairseq").submodule_search_locations[0])
BIN = Path(sys.executable).parent


def run_fairseq_script(folder: Path, glue: Path, bpe: Path, task: str) -> Path:
    """Run preprocess_GLUE_tasks.sh itself: only its 60 workers become 2, and ``wget`` finds the files in place."""
    shutil.copytree(glue / task, folder / "glue" / task)
    for name in ("encoder.json", "vocab.bpe", "dict.txt"):
        shutil.copy(bpe / name, folder / name)
    (folder / "examples").symlink_to(FAIRSEQ / "examples")
    script = (FAIRSEQ / "examples/roberta/preprocess_GLUE_tasks.sh").read_text()
    assert script.count("--workers 60") == 3
    (folder / "script.sh").write_text(script.replace("--workers 60", "--workers 2"))
    (folder / "shims").mkdir()
    (folder / "shims" / "wget").write_text("#!/bin/sh\n")
    (folder / "shims" / "wget").chmod(0o755)
    path = f"{folder / 'shims'}:{BIN}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", "script.sh", "glue", task],
        cwd=folder,
        env={**os.environ, "PATH": path},
        check=True,
        capture_output=True,
        timeout=300,
    )
    return folder / f"{task}-bin"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "preprocess.log"
    }


@pytest.mark.parametrize("task", [torture("RTE"), torture("STS-B")])
def test_bytes_equal_those_of_fairseqs_script(task: str, glue_dir: Path, bpe_dir: Path, tmp_path: Path) -> None:
    theirs = contents(run_fairseq_script(tmp_path, glue_dir, bpe_dir, task))
    arguments = ["--task", task, "--out", "ours", "--glue-dir", str(glue_dir), "--bpe-dir", str(bpe_dir)]
    run("lightning_glue.preprocess", *arguments, cwd=tmp_path)
    ours = contents(tmp_path / "ours")
    assert sorted(ours) == sorted(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert "input1/valid.bin" in ours


@pytest.mark.parametrize("task", [torture("MNLI"), torture("QQP"), torture("CoLA")])
def test_special_layouts_equal_those_of_fairseqs_script(task: str, bpe_dir: Path, tmp_path: Path) -> None:
    """Two dev sets, rows fairseq drops, no header: on short files, since the script is slow."""
    glue = sources.glue_directory(TASKS[task], "sample", None)
    short = tmp_path / "short" / task
    short.mkdir(parents=True)
    for path in (glue / task).glob("*.tsv"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:60]
        if task == "QQP" and path.stem != "test":
            lines.insert(5, "1\t2\ttoo few\n")
            lines.insert(9, "a\tb\tc\td\te\t1\ttoo many\n")
        (short / path.name).write_text("".join(lines), encoding="utf-8")
    theirs = contents(run_fairseq_script(tmp_path, short.parent, bpe_dir, task))
    rows = binarize._read_rows(TASKS[task], short.parent, "stop", TASKS[task].splits)
    binarize.binarize(TASKS[task], rows, pretrained.load_tokenizer("gpt2", str(bpe_dir)), tmp_path / "ours")
    assert contents(tmp_path / "ours") == theirs
    assert sum(part.dropped for part in rows.values()) == (4 if task == "QQP" else 0)


@pytest.mark.torture
def test_fairseq_hydra_train_trains_from_it(glue_dir: Path, bpe_dir: Path, tmp_path: Path) -> None:
    arguments = ["--task", "RTE", "--out", "RTE-bin", "--glue-dir", str(glue_dir), "--bpe-dir", str(bpe_dir)]
    run("lightning_glue.preprocess", *arguments, cwd=tmp_path)
    result = subprocess.run(
        [
            str(BIN / "fairseq-hydra-train"),
            *("--config-dir", str(FAIRSEQ / "examples/roberta/config/finetuning"), "--config-name", "rte"),
            f"task.data={tmp_path / 'RTE-bin'}",
            *("checkpoint.restore_file=none.pt", "checkpoint.no_save=true", "common.fp16=false", "common.cpu=true"),
            *("optimization.max_update=3", "dataset.batch_size=4", "dataset.disable_validation=true"),
            *("+model.encoder_layers=1", "+model.encoder_embed_dim=16", "+model.encoder_ffn_embed_dim=16"),
            *("+model.encoder_attention_heads=2", "common.log_interval=1"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    log = "".join(path.read_text() for path in (tmp_path / "outputs").rglob("*.log")) + result.stdout + result.stderr
    assert result.returncode == 0, log
    assert '"num_updates": "3"' in log, log


def test_the_cache_is_keyed_by_content(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    encoder = pretrained.load_tokenizer("gpt2", str(bpe_dir))
    source = sources.glue_directory(TASKS["WNLI"], "sample", None)
    shutil.copytree(source / "WNLI", tmp_path / "WNLI")
    first = binarize.prepare(TASKS["WNLI"], tmp_path, encoder, cache)
    assert binarize.prepare(TASKS["WNLI"], tmp_path, encoder, cache) == first
    assert first.splits["train"].rows == len(reader.read_split(TASKS["WNLI"], TASKS["WNLI"].train, tmp_path))
    with open(tmp_path / "WNLI" / "train.tsv", "a", encoding="utf-8") as file:
        file.write("999\tOne more.\tAnd another.\t1\n")
    second = binarize.prepare(TASKS["WNLI"], tmp_path, encoder, cache)
    assert second.directory != first.directory
    assert second.splits["train"].rows == first.splits["train"].rows + 1


def test_a_malformed_row_stops_or_is_counted(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    encoder = pretrained.load_tokenizer("gpt2", str(bpe_dir))
    source = sources.glue_directory(TASKS["WNLI"], "sample", None)
    shutil.copytree(source / "WNLI", tmp_path / "WNLI")
    with open(tmp_path / "WNLI" / "dev.tsv", "a", encoding="utf-8") as file:
        file.write("999\tOne.\tTwo.\tmaybe\n")
    with pytest.raises(UserError, match=r"WNLI/dev\.tsv:\d+: label 'maybe'"):
        binarize.prepare(TASKS["WNLI"], tmp_path, encoder, cache)
    kept = binarize.prepare(TASKS["WNLI"], tmp_path, encoder, cache, "skip")
    assert kept.splits["dev"].skipped == 1
    with open(tmp_path / "WNLI" / "test.tsv", "a", encoding="utf-8") as file:
        file.write("999\tOne field too few.\n")
    with pytest.raises(UserError, match=r"WNLI/test\.tsv:\d+: found 2 fields"):  # row numbers are submitted
        binarize.prepare(TASKS["WNLI"], tmp_path, encoder, cache, "skip")


@pytest.mark.parametrize("content", ["index\tsentence1\tsentence2\n", "0\tone\n", "\ufeff", "a\tb\tc\n1\t2\t3\n"])
def test_a_test_file_that_does_not_fit_stops_predictions_alone(
    content: str, cache: Path, bpe_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, task = pretrained.load_tokenizer("gpt2", str(bpe_dir)), TASKS["WNLI"]
    shutil.copytree(sources.glue_directory(task, "sample", None) / "WNLI", tmp_path / "WNLI")
    whole = binarize.prepare(task, tmp_path, encoder, cache)
    (tmp_path / "WNLI" / "test.tsv").write_text(content)
    with caplog.at_level(logging.WARNING):
        left = binarize.prepare(task, tmp_path, encoder, cache, predicts=False)
    assert f"left out: {tmp_path}/WNLI/test.tsv" in caplog.text
    assert {name: info.sha256 for name, info in left.splits.items()} == {
        name: whole.splits[name].sha256 for name in ("train", "dev")
    }
    with pytest.raises(UserError, match=r"WNLI/test\.tsv"):
        binarize.prepare(task, tmp_path, encoder, cache)
    (tmp_path / "WNLI" / "dev.tsv").write_text(content)
    with pytest.raises(UserError, match=r"WNLI/dev\.tsv"):
        binarize.prepare(task, tmp_path, encoder, cache, predicts=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "rte"], "unknown task 'rte'; did you mean 'RTE'?"),
        (["--task", "RTE", "--glue-dir", "nowhere"], "nowhere is not a folder"),
        (["--task", "ALL", "--out", "x"], "--out names one folder"),
        (["--task", "RTE", "--data", "sample", "--out", "."], ". exists already"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, bpe_dir: Path, tmp_path: Path) -> None:
    result = run("lightning_glue.preprocess", *arguments, "--bpe-dir", str(bpe_dir), cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
