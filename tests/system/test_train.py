"""The whole program in real processes: one training per case on generated data, looked at through MLflow."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import torch
from helpers.project import ROOT, run, torture
from helpers.zygote import FORKED
from mlflow.entities import Run

from lightning_glue.tracking.journal import Journal, final_status
from lightning_glue.tracking.journals import journals

TINY = ["--data", "sample", "--model", "tiny", "--gpus", "0"]
SHORT = ["trainer.max_epochs=2", "trainer.log_every=5", "data.batch_size=32", "tracking.system_metrics_seconds=null"]


def only_run(folder: Path, experiment: str) -> tuple[mlflow.MlflowClient, Run]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert len(found) == 1
    return client, found[0]


def artifacts(client: mlflow.MlflowClient, run_id: str, folder: str = "") -> set[str]:
    names: set[str] = set()
    for item in client.list_artifacts(run_id, folder):
        names |= artifacts(client, run_id, item.path) if item.is_dir else {item.path}
    return names


@pytest.fixture(scope="session")
def bpe_dir(small_bpe: Path) -> Path:
    return small_bpe


@pytest.fixture(scope="module")
def wnli(cache: Path, given_bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished training of WNLI and what it printed."""
    folder = tmp_path_factory.mktemp("wnli")
    arguments = ["--task", "WNLI", *TINY, *SHORT, "trainer.predict=true", "tracking.system_metrics_seconds=0.5"]
    result = run("lightning_glue.train", *arguments, cwd=folder, ROBERTA_BPE_DIR=str(given_bpe))
    return folder, result.stdout


def test_a_run_holds_what_reproduces_it(wnli: tuple[Path, str]) -> None:
    _client, found = only_run(wnli[0], "glue-wnli-sample")
    assert found.info.status == "FINISHED"
    params = found.data.params
    assert params["task.name"] == "WNLI"
    assert float(params["optimizer.lr"]) == pytest.approx(1e-3)
    assert params["trainer.max_epochs"] == "2"
    tags = found.data.tags
    assert {"version.torch", "version.pytorch-lightning", "hardware.cpu", "hardware.cores"} <= set(tags)
    assert any(name in tags for name in ("version.ve-fairseq", "version.fairseq-fixed", "version.fairseq"))
    assert "--task WNLI" in tags["mlflow.source.name"]
    assert (params["trainer.precision"], tags["resolved.devices"]) == ("auto", "1 x cpu")
    assert tags["resolved.precision"] in ("32-true", "bf16-mixed")
    note = tags["mlflow.note.content"]
    assert "WNLI (generated sample, not GLUE): train 300, dev 60, test 60\n\ntiny, 2 epochs, batch 32, lr 0.001" in note
    accuracy = f"{found.data.metrics['best/dev/accuracy']:.4f}"
    assert re.search(rf"dev/accuracy +{accuracy} \(majority class 0\.\d{{4}}\)", note)
    assert f"    {tags['mlflow.source.name']}\n" in note and f"--resume {found.info.run_id}\n" in note
    assert re.fullmatch(r"[0-9a-f]{40}", tags.get("mlflow.source.git.commit", "0" * 40))
    inputs = {item.dataset.name: item.dataset for item in found.inputs.dataset_inputs}
    assert set(inputs) == {"WNLI/train", "WNLI/dev", "WNLI/test"}
    assert json.loads(inputs["WNLI/dev"].profile)["rows"] == 60
    assert json.loads(inputs["WNLI/dev"].profile)["sha256"].startswith(inputs["WNLI/dev"].digest)


def test_a_run_has_curves_of_training_and_evaluation(wnli: tuple[Path, str]) -> None:
    client, found = only_run(wnli[0], "glue-wnli-sample")
    steps = {name: [m.step for m in client.get_metric_history(found.info.run_id, name)] for name in found.data.metrics}
    assert steps["dev/accuracy"] == steps["dev/loss"] == [10, 20]  # 300 rows in batches of 32
    for name in ("loss", "lr", "grad_norm", "examples_per_second", "tokens_per_second", "padding_ratio"):
        assert steps[f"train/{name}"] == [5, 10, 15, 20], name
    assert 0 <= found.data.metrics["train/padding_ratio"] < 0.5
    assert found.data.metrics["train/lr"] < 1e-3 / 5  # nearly at the end of the decay
    accuracies = [m.value for m in client.get_metric_history(found.info.run_id, "dev/accuracy")]
    assert found.data.metrics["best/dev/accuracy"] == max(accuracies)
    assert any(name.startswith("system/") for name in steps)


