"""Evaluation in real DDP processes: the value of one process, and of the training, to the last digit."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import pytorch_lightning as pl
import torch
from helpers.project import ROOT, run, torture
from helpers.zygote import FORKED

from lightning_glue import config
from lightning_glue.data import binarize, sources
from lightning_glue.data.labels import read_label_symbols
from lightning_glue.errors import UserError
from lightning_glue.export.fairseq import export
from lightning_glue.inference import predict
from lightning_glue.inference.finetuned import FineTuned, load_fine_tuned
from lightning_glue.model import pretrained
from lightning_glue.model.roberta import build_model, task_loss
from lightning_glue.tasks import TASKS
from lightning_glue.tracking import artifacts
from lightning_glue.training import evaluation
from lightning_glue.training.build import build
from lightning_glue.training.run import settings


def export_random(name: str, bpe_dir: Path, cache: Path, out: Path) -> Path:
    """A random model of the task as a run would have exported it."""
    task = TASKS[name]
    architecture = config.compose(model="tiny").model.architecture
    start = pretrained.load_pretrained("random", "gpt2", str(bpe_dir), architecture)
    prepared = binarize.prepare(task, sources.glue_directory(task, "sample", None), start.tokenizer, cache)
    pl.seed_everything(0, verbose=False)
    symbols = [] if task.is_regression else read_label_symbols(prepared.directory)
    return export(build_model(start, task.num_outputs, {}), task, start.tokenizer, symbols, 0, out)


@pytest.mark.torture
@pytest.mark.parametrize(
    ("name", "several"),
    [
        torture("STS-B", (2, 3, 4)),  # continuous
        torture("MRPC", (2, 3)),  # accuracy and F1
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


def write_rte(root: Path, rows: int = 12) -> Path:
    """RTE with a text of 1500 words in each file, a row that lacks a field in dev, and dev's texts to predict."""
    folder = root / "RTE"
    folder.mkdir(parents=True)
    texts = [f"The {['old', 'red', 'tiny', 'loud'][i % 4]} boat {i} waits." for i in range(rows)]
    texts[0] = "word " * 1500 + "end"
    pairs = [f"{i}\t{text}\tA boat {i % 3} waits in the hall." for i, text in enumerate(texts)]
    labels = [("entailment", "not_entailment")[i % 2] for i in range(rows)]
    labelled = ["index\tsentence1\tsentence2\tlabel", *map("\t".join, zip(pairs, labels))]
    (folder / "train.tsv").write_text("\n".join(labelled) + "\n")
    (folder / "dev.tsv").write_text("\n".join([*labelled, "99\tone field too few\tentailment"]) + "\n")
    (folder / "test.tsv").write_text("\n".join(["index\tsentence1\tsentence2", *pairs]) + "\n")
    return root


def printed_command(output: str) -> list[str]:
    """What a training says to score its run again."""
    line = re.search(r"^  (\S+) -m (lightning_glue\.evaluate .*)\n      score it again", output, re.MULTILINE)
    assert line, output
    return shlex.split(line[2])


def scores(output: str) -> dict[str, float]:
    return {name: float(value) for name, value in map(str.split, output.splitlines())}


