"""What a trial's process makes of its job: what it goes on with, and how it says that it failed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from lightning_glue.config import Config, compose, flatten
from lightning_glue.data.binarize import SplitInfo
from lightning_glue.errors import Diverged, UserError
from lightning_glue.execution.job import Job, TrainingFailed
from lightning_glue.execution.train_job import interrupted
from lightning_glue.execution.worker import run_job
from lightning_glue.tracking.journal import Journal
from lightning_glue.tuning.study_run import as_parent

SPLITS = {"train": SplitInfo(file="train.tsv", rows=2, dropped=0, skipped=0, sha256="a" * 64)}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return compose([f"tracking.journal={tmp_path / 'journal'}"], task="RTE", model="tiny", data="sample")


def leave_checkpoint(folder: Path, config: Config, study: str, *, status: str = "") -> None:
    """What a killed training leaves: its last checkpoint and its journal."""
    record = {"run_id": "j1", "config": flatten(config), "data": {"train": "a" * 64}}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"lightning_glue": record, "position": [1, 2], "state_dict": {}}, folder / "last.ckpt")
    journal = Journal(Path(config.tracking.journal) / "j1")
    journal.folder.mkdir(parents=True, exist_ok=True)
    journal.append({"start": {"id": "j1", "tags": {}, "parent": as_parent(study)}})
    if status:
        journal.append({"status": [status, 1]})


def test_a_training_goes_on_from_what_its_own_process_left(tmp_path: Path, config: Config) -> None:
    folder = tmp_path / "scratch"
    assert interrupted(folder, config, SPLITS, as_parent("s1")) is None
    leave_checkpoint(folder, config, "s1")
    found = interrupted(folder, config, SPLITS, as_parent("s1"))
    assert found and found.run_id == "j1" and found.position == (1, 2)


def test_a_finished_training_is_not_gone_on_with(tmp_path: Path, config: Config) -> None:
    leave_checkpoint(tmp_path / "scratch", config, "s1", status="FINISHED")
    assert interrupted(tmp_path / "scratch", config, SPLITS, as_parent("s1")) is None


@pytest.mark.parametrize("other", ["configuration", "data", "study", "damaged"])
def test_what_is_not_its_own_is_never_gone_on_with(tmp_path: Path, config: Config, other: str) -> None:
    folder, splits, study = tmp_path / "scratch", SPLITS, "s1"
    leave_checkpoint(folder, config, study)
    if other == "configuration":
        config = replace(config, seed=7)
    elif other == "data":
        splits = {"train": replace(SPLITS["train"], sha256="b" * 64)}
    elif other == "study":
        study = "s2"
    else:
        (folder / "last.ckpt").write_bytes(b"cut off")
    assert interrupted(folder, config, splits, as_parent(study)) is None
    assert not folder.exists()  # nor are its other checkpoints


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (UserError("no such data"), "user", "no such data"),
        (TrainingFailed("database is locked"), "error", "database is locked"),
        (torch.OutOfMemoryError("CUDA: 1 PiB"), "memory", "out of memory: CUDA: 1 PiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory", "out of memory: Def"),
        (Diverged("step 10", 1.0), "diverged", "diverged at step 10"),
        (ValueError(""), "error", "ValueError: ValueError"),
        (OSError("postgresql://ann:s3cr3t@h/d is away"), "error", "OSError: postgresql://ann:***@h/d is away"),
    ],
)
def test_failures_by_kind(error: Exception, kind: str, text: str) -> None:
    class Silent:
        report = tell_run = None

    def objective(*_: object) -> None:
        raise error

    answer = run_job(objective, Silent(), {"job": {"config": {}, "tags": {}, "checkpoints": ""}})
    assert (answer["event"], answer["kind"]) == ("failed", kind)
    assert answer["message"].startswith(text)


def test_a_pruned_training_that_goes_on_is_still_pruned() -> None:
    from lightning_glue.execution.reporting import Reporting

    before, after = (Reporting("dev/accuracy", lambda *_: False, 0.0) for _ in range(2))
    before.pruned, before.evaluations = True, 3
    after.load_state_dict(before.state_dict())
    assert after.state_key == "Pruning"  # the name it has in the checkpoints of every version
    assert (after.pruned, after.evaluations) == (True, 3)
    after.load_state_dict({"evaluations": 2})  # of an earlier version
    assert (after.pruned, after.evaluations) == (False, 2)


def test_a_job_is_plain_values(config: Config) -> None:
    job = Job(flatten(config), {}, "x")
    assert Job(**json.loads(json.dumps(asdict(job)))) == job
