"""What a run's model says is what ``evaluate`` scores and ``write_submissions`` writes, to the last bit."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from lightning_glue import config
from lightning_glue.errors import DataError
from lightning_glue.inference.submission import submission_lines
from lightning_glue.pipeline.outputs import Outputs, predict_run, read_outputs, score, write_outputs
from lightning_glue.tasks import TASKS
from lightning_glue.training import evaluation

from .conftest import Trained


@pytest.mark.torture
def test_outputs_are_those_of_the_evaluation_and_of_the_leaderboard_files(trained: Trained, tmp_path: Path) -> None:
    run = trained.mnli
    scores = predict_run(run.id, trained.uri, tmp_path / "outputs" / "MNLI" / "seed-1")
    assert (
        scores
        == run.metrics
        == {
            name.removeprefix("best/"): value
            for name, value in mlflow.MlflowClient(trained.uri).get_run(run.id).data.metrics.items()
            if name.startswith("best/")
        }
    )
    found = read_outputs(tmp_path / "outputs" / "MNLI" / "seed-1")
    assert list(found) == ["dev_matched", "dev_mismatched", "test_matched", "test_mismatched"]
    assert {name for one in found.values() for name in score(one)} == set(run.metrics)
    loaded = evaluation.load(run.id, config.compose([f"tracking.uri={trained.uri}"]), set(), None, predicts=True)
    assert evaluation.evaluate(loaded.config, loaded.fine_tuned, loaded.data) == scores
    task = TASKS["MNLI"]
    for path, split in zip(evaluation.predict(loaded.config, loaded.fine_tuned, loaded.data, tmp_path), task.test):
        one = found[split.name]
        assert one.index is not None
        assert "".join(submission_lines(task, torch.from_numpy(one.outputs), one.index)) == path.read_text()
    ax = read_outputs(tmp_path / "outputs" / "AX" / "seed-1")
    assert [one.outputs.shape for one in ax.values()] == [(100, 3)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(b"no archive"),
        lambda path: np.savez(path, outputs=np.zeros((2, 3), np.float32), targets=np.zeros(2, np.int64)),
        lambda path: np.savez(path, outputs=np.zeros((2, 2), np.float32), targets=np.zeros(3, np.int64)),
        lambda path: np.savez(path, outputs=np.array([[{}, 1]], dtype=object), targets=np.zeros(1, np.int64)),
        lambda path: np.savez(path, outputs=np.zeros((2, 2), np.float32)),
    ],
)
def test_a_file_that_is_none_of_ours_is_named(damage: object, tmp_path: Path) -> None:
    folder = tmp_path / "RTE" / "seed-1"
    path = write_outputs(Outputs("RTE", "dev", np.zeros((2, 2), np.float32), np.array([0, 1]), None), folder)
    assert list(read_outputs(folder)) == ["dev"]
    damage(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=r"dev\.npz (cannot be read|holds no outputs of RTE's dev)"):
        read_outputs(folder)