@pytest.mark.parametrize("case", [torture("own files, two processes, float32"), torture("sample, bf16")])
def test_the_printed_command_gives_the_trainings_scores(case: str, cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    command = ["lightning_glue.train", "--task", "RTE", "--model", "tiny", "--gpus", "0", "trainer.max_epochs=1"]
    own = [
        f"data.glue_dir={write_rte(tmp_path / 'files')}",
        "data.max_tokens=16",
        "data.on_bad_row=skip",
        "--procs",
        "2",
    ]
    own += ["trainer.precision=32-true", "data.eval_tokens=100", "tracking.uri=sqlite:///other.db", "optimizer.lr=1e-3"]
    if case.startswith("sample"):
        own = ["--data", "sample", "trainer.precision=bf16-mixed", "trainer.max_steps=3"]
    environment = {"ROBERTA_BPE_DIR": str(bpe_dir), "GLUE_DIR": str(tmp_path / "elsewhere")}
    result = run(*command, *own, cwd=tmp_path, timeout=300, **environment)
    again = run(*printed_command(result.stdout), cwd=tmp_path, timeout=300, **environment)
    name, place = ("mlflow.db", "glue-rte-sample") if case.startswith("sample") else ("other.db", "glue-rte")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / name}")
    (trained,) = client.search_runs([client.get_experiment_by_name(place).experiment_id])
    expected = {key.removeprefix("best/"): v for key, v in trained.data.metrics.items() if key.startswith("best/dev")}
    assert scores(again.stdout) == expected
    assert "note:" not in again.stderr and "GPU available" not in again.stderr
    if case.startswith("sample"):
        return
    whole = run(*printed_command(result.stdout), "data.max_tokens=512", cwd=tmp_path, timeout=300, **environment)
    assert scores(whole.stdout)["dev/loss"] != expected["dev/loss"]  # what is given wins
    (checkpoint,) = (tmp_path / "mlruns").rglob("checkpoint_best.pt")
    with open(checkpoint, "r+b") as file:
        file.seek(checkpoint.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    damaged = run(*printed_command(result.stdout), cwd=tmp_path, check=False, **environment)
    assert damaged.returncode == 2
    assert damaged.stderr.endswith("is damaged: its SHA-256 is not the one that the run noted\n")


def test_only_ax_is_scored_with_another_tasks_model() -> None:
    assert evaluation.evaluated_task("AX", TASKS["MNLI"]) is TASKS["AX"]
    assert evaluation.evaluated_task(None, TASKS["CoLA"]) is evaluation.evaluated_task("CoLA", TASKS["CoLA"])
    for own, other in (("SST-2", "CoLA"), ("MRPC", "QQP"), ("QNLI", "RTE"), ("WNLI", "RTE"), ("RTE", "AX")):
        with pytest.raises(UserError, match=f"was trained on {own} and cannot be evaluated on {other}"):
            evaluation.evaluated_task(other, TASKS[own])


def composed(task: str, *overrides: str) -> config.Config:
    return config.compose(["trainer.gpus=0", *overrides], task=task, model="tiny")


@pytest.fixture
def exported(cache: Path, bpe_dir: Path, tmp_path: Path) -> FineTuned:
    """A model of 1024 positions as a run exports it that cut to 700 tokens."""
    files = write_rte(tmp_path / "files")
    chosen = composed(
        "RTE",
        f"data.glue_dir={files}",
        f"data.bpe_dir={bpe_dir}",
        "data.on_bad_row=skip",
        "data.max_tokens=700",
        "+model.architecture.max_positions=1024",
        "trainer.precision=bf16-mixed",
    )
    module, data, start = build(chosen)
    symbols = read_label_symbols(data.prepared.directory)
    export(module.model, module.task, start.tokenizer, symbols, 0, tmp_path / "model", settings(chosen, data))
    return load_fine_tuned(tmp_path / "model")


def test_predictions_are_those_of_the_evaluation(exported: FineTuned, tmp_path: Path) -> None:
    task = exported.task
    chosen, note = evaluation.with_own_settings(composed("RTE"), task, exported.settings, set())
    data = evaluation.make_data(chosen, task, exported)
    assert (note, chosen.trainer.precision, data.max_tokens) == ("", "bf16-mixed", 700)
    values = evaluation.evaluate(chosen, exported, data)
    dev = data.splits["dev"]
    assert (len(dev), dev.lengths.max()) == (12, 700)
    outputs = predict.predict(exported.model, dev, data.eval_tokens, chosen.trainer.precision)
    targets = torch.tensor(dev.targets)
    loss = task_loss(outputs.double(), targets).double().mean()
    assert float(loss.float()) == values["dev/loss"]  # to the last digit
    assert not torch.equal(outputs, predict.predict(exported.model, dev, data.eval_tokens, "32-true"))
    evaluation.predict(chosen, exported, data, tmp_path)
    written = (tmp_path / "RTE.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[1] for line in written] == [task.labels[i] for i in outputs.argmax(-1)]


def test_no_other_file_is_needed_than_those_scored_or_predicted(
    exported: FineTuned, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those of the training, nor, to predict, those of the evaluation; the results are the same without."""
    task, folder = exported.task, tmp_path / "files" / "RTE"
    chosen, _ = evaluation.with_own_settings(composed("RTE"), task, exported.settings, set())
    whole = evaluation.make_data(chosen, task, exported)
    values = evaluation.evaluate(chosen, exported, whole)
    assert set(whole.splits) == {"dev", "test"}
    out = [tmp_path / name for name in ("whole", "both", "test")]
    for place in out:
        place.mkdir()
    (expected,) = evaluation.predict(chosen, exported, whole, out[0])

    monkeypatch.setenv("LIGHTNING_GLUE_CACHE", str(tmp_path / "cache"))  # nothing is there yet
    (folder / "train.tsv").write_text("no header\n")
    (folder / "test.tsv").rename(tmp_path / "test.tsv")
    alone = evaluation.make_data(chosen, task, exported, predicts=False)
    assert evaluation.evaluate(chosen, exported, alone) == values
    with pytest.raises(UserError, match=f"nothing to predict, no test.tsv in {folder}"):
        evaluation.make_data(chosen, task, exported).setup("predict")

    (folder / "train.tsv").unlink()
    (folder / "dev.tsv").unlink()
    with pytest.raises(UserError, match="dev.tsv"):
        evaluation.make_data(chosen, task, exported, predicts=False).setup("validate")
    (tmp_path / "test.tsv").rename(folder / "test.tsv")
    for scores, place in zip((True, False), out[1:]):
        alone = evaluation.make_data(chosen, task, exported, scores=scores)
        (written,) = evaluation.predict(chosen, exported, alone, place)
        assert written.read_text() == expected.read_text()
        assert set(alone.splits) == {"test"}


def test_files_that_are_not_the_runs_are_said(exported: FineTuned, tmp_path: Path) -> None:
    settings, _ = evaluation.with_own_settings(composed("RTE"), exported.task, exported.settings, set())
    data = evaluation.make_data(settings, exported.task, exported)
    dev = tmp_path / "files" / "RTE" / "dev.tsv"
    data.setup("validate")
    assert evaluation.other_files(data, exported.settings) == []
    assert evaluation.other_files(data, {}) == []  # an export of an earlier version says nothing
    dev.write_text(dev.read_text().replace("not_entailment", "entailment"))
    data = evaluation.make_data(settings, exported.task, exported)
    data.setup("validate")
    assert evaluation.other_files(data, exported.settings) == [str(dev)]


def test_where_files_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, (own, here, gone) = TASKS["RTE"], (str(tmp_path / name) for name in ("own", "here", "gone"))
    for folder in (own, here):
        (Path(folder) / "RTE").mkdir(parents=True)

    def folder(settings: dict[str, str], environment: str | None, *overrides: str) -> tuple[str | None, str]:
        monkeypatch.delenv("GLUE_DIR", raising=False)
        if environment:
            monkeypatch.setenv("GLUE_DIR", environment)
        given = {override.partition("=")[0] for override in overrides}
        chosen, note = evaluation.with_own_settings(composed("RTE", *overrides), task, settings, given)
        return chosen.data.glue_dir, note

    assert folder({}, here) == (here, "")
    assert folder({"data.glue_dir": own}, here) == (own, "")  # the run's command line named it
    assert folder({"GLUE_DIR": own}, here) == (here, "")  # the environment did, and now says otherwise
    assert folder({"GLUE_DIR": own}, None) == (own, "")
    assert folder({"data.glue_dir": own}, None, f"data.glue_dir={here}") == (here, "")
    said = f"the run read RTE in {gone}, which is not there; now from "
    assert folder({"data.glue_dir": gone}, here) == (here, said + here)
    assert folder({"GLUE_DIR": gone}, None) == (None, said + "the cache or a download")
    assert folder({"GLUE_DIR": gone, "data.source": "sample"}, None) == (None, "")


def test_settings_that_are_none_are_named(exported: FineTuned, tmp_path: Path) -> None:
    file = tmp_path / "model" / "checkpoint_best.pt"
    state = torch.load(file, weights_only=True)
    for key, value in (("data.max_tokens", "many"), ("trainer.precision", "${oc.env:HOME}"), ("data.source", None)):
        torch.save(state | {"glue_settings": {key: value}}, file)
        with pytest.raises(UserError, match=f"checkpoint_best.pt: its 'glue_settings' has {key}="):
            load_fine_tuned(file.parent)
    with pytest.raises(UserError, match=r"data\.on_bad_row=guess"):
        evaluation.with_own_settings(composed("RTE"), exported.task, {"data.on_bad_row": "guess"}, set())
    torch.save({key: value for key, value in state.items() if key != "glue_settings"}, file)  # an earlier version's
    older = load_fine_tuned(file.parent)
    assert older.settings == {}
    chosen = composed("RTE")
    same, note = evaluation.with_own_settings(chosen, older.task, {}, set())
    assert (config.flatten(same), note) == (config.flatten(chosen), "")
    assert evaluation.make_data(chosen, older.task, older).max_tokens == 512


def test_an_unknown_run_is_one_line(cache: Path, tmp_path: Path) -> None:
    result = run("lightning_glue.evaluate", "0" * 32, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: run {'0' * 32}: no fairseq directory to be had")
    assert result.stderr.count("\n") == 1


def test_a_run_without_a_model_says_why(
    new_store: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_store(tmp_path)
    monkeypatch.chdir(tmp_path)
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    for status, params, said in (
        ("RUNNING", {}, "is not finished: .* wait for it, or if it died, .* --resume {} goes on with it"),
        ("KILLED", {}, "is not finished, it is KILLED: .* --resume {} goes on with it"),
        ("FAILED", {}, "is not finished, it is FAILED: .* --resume {} goes on with it"),
        ("FINISHED", {"tracking.checkpoints": "False"}, "was trained with tracking.checkpoints=false"),
        ("FINISHED", {}, "no fairseq directory to be had"),
    ):
        run_id = client.create_run("0").info.run_id
        for key, value in params.items():
            client.log_param(run_id, key, value)
        if status != "RUNNING":
            client.set_terminated(run_id, status)
        with pytest.raises(UserError, match=f"run {run_id}:? {said.format(run_id)}"):
            artifacts.locate(run_id, None)


DOWNLOAD = """
import sys
from lightning_glue.errors import UserError
from lightning_glue.inference.finetuned import load_fine_tuned
from lightning_glue.tracking.artifacts import locate
try:
    print(load_fine_tuned(locate(sys.argv[1], sys.argv[2])).path)
except UserError as error:
    print(error)
if "fail" in sys.argv:
    raise RuntimeError
"""


@pytest.mark.torture
def test_a_download_is_gone_at_the_exit(
    cache: Path, bpe_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a server that keeps the artifacts; also after an exception, and of a file that is damaged there."""
    from helpers.servers import MlflowServer

    folder = export_random("WNLI", bpe_dir, cache, tmp_path / "fairseq")
    server = MlflowServer(tmp_path)
    server.start()
    try:
        client = mlflow.MlflowClient(server.uri)
        run_id = client.create_run("0").info.run_id
        client.log_artifacts(run_id, str(folder), "fairseq")
        temporary = tmp_path / "temporary"
        temporary.mkdir()

        def load(*more: str) -> str:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
            command = [sys.executable, "-c", FORKED + DOWNLOAD, run_id, server.uri, *more]
            result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert result.returncode == ("fail" in more), result.stderr
            assert list(temporary.iterdir()) == []
            return result.stdout

        assert load().startswith(f"{temporary}/lightning-glue-")
        assert load("fail").startswith(f"{temporary}/lightning-glue-")
        client.set_tag(run_id, "lineage.export_sha256", "0" * 64)
        assert load().endswith("is damaged: its SHA-256 is not the one that the run noted\n")
    finally:
        server.kill()


def test_names_that_a_store_lists_stay_in_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that lists names of other places, and sends what it is asked for."""
    from helpers.servers import HostileServer

    from lightning_glue.tracking.artifacts import locate

    temporary = tmp_path / "temporary" / "deep"
    temporary.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    outside = tmp_path / "outside"
    server = HostileServer(["../../evil", "/" + str(outside), "..%2f..%2fevil", "checkpoint_best.pt/../../../evil"])
    try:
        with pytest.raises(UserError, match="no fairseq directory to be had"):
            locate("0" * 32, server.uri)
        server.names = ["checkpoint_best.pt", "vocab.json", ".bashrc", "label", "checkpoints"]
        found = locate("0" * 32, server.uri)
        inside = {str(path.relative_to(found.parent)) for path in found.parent.rglob("*")}
        assert inside == {"checkpoint_best.pt", "vocab.json"}  # nothing that was not asked for
        assert found.read_bytes() == b"sent"
    finally:
        server.close()
    kept = {path for path in tmp_path.rglob("*") if path.is_file() and "mlflow" not in path.name}
    assert all(path.is_relative_to(temporary) for path in kept)
    for folder in temporary.iterdir():
        shutil.rmtree(folder)


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
    assert f"error: WNLI: nothing to predict, no test.tsv in {tmp_path / 'glue' / 'WNLI'}" in result.stderr
