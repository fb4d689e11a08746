"""The tracker against a real MLflow server that goes away and comes back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from lightning_glue.errors import UserError
from lightning_glue.preprocess import SplitInfo
from lightning_glue.tracking import MLflowTracker


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """A tracking server on a free port: its address, and functions that start and kill it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--artifacts-destination", "artifacts"]
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        with open(tmp_path / "server.log", "ab") as log:
            running.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True))
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        pytest.fail((tmp_path / "server.log").read_text())

    def kill() -> None:
        process = running.pop()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    start()
    yield f"http://127.0.0.1:{port}", start, kill
    while running:
        kill()


def test_metrics_survive_a_server_that_goes_away(
    server: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, start, kill = server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = MLflowTracker(uri, "glue-rte", "a name")
    tracker.start({"optimizer.lr": 1e-5, "long": "x" * 7000}, {"version.torch": "2"}, None)
    tracker.log_inputs("RTE", {"train": SplitInfo("train.tsv", "ab" * 32, 10, 0, 1)})
    tracker.log_metrics({"train/loss": 1.0, "epoch": 0.0}, step=1)
    tracker.save()
    kill()
    tracker.log_metrics({"train/loss": 0.5}, step=2)
    with pytest.warns(UserWarning, match=r"did not take 1 metrics"):
        tracker.save()
    start()
    tracker.log_metrics({"train/loss": 0.25}, step=3)
    with tracker.artifact_folder("fairseq") as folder:
        (folder / "input0").mkdir()
        (folder / "input0" / "dict.txt").write_text("a 1\n")
    assert tracker.local_artifacts is None
    tracker.finish("FINISHED")

    client = mlflow.MlflowClient(uri)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a name")
    history = [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, "train/loss")]
    assert history == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert "epoch" not in run.data.metrics
    assert run.data.params["optimizer.lr"] == "1e-05"
    assert len(run.data.params["long"]) == 6000
    assert run.inputs.dataset_inputs[0].dataset.digest == "ab" * 16
    fetched = mlflow.artifacts.download_artifacts(
        run_id=tracker.run_id, artifact_path="fairseq/input0/dict.txt", tracking_uri=uri, dst_path=str(tmp_path)
    )
    assert Path(fetched).read_text() == "a 1\n"


def test_a_server_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        UserError, match=r"MLflow at http://127\.0\.0\.1:9 cannot be used: .*; see tracking\.uri"
    ) as error:
        MLflowTracker("http://127.0.0.1:9", "glue-rte", "x").start({}, {}, None)
    assert "\n" not in str(error.value)


def test_large_files_go_straight_into_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = MLflowTracker(None, "glue-rte", "x")
    tracker.start({}, {}, None)
    with tracker.artifact_folder("checkpoints") as folder:
        assert folder.is_relative_to(tmp_path / "mlruns")
    assert tracker.uri == f"sqlite:///{tmp_path / 'mlflow.db'}"  # what plain `mlflow ui` opens
    assert tracker.run_id in tracker.describe()
    tracker.finish("KILLED")
    assert mlflow.MlflowClient(tracker.uri).get_run(tracker.run_id).info.status == "KILLED"