def test_a_run_keeps_figures_checkpoints_and_a_fairseq_directory(wnli: tuple[Path, str]) -> None:
    client, found = only_run(wnli[0], "glue-wnli-sample")
    names = artifacts(client, found.info.run_id)
    assert {
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "fairseq/checkpoint_best.pt",
        "fairseq/input0/dict.txt",
        "fairseq/label/dict.txt",
        "fairseq/vocab.json",
        "fairseq/merges.txt",
        "figures/learning_curves.png",
        "figures/dev_confusion_matrix.png",
        "figures/dev_precision_recall.png",
        "predictions/WNLI.tsv",
        "git.diff",
        "config.yaml",
    } <= names
    root = wnli[0] / "mlruns"
    assert next(root.rglob("figures/*.png")).read_bytes().startswith(b"\x89PNG")
    for path in root.rglob("*.ckpt"):
        torch.load(path, map_location="cpu", weights_only=True)
    assert not list(root.rglob("*.part"))


def test_the_output_says_what_came_out_and_what_is_next(wnli: tuple[Path, str]) -> None:
    folder, output = wnli
    _, found = only_run(folder, "glue-wnli-sample")
    assert "WNLI (generated sample, not GLUE): train 300, dev 60, test 60" in output
    assert re.search(r"dev/accuracy +0\.\d{4} \(majority class 0\.\d{4}\)", output)
    assert re.search(r"^epoch 1/2  step 10  train/loss \d\.\d{4}  dev/accuracy", output, re.MULTILINE)
    assert "last step done; writing the best model" in output
    assert found.info.run_id in output
    assert "mlflow ui --workers 1\n" in output
    page = f"http://127.0.0.1:5000/#/experiments/{found.info.experiment_id}/runs"
    assert f"  {page}?workflowType=machine_learning\n      compare runs\n" in output
    assert f"  {page}/{found.info.run_id}?workflowType=machine_learning\n      this run\n" in output


def test_evaluation_of_the_run_repeats_its_best_metrics(wnli: tuple[Path, str]) -> None:
    folder, _ = wnli
    _, found = only_run(folder, "glue-wnli-sample")
    precision = "trainer.precision=auto"
    result = run(
        "lightning_glue.evaluate", found.info.run_id, "--data", "sample", "--predict", "out", precision, cwd=folder
    )
    values = dict(line.split() for line in result.stdout.splitlines() if line.startswith("dev/"))
    assert float(values["dev/accuracy"]) == found.data.metrics["best/dev/accuracy"]
    logged = next((folder / "mlruns").rglob("predictions/WNLI.tsv"))
    assert len((folder / "out" / "WNLI.tsv").read_text().splitlines()) == len(logged.read_text().splitlines()) == 61


@pytest.mark.torture
def test_another_task_starts_from_the_run(wnli: tuple[Path, str], given_bpe: Path, tmp_path: Path) -> None:
    """--init-from with a run id: at learning rate 0 the encoder stays the run's, bit for bit."""
    folder, _ = wnli
    _, found = only_run(folder, "glue-wnli-sample")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    arguments = [
        "--task",
        "MRPC",
        *TINY,
        *SHORT,
        "trainer.max_steps=1",
        "optimizer.lr=0",
        "--init-from",
        found.info.run_id,
    ]
    run("lightning_glue.train", *arguments, cwd=folder, ROBERTA_BPE_DIR=str(given_bpe), MLFLOW_TRACKING_URI=uri)
    _, second = only_run(folder, "glue-mrpc-sample")
    exports = {
        run_id: torch.load(next((folder / "mlruns").glob(f"*/{run_id}/artifacts/fairseq/*.pt")), weights_only=True)
        for run_id in (found.info.run_id, second.info.run_id)
    }
    first, last = (state["model"] for state in exports.values())
    for name, tensor in first.items():
        if not name.startswith("classification_heads."):
            assert torch.equal(tensor, last[name]), name


