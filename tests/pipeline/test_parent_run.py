"""The run of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from lightning_glue.pipeline.parent_run import PARENT_TAG, tell_finished


@pytest.mark.parametrize("status", ["KILLED", "RUNNING", "FINISHED"])
def test_a_benchmark_that_is_through_reads_finished_whatever_became_of_its_last_driver(
    status: str, new_store: Callable[[Path], None], tmp_path: Path
) -> None:
    new_store(tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("glue-benchmark", artifact_location=str(tmp_path))
    ours, other = (client.create_run(experiment, tags={PARENT_TAG: name}).info.run_id for name in ("ours", "other"))
    for run_id in (ours, other):
        client.update_run(run_id, status)
    tell_finished(SimpleNamespace(uri=f"sqlite:///{tmp_path / 'mlflow.db'}", experiment="glue-benchmark", id="ours"))
    assert client.get_run(ours).info.status == "FINISHED"
    assert client.get_run(other).info.status == status
    tell_finished(SimpleNamespace(uri=f"sqlite:///{tmp_path / 'none.db'}", experiment="glue-benchmark", id="ours"))
    assert not (tmp_path / "none.db").exists()
