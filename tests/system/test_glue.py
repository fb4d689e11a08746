"""The whole benchmark as a user runs it: real trainings, killed once, gone on with, looked at through MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
from helpers.project import ROOT, run

COMMAND = [
    "lightning_glue.glue", "--tasks", "RTE WNLI", "--seeds", "2", "--data", "sample", "--model", "tiny", "--gpus", "0",
    "--workers", "2", "trainer.max_steps=16", "trainer.checkpoint_every_steps=2", "data.batch_size=32",
    "tracking.system_metrics_seconds=null",
]  # fmt: skip


def events(folder: Path) -> list[dict[str, str]]:
    path = folder / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.torture
def test_a_benchmark_that_is_killed_goes_on_and_is_whole(
    tmp_path: Path, cache: Path, bpe_dir: Path, new_store, monkeypatch
) -> None:
    monkeypatch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))
    monkeypatch.chdir(tmp_path)
    new_store(tmp_path)
    folder = tmp_path / "mlruns" / ".glue" / "tiny-sample"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-m", *COMMAND], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob("work/*/checkpoints/last.ckpt")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    below = psutil.Process(first.pid).children(recursive=True)
    workers = [one for one in below if "lightning_glue.execution.worker" in " ".join(one.cmdline())]
    first.kill()
    first.wait()
    begun = {event["job"]: event["run_id"] for event in events(folder) if event["state"] == "run"}
    assert begun and not [event for event in events(folder) if event["state"] == "done"]

    output = run(*COMMAND, cwd=tmp_path, timeout=280)
    assert "submission.zip" in output.stdout
    assert "RTE/seed-1/train begins on slot" in output.stderr and "14 of 14 jobs done" in output.stderr
    assert psutil.wait_procs(workers, timeout=1)[1] == []
    done = {event["job"]: event for event in events(folder) if event["state"] == "done"}
    assert len(done) == 14
    assert {job: done[job]["run_id"] for job in begun} == begun  # the same runs

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("glue-benchmark-sample").experiment_id])
    (parent,) = [one for one in runs if "lightning_glue.benchmark_run" in one.data.tags]
    asked = json.loads((folder / "benchmark.json").read_text())
    assert asked["id"] == parent.data.tags["lightning_glue.benchmark_run"] and parent.info.status == "FINISHED"
    nested = [one for one in runs if one.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert Counter(one.data.tags["lightning_glue.job"] for one in nested) == Counter(
        f"{task}/seed-{seed}/train" for task in ("RTE", "WNLI") for seed in (1, 2)
    )
    assert {one.data.tags["lightning_glue.benchmark"] for one in nested} == {asked["id"]}
    assert {one.info.status for one in nested} == {"FINISHED"}
    (killed,) = [one for one in nested if one.data.tags["lightning_glue.job"] == next(iter(begun))]
    steps = [point.step for point in client.get_metric_history(killed.info.run_id, "dev/accuracy")]
    assert steps == sorted(set(steps)) and steps[-1] == 16  # no evaluation twice
    attached = {item.path for item in client.list_artifacts(parent.info.run_id, "benchmark")}
    assert {"benchmark/report.md", "benchmark/submission.zip"} <= attached

    for job, event in done.items():  # what the files say is what the trainings said
        task, _, kind = job.partition("/")
        if kind.endswith("predict"):
            trained = done[job.replace("predict", "train")]["metrics"]["dev/accuracy"]
            assert event["metrics"]["dev/accuracy"] == trained
            with np.load(folder / "outputs" / task / kind.split("/")[0] / "dev.npz") as arrays:
                assert np.mean(arrays["outputs"].argmax(1) == arrays["targets"]) == pytest.approx(trained)
    assert {path.name for path in (folder / "outputs" / "RTE").iterdir()} == {"seed-1", "seed-2", "ensemble", "soup"}

    kept = [path for path in tmp_path.glob("mlruns/*/*/artifacts/fairseq/checkpoint_best.pt")]
    dropped = [one for one in nested if client.get_run(one.info.run_id).data.tags.get("lightning_glue.export")]
    assert (len(kept), len(dropped)) == (2, 2)  # the best of each task
    assert not list(folder.rglob("*.ckpt")) and not list(tmp_path.glob("mlruns/*/*/artifacts/checkpoints"))
    assert {version.run_id for version in client.search_model_versions()} == {path.parts[-4] for path in kept}

    before = (folder / "ledger.jsonl").read_bytes()
    again = run(*COMMAND, cwd=tmp_path)
    assert "nothing is missing (14 jobs done)" in again.stdout
    assert (folder / "ledger.jsonl").read_bytes() == before