@pytest.mark.torture
def test_regression_logs_its_correlations_and_a_scatter(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    run("lightning_glue.train", "--task", "STS-B", *TINY, *SHORT, cwd=tmp_path, ROBERTA_BPE_DIR=str(bpe_dir))
    client, found = only_run(tmp_path, "glue-sts-b-sample")
    assert {"dev/pearson", "dev/spearman", "dev/loss", "best/dev/pearson"} <= set(found.data.metrics)
    assert "figures/dev_scatter.png" in artifacts(client, found.info.run_id)


def test_mnli_is_scored_on_both_dev_sets_and_predicts_ax(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    arguments = ["--task", "MNLI", *TINY, *SHORT, "trainer.max_steps=5", "trainer.predict=true"]
    run("lightning_glue.train", *arguments, cwd=tmp_path, ROBERTA_BPE_DIR=str(bpe_dir))
    client, found = only_run(tmp_path, "glue-mnli-sample")
    assert {"dev_matched/accuracy", "dev_mismatched/accuracy"} <= set(found.data.metrics)
    predictions = {name for name in artifacts(client, found.info.run_id) if name.startswith("predictions/")}
    assert predictions == {f"predictions/{name}" for name in ("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv")}


@pytest.mark.torture
def test_two_processes_make_the_same_run_as_one(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    """DDP with gloo: as many updates, the same loss curve up to rounding, one MLflow run, no file left by process 1."""
    histories = {}
    for procs in (1, 2):
        folder = tmp_path / str(procs)
        folder.mkdir()
        exact = ["trainer.precision=32-true", "model.dropout=0", "model.attention_dropout=0", "trainer.max_epochs=1"]
        arguments = ["--task", "WNLI", *TINY, *SHORT, *exact, "--procs", str(procs)]
        result = run("lightning_glue.train", *arguments, cwd=folder, ROBERTA_BPE_DIR=str(bpe_dir))
        assert result.stdout.count("best evaluation") == 1
        client, found = only_run(folder, "glue-wnli-sample")
        assert found.info.status == "FINISHED"
        histories[procs] = {
            name: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
            for name in ("train/loss", "dev/loss", "train/padding_ratio", "train/grad_norm")
        }
    for name in ("train/loss", "dev/loss", "train/grad_norm"):
        assert [step for step, _ in histories[1][name]] == [step for step, _ in histories[2][name]]
        assert [v for _, v in histories[2][name]] == pytest.approx([v for _, v in histories[1][name]], rel=2e-3), name


@pytest.mark.torture
def test_accumulation_changes_nothing(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    curves = []
    for accumulate in (1, 4):
        folder = tmp_path / str(accumulate)
        folder.mkdir()
        exact = ["trainer.precision=32-true", "model.dropout=0", "model.attention_dropout=0", "trainer.max_epochs=1"]
        arguments = ["--task", "WNLI", *TINY, *SHORT, *exact, f"trainer.accumulate={accumulate}"]
        run("lightning_glue.train", *arguments, cwd=folder, ROBERTA_BPE_DIR=str(bpe_dir))
        client, found = only_run(folder, "glue-wnli-sample")
        curves.append([(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss")])
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
    assert [value for _, value in curves[1]] == pytest.approx([value for _, value in curves[0]], rel=2e-3)


@pytest.mark.torture
def test_torchrun_starts_the_same_program(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    command = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "lightning_glue.train", "--task", "WNLI", *TINY]
    run(*command, *SHORT, "trainer.max_steps=6", cwd=tmp_path, ROBERTA_BPE_DIR=str(bpe_dir))
    _, found = only_run(tmp_path, "glue-wnli-sample")
    assert found.info.status == "FINISHED"
    assert "dev/accuracy" in found.data.metrics


def start_long_training(folder: Path, bpe_dir: Path) -> subprocess.Popen[str]:
    arguments = ["--task", "SST-2", *TINY, "trainer.max_epochs=500", "tracking.system_metrics_seconds=null"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_glue.train", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ROBERTA_BPE_DIR": str(bpe_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch"):
            return process
    pytest.fail(f"training ended early: {process.stderr.read()}")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), torture(signal.SIGINT, 130), torture(signal.SIGUSR1, 138), torture(signal.SIGHUP, 129)],
)
def test_a_stopped_training_is_killed_not_finished_and_says_where_it_goes_on(
    number: signal.Signals, code: int, cache: Path, bpe_dir: Path, tmp_path: Path
) -> None:
    process = start_long_training(tmp_path, bpe_dir)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    _, found = only_run(tmp_path, "glue-sst-2-sample")
    assert found.info.status == "KILLED"
    (last,) = tmp_path.rglob("last.ckpt")
    step = torch.load(last, weights_only=True)["global_step"]
    assert f"stopped by {number.name}; run: " in errors
    assert re.search(rf"saved at step {step}: .*--resume {found.info.run_id}\n    goes on from there", errors)
    assert found.info.end_time / 1000 <= time.time()


@pytest.mark.torture
def test_a_second_ctrl_c_ends_at_once(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    """In a step that never comes to its end."""
    code = """
import os, signal, sys, time
from lightning_glue import train
from lightning_glue.training import module
def stuck(self, batch, index):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    time.sleep(600)
module.GlueModule.training_step = stuck
sys.argv = ["train", "--task", "WNLI", "--data", "sample", "--model", "tiny", "--gpus", "0"]
train.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ROBERTA_BPE_DIR": str(bpe_dir)}
    command = [sys.executable, "-c", FORKED + code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 130
    assert "once more ends at once" in result.stderr
    assert "Traceback" not in result.stderr
    (folder,) = journals(tmp_path / "mlruns" / ".journal")
    for _ in range(300):
        if final_status(Journal(folder).read()) == "KILLED":  # its watcher says so
            return
        time.sleep(0.1)
    pytest.fail("the run does not read KILLED")


@pytest.mark.torture
def test_a_signal_while_the_model_is_built_is_one_line(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    code = """
import os, signal, sys
from lightning_glue import train
from lightning_glue.training import run
run.prepare_process = lambda config: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["train", "--task", "WNLI", "--data", "sample", "--model", "tiny", "--gpus", "0"]
train.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ROBERTA_BPE_DIR": str(bpe_dir)}
    command = [sys.executable, "-c", FORKED + code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (143, "stopped by SIGTERM\n")
    assert not list(tmp_path.rglob("records"))


def test_a_crash_leaves_a_failed_run_with_its_traceback(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    """A checkpoint folder that cannot be written, found out only after training has begun."""
    code = """
import sys
from lightning_glue import train
from lightning_glue.training import module
def fail(self, batch, index):
    raise ValueError("no such luck")
module.GlueModule.training_step = fail
sys.argv = ["train", "--task", "WNLI", "--data", "sample", "--model", "tiny", "--gpus", "0"]
train.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ROBERTA_BPE_DIR": str(bpe_dir)}
    command = [sys.executable, "-c", FORKED + code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    client, found = only_run(tmp_path, "glue-wnli-sample")
    assert found.info.status == "FAILED"
    assert "traceback.txt" in artifacts(client, found.info.run_id)
    assert "no such luck" in next((tmp_path / "mlruns").rglob("traceback.txt")).read_text()


@pytest.mark.torture
def test_a_training_that_diverges_ends_early_and_says_so(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    arguments = ["--task", "WNLI", *TINY, *SHORT, "trainer.max_epochs=30", "optimizer.lr=1e30"]
    result = run("lightning_glue.train", *arguments, cwd=tmp_path, check=False, ROBERTA_BPE_DIR=str(bpe_dir))
    assert result.returncode == 1
    first = r"its loss was first no number at step [23], with rows [\d, ]+ of WNLI/train.tsv"
    where = rf"step 5, loss nan; {first}"
    assert re.fullmatch(rf"error: the training diverged at {where}; lower optimizer.lr \(1e\+30\)\n", result.stderr)
    client, found = only_run(tmp_path, "glue-wnli-sample")
    assert found.info.status == "FAILED"
    assert re.fullmatch(where, found.data.tags["diverged"])
    assert not list((tmp_path / "mlruns").rglob("last.ckpt"))  # whose weights would be no numbers
    assert not [name for name in found.data.metrics if name.startswith("best/")]
    assert [point.step for point in client.get_metric_history(found.info.run_id, "dev/accuracy")] == [5]
    assert not client.search_registered_models()
    flags = [*arguments, "--resume", "auto"]
    again = run("lightning_glue.train", *flags, cwd=tmp_path, check=False, ROBERTA_BPE_DIR=str(bpe_dir))
    assert (again.returncode, again.stderr) == (1, result.stderr)  # whoever restarts it
    assert only_run(tmp_path, "glue-wnli-sample")[1].info.status == "FAILED"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "64"], "--gpus 64: this machine shows"),
        (["tracking.uri=sqlite:////proc/nowhere/x.db"], "MLflow at sqlite:////proc/nowhere/x.db cannot be used"),
        (["--init-from", "nowhere.pt"], "nowhere.pt: no checkpoint there"),
        (["data.glue_dir=nowhere", "--data", "glue"], "nowhere is not a folder"),
        (["trainer.val_check_interval=100000"], "trainer.val_check_interval=100000 batches, but an epoch of WNLI has"),
        (["model.architecture.encoder_attention_heads=7"], "cannot be shared by 7 encoder_attention_heads"),
        (["data.max_tokens=1024"], "model.architecture: data.max_tokens=1024, but the model has 512 positions"),
        (["--procs", "8", "data.batch_size=4"], "data.batch_size=4 examples a step cannot be shared by 8 processes"),
    ],
)
def test_mistakes_found_late_are_one_line_too(
    arguments: list[str], message: str, cache: Path, bpe_dir: Path, tmp_path: Path
) -> None:
    command = ["lightning_glue.train", "--task", "WNLI", *TINY, *arguments]
    result = run(*command, cwd=tmp_path, check=False, ROBERTA_BPE_DIR=str(bpe_dir))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "mlruns").exists()
