"""Artifacts on S3, as moto serves it: written through the tracking server and directly, and read back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from helpers.project import ROOT, run
from helpers.servers import MlflowServer, free_port

pytestmark = pytest.mark.torture
FLAGS = ["--task", "WNLI", "--model", "tiny", "--data", "sample", "--gpus", "0", "data.batch_size=32",
         "tracking.system_metrics_seconds=null"]  # fmt: skip


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, dict[str, str]]]:
    """A bucket's name and the variables with which it is reached."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "tester",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_SECRET_ACCESS_KEY": "not-a-secret-of-anyone",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    keys = {"aws_access_key_id": "tester", "aws_secret_access_key": environment["AWS_SECRET_ACCESS_KEY"]}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys).create_bucket(
        Bucket="glue"
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield "glue", environment
    server.stop()


@pytest.fixture(params=["direct", "server"])
def tracking(
    request: pytest.FixtureRequest,
    bucket: tuple[str, dict[str, str]],
    tmp_path: Path,
    new_store: Callable[[Path], None],
) -> Iterator[tuple[str, dict[str, str]]]:
    """Tracking's address and the variables that a training has to use it."""
    name, keys = bucket
    location = f"s3://{name}/{request.param}"
    if request.param == "direct":
        new_store(tmp_path)
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
        mlflow.MlflowClient(uri).create_experiment("glue-wnli-sample", artifact_location=location)
        yield uri, keys
        return
    server = MlflowServer(tmp_path, artifacts=location)
    server.start()
    try:
        yield server.uri, dict.fromkeys(keys, "")  # clients need no keys
    finally:
        server.kill()


def train(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_glue.train", *FLAGS, *arguments], cwd=folder, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, text=True,
    )  # fmt: skip


def test_a_stopped_training_goes_on_elsewhere_from_s3_and_its_model_is_evaluated_from_there(
    tracking: tuple[str, dict[str, str]], bpe_dir: Path, cache: Path, tmp_path: Path
) -> None:
    uri, keys = tracking
    environment = {**keys, "MLFLOW_TRACKING_URI": uri, "ROBERTA_BPE_DIR": str(bpe_dir)}
    first = train(tmp_path / "first", environment, "trainer.max_epochs=30")
    assert first.stdout
    for line in first.stdout:
        if line.lstrip().startswith("epoch 2/"):
            break
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert first.returncode == 143
    run("lightning_glue.sync", cwd=tmp_path / "first", **environment)
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("glue-wnli-sample").experiment_id])
    run_id = found.info.run_id
    assert found.info.status == "KILLED"
    assert found.info.artifact_uri.startswith(("s3://glue/direct", "mlflow-artifacts:"))
    shutil.rmtree(tmp_path / "first")  # whatever is read from here on comes from S3

    second = train(tmp_path / "second", environment, "--resume", run_id)
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 0 and "resuming run" in said
    run("lightning_glue.sync", cwd=tmp_path / "second", **environment)
    steps = [point.step for point in client.get_metric_history(run_id, "dev/accuracy")]
    assert steps == sorted(set(steps)) and len(steps) == 30
    assert client.get_run(run_id).info.status == "FINISHED"
    assert {"checkpoints", "fairseq", "figures"} <= {item.path for item in client.list_artifacts(run_id)}
    shutil.rmtree(tmp_path / "second")

    third = tmp_path / "third"
    third.mkdir()
    evaluated = run("lightning_glue.evaluate", run_id, "--gpus", "0", cwd=third, **environment)
    best = client.get_run(run_id).data.metrics["best/dev/accuracy"]
    assert f"{best:.4f}" in evaluated.stdout
