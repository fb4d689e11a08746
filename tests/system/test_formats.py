"""What version 0.1.0 wrote is read: an interrupted and a finished run, a journal, a registered model, a study.

``formats/0.1.0.tar.xz`` is a project folder of that version, made in another place than where it is unpacked here:
seed 1 finished and registered, seed 2 stopped by SIGTERM in epoch 1, seed 3 trained while its server was away, and a
study of two trials. The model is tiny, its byte-pair encoding lies in ``bpe/``.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import mlflow
import pytest
from helpers.project import ROOT, run
from helpers.zygote import FORKED

ARCHIVE = ROOT / "tests" / "formats" / "0.1.0.tar.xz"
FINISHED, STOPPED = "41e3cf5a0dc7491ebfd710dbbbcdaebe", "8d78fac2660443d896632e57b796e219"
FLAGS = [
    *("--task", "WNLI", "--data", "sample", "--model", "tiny", "--gpus", "0", "tracking.system_metrics_seconds=null"),
    *("data.batch_size=32", "trainer.log_every=4", "trainer.precision=32-true"),
    *("model.architecture.encoder_layers=1", "model.architecture.encoder_embed_dim=8"),
    *("model.architecture.encoder_ffn_embed_dim=16", "model.architecture.encoder_attention_heads=2"),
]


@pytest.fixture
def project(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.setenv("ROBERTA_BPE_DIR", str(tmp_path / "bpe"))
    return tmp_path


def client(folder: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def test_an_interrupted_run_goes_on_where_it_was(project: Path) -> None:
    done = run("lightning_glue.train", "--resume", STOPPED, cwd=project)
    assert f"resuming run {STOPPED} after 1 epoch and" in done.stdout
    found = client(project).get_run(STOPPED)
    assert found.info.status == "FINISHED"
    steps = [point.step for point in client(project).get_metric_history(STOPPED, "dev/accuracy")]
    assert len(steps) == 3 and sorted(set(steps)) == steps
    assert (project / f"mlruns/1/{STOPPED}/artifacts/fairseq/checkpoint_best.pt").is_file()


def test_resume_auto_finds_it_by_its_configuration(project: Path) -> None:
    done = run("lightning_glue.train", *FLAGS, "seed=2", "trainer.max_epochs=3", "--resume", "auto", cwd=project)
    assert f"resuming run {STOPPED}" in done.stdout


def test_a_finished_run_is_scored_as_it_was(project: Path) -> None:
    done = run("lightning_glue.evaluate", FINISHED, "--data", "sample", "--gpus", "0", cwd=project)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("dev/accuracy")]
    recorded = client(project).get_run(FINISHED).data.metrics["best/dev/accuracy"]
    assert float(line.split()[1]) == pytest.approx(recorded, abs=0.02)  # another processor may round otherwise


def test_a_registered_model_predicts(project: Path) -> None:
    code = "import mlflow, pandas as pd\n"
    code += "model = mlflow.pyfunc.load_model('models:/glue-wnli-sample@champion')\n"
    code += "print(list(model.predict(pd.DataFrame({'text': ['Ann ran.'], 'text_pair': ['She ran.']})).columns))"
    (path,) = project.glob(f"mlruns/*/{FINISHED}/artifacts/fairseq")
    code = code.replace("models:/glue-wnli-sample@champion", str(path))
    loaded = subprocess.run(
        [sys.executable, "-c", FORKED + code], cwd=project, capture_output=True, text=True, timeout=100,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(project)},
    )  # fmt: skip
    assert loaded.stdout.strip().endswith("['label', 'probability_0', 'probability_1']"), loaded.stderr


def test_an_undelivered_journal_is_delivered(project: Path) -> None:
    done = run("lightning_glue.sync", "--uri", f"sqlite:///{project / 'mlflow.db'}", cwd=project)
    assert "journals delivered in full" in done.stdout
    found = client(project).search_runs(["1"], "params.seed = '3'")
    assert [one.info.status for one in found] == ["FINISHED"]
    assert "best/dev/accuracy" in found[0].data.metrics
    assert {"checkpoints", "fairseq"} <= {item.path for item in client(project).list_artifacts(found[0].info.run_id)}


def test_a_study_goes_on(project: Path) -> None:
    done = run("lightning_glue.tune", *FLAGS, "trainer.max_steps=4", "--trials", "3", cwd=project)
    assert "study WNLI-tiny-sample: 3 complete" in done.stdout
