"""Searches on a real Ray cluster of three nodes, whose folder is shared: a node is lost, the driver is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import optuna
import psutil
import pytest
from helpers.project import ROOT
from helpers.ray_cluster import RayNodes
from optuna.trial import TrialState

from lightning_glue.tuning.storage import open_storage

pytestmark = pytest.mark.torture
COMMAND = [
    sys.executable, "-m", "lightning_glue.tune", "--task", "WNLI", "--model", "tiny", "--data", "sample", "--gpus", "0",
    "--study", "wnli", "data.batch_size=32", "tracking.system_metrics_seconds=null", "tune.pruner=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    nodes = RayNodes(3, cpus=1)
    try:
        yield nodes
    finally:
        nodes.stop()


@pytest.fixture
def project(
    tmp_path: Path, cache: Path, bpe_dir: Path, new_store: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> Path:
    new_store(tmp_path)
    monkeypatch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return tmp_path


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a search in a folder; none outlives the test."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
        folder.mkdir(exist_ok=True)
        started.append(
            subprocess.Popen(
                [*COMMAND, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
        return started[-1]

    yield start
    for search in started:
        search.kill()
        search.wait()


def finish(search: subprocess.Popen[str]) -> str:
    output, _ = search.communicate(timeout=400)
    assert search.returncode == 0, output
    return output


def trials(folder: Path) -> list[optuna.trial.FrozenTrial]:
    try:
        return optuna.load_study(study_name="wnli", storage=open_storage(f"sqlite:///{folder / 'optuna.db'}")).trials
    except KeyError:
        return []


def history(folder: Path, run_id: str) -> dict[str, list[tuple[int, float]]]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    names = ("train/loss", "train/lr", "dev/loss", "dev/accuracy")
    return {name: [(p.step, p.value) for p in client.get_metric_history(run_id, name)] for name in names}


def wait_for(condition: Callable[[], object], search: subprocess.Popen[str], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert search.poll() is None, search.communicate()[0]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def workers(folder: Path) -> list[psutil.Process]:
    """Processes of trials that are in this folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "cwd"])
        if "lightning_glue.execution.worker" in (process.info["cmdline"] or []) and process.info["cwd"] == str(folder)
    ]


def node_of(worker: psutil.Process, nodes: RayNodes) -> Any:
    raylet = worker.parent().parent().cmdline()  # of the actor
    return next(node for node in nodes.nodes if f"--node_ip_address={node.node_ip_address}" in raylet)


def test_a_trial_goes_on_elsewhere_in_the_same_run_when_its_node_is_lost(
    nodes: RayNodes, project: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    whole, lost = project / "whole", project / "lost"
    arguments = ["--engine", "ray", "--address", nodes.address, "--workers", "1", "--trials", "1"]
    finish(start(whole, *arguments, "trainer.max_epochs=20"))
    search = start(lost, *arguments, "trainer.max_epochs=20")
    wait_for(lambda: list((lost / "mlruns" / ".tune").glob("wnli-*/trial-0-seed-0/last.ckpt")), search)
    (worker,) = workers(lost)
    node = node_of(worker, nodes)
    nodes.kill(node)
    finish(search)
    failed, retried = trials(lost)
    assert (failed.state, retried.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert failed.user_attrs["reason"].endswith(f"({node.node_ip_address}) left the cluster")
    (run_id,) = retried.user_attrs["runs"]
    (undisturbed,) = trials(whole)[0].user_attrs["runs"]
    assert history(lost, run_id) == history(whole, undisturbed)
    assert retried.value == trials(whole)[0].value


def test_a_benchmark_loses_a_node_and_is_whole_with_the_same_runs(nodes: RayNodes, project: Path) -> None:
    folder = project / "mlruns" / ".glue" / "tiny-sample"
    command = [
        sys.executable, "-m", "lightning_glue.glue", "--engine", "ray", "--address", nodes.address, "--gpus", "0",
        "--tasks", "WNLI", "--seeds", "2", "--model", "tiny", "--data", "sample", "trainer.max_epochs=12",
        "data.batch_size=32", "tracking.system_metrics_seconds=null",
    ]  # fmt: skip
    benchmark = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: list(folder.glob("work/*/checkpoints/last.ckpt")), benchmark)
        nodes.kill(node_of(workers(project)[0], nodes))
        output = finish(benchmark)
    finally:
        benchmark.kill()
        nodes.nodes.append(nodes.add(1))
    events = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert [event["job"] for event in events if event["state"] == "died"], output
    assert {event["state"] for event in events if event["job"] == "report"} == {"started", "done"}
    runs = {
        (event["job"], event["run_id"]) for event in events if event["state"] in ("run", "done") and event["run_id"]
    }
    assert sorted(job for job, _ in runs) == ["WNLI/seed-1/train", "WNLI/seed-2/train"]  # one each, though one was lost
    assert (folder / "report.html").is_file() and (folder / "submission.zip").is_file()


def test_a_driver_that_is_killed_or_stopped_leaves_nothing_and_its_study_has_exactly_its_trials(
    nodes: RayNodes, project: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    arguments = ["--engine", "ray", "--address", nodes.address, "--trials", "4", "trainer.max_epochs=8"]
    search = start(project, *arguments)
    wait_for(lambda: sum(trial.state == TrialState.COMPLETE for trial in trials(project)) >= 1, search)
    running = workers(project)
    assert len(running) == len(nodes.nodes)  # a slot on each
    search.kill()
    search.communicate()
    assert psutil.wait_procs(running, timeout=60)[1] == []
    stopped = start(project, *arguments)
    wait_for(lambda: len(workers(project)) == len(nodes.nodes), stopped)
    running = workers(project)
    stopped.send_signal(signal.SIGTERM)
    output, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 128 + signal.SIGTERM, output
    assert output.endswith("stopped; the same command goes on\n")
    assert "Traceback" not in output and "SIGTERM received" not in output
    assert psutil.wait_procs(running, timeout=60)[1] == []
    finish(start(project, *arguments))
    states = Counter(trial.state for trial in trials(project))
    assert states[TrialState.COMPLETE] == 4 and set(states) <= {TrialState.COMPLETE, TrialState.FAIL}
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    runs = {
        run_id: client.get_run(run_id)
        for trial in trials(project)
        if trial.state == TrialState.COMPLETE
        for run_id in trial.user_attrs["runs"][-1:]
    }
    assert len(runs) == 4 and {one.info.status for one in runs.values()} == {"FINISHED"}
    assert len({one.data.tags["mlflow.parentRunId"] for one in runs.values()}) == 1
