"""An interrupted and resumed training is the uninterrupted one: same run, metrics and weights to the last bit."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch
from conftest import ROOT, run

from lightning_glue import config as configuration
from lightning_glue import resume as resuming
from lightning_glue import train as training
from lightning_glue.errors import UserError
from lightning_glue.module import GlueModule

EXACT = ("loss", "lr", "grad_norm", "padding_ratio")
OVERRIDES = [
    "trainer.gpus=0",
    "trainer.max_epochs=3",
    "trainer.log_every=4",  # 10 steps an epoch: no multiple
    "trainer.accumulate=2",
    "trainer.val_check_interval=6",  # batches: at steps 3, 6 and 9 of an epoch
    "data.batch_size=32",
    "model.dropout=0.2",
    "tracking.system_metrics_seconds=null",
]


def small(*overrides: str) -> configuration.Config:
    return configuration.compose([*OVERRIDES, *overrides], task="WNLI", model="tiny", data="sample")


def the_run(folder: Path, count: int = 1) -> tuple[mlflow.MlflowClient, mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("glue-wnli").experiment_id])
    assert len(runs) == count
    return client, runs[0]


def histories(folder: Path) -> dict[str, list[tuple[int, float | None]]]:
    """Every metric's (step, value) in the order of the server; values of speed left out."""
    client, found = the_run(folder)
    return {
        name: [
            (point.step, None if "per_second" in name else point.value)
            for point in client.get_metric_history(found.info.run_id, name)
        ]
        for name in found.data.metrics
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("mlruns/*/*/artifacts/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


def assert_same(folder: Path, reference: Path) -> None:
    assert histories(folder) == histories(reference)
    expected, found = weights(reference), weights(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert the_run(folder)[1].info.status == "FINISHED"


def interrupt(monkeypatch: pytest.MonkeyPatch, hook: str, call: int, action: Callable[[], None]) -> None:
    """Do ``action`` at the start of the ``call``-th call (from 0) of a hook of the module."""
    original, calls = getattr(GlueModule, hook), iter(range(10**6))

    def hooked(self: GlueModule, *args: object, **kwargs: object) -> object:
        if next(calls) == call:
            action()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GlueModule, hook, hooked)


def crash() -> None:
    raise RuntimeError("interrupted")


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, cache: Path, bpe_dir: Path) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, bpe_dir: Path, new_store: Callable[[Path], None]) -> Callable[..., None]:
    """Train in a folder of its own, in this process."""
    monkeypatch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))

    def start(folder: Path, *overrides: str, resume: str | None = None) -> None:
        folder.mkdir(exist_ok=True)
        new_store(folder)
        monkeypatch.chdir(folder)
        training.train(small(*overrides), resume)

    return start


@pytest.fixture
def reference(home: Path, start: Callable[..., None]) -> Path:
    if not (home / "reference").exists():
        start(home / "reference")
    return home / "reference"


# 20 micro-batches an epoch; evaluations after 6, 12, 18 of them
@pytest.mark.parametrize(
    ("hook", "call", "action", "error"),
    [
        ("training_step", 1, crash, RuntimeError),  # before the first checkpoint
        ("training_step", 6, crash, RuntimeError),  # right after one
        ("training_step", 9, crash, RuntimeError),
        ("training_step", 20, crash, RuntimeError),  # first of an epoch
        ("validation_step", 1, crash, RuntimeError),  # in an evaluation
        ("training_step", 0, sigterm, SystemExit),
        ("training_step", 11, sigterm, SystemExit),  # right before an evaluation
        ("training_step", 19, sigterm, SystemExit),  # last of an epoch
        ("training_step", 27, sigterm, SystemExit),  # in the middle of an optimizer step
        ("training_step", 59, sigterm, SystemExit),  # last of all
        ("on_validation_epoch_end", 2, sigterm, SystemExit),
    ],
)
def test_resumed_equals_uninterrupted(
    hook: str,
    call: int,
    action: Callable[[], None],
    error: type[BaseException],
    reference: Path,
    start: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, hook, call, action)
        with pytest.raises(error):
            start(tmp_path / "run")
    assert the_run(tmp_path / "run")[1].info.status == ("FAILED" if action is crash else "KILLED")
    start(tmp_path / "run", resume="auto")
    assert_same(tmp_path / "run", reference)


@pytest.mark.parametrize(
    ("overrides", "call"),
    [
        (["trainer.max_steps=17", "trainer.checkpoint_every_steps=2"], 29),
        (["trainer.max_steps=25", "trainer.val_check_interval=1.0"], 41),  # resumed at the start of an epoch
        (["trainer.early_stopping_patience=1", "optimizer.lr=0"], 11),
        (["trainer.precision=bf16-mixed", "data.length_pool=3"], 33),
    ],
)
def test_other_ways_to_train_resume_as_exactly(
    overrides: list[str], call: int, start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path / "whole", *overrides)
    with monkeypatch.context() as patch:
        interrupt(patch, "training_step", call, crash)
        with pytest.raises(RuntimeError):
            start(tmp_path / "run", *overrides)
    start(tmp_path / "run", *overrides, resume="auto")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_stop_after_early_stopping_stays_stopped(
    start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies between the last evaluation and the end of the run."""
    overrides = ["trainer.early_stopping_patience=1", "optimizer.lr=0"]
    start(tmp_path / "whole", *overrides)
    with monkeypatch.context() as patch:
        patch.setattr(training, "conclude", lambda *_: crash())
        with pytest.raises(RuntimeError):
            start(tmp_path / "run", *overrides)
    start(tmp_path / "run", *overrides, resume="auto")
    assert_same(tmp_path / "run", tmp_path / "whole")


FLAGS = ["--task", "WNLI", "--model", "tiny", "--data", "sample", *OVERRIDES]


def killed_at_step(folder: Path, call: int, *arguments: str, rank: int = 0) -> int:
    """Train in processes of their own; process ``rank`` kills itself at a call of training_step. The exit code."""
    code = f"""
import os, signal, sys
from lightning_glue import module, train
original, calls = module.GlueModule.training_step, iter(range(10**6))
def hooked(self, *arguments):
    if next(calls) == {call} and self.global_rank == {rank}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)
module.GlueModule.training_step = hooked
train.main()
"""
    folder.mkdir(exist_ok=True)
    (folder / "killed.py").write_text(code)
    command = [sys.executable, "killed.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=120).returncode


def test_two_processes_killed_resume_exactly(bpe_dir: Path, cache: Path, tmp_path: Path) -> None:
    """kill -9 of either DDP process; --resume with the run id alone."""
    arguments = [*FLAGS, "--procs", "2", "trainer.max_epochs=2", "trainer.accumulate=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    run("lightning_glue.train", *arguments, cwd=whole, ROBERTA_BPE_DIR=str(bpe_dir))
    os.environ["ROBERTA_BPE_DIR"] = str(bpe_dir)
    try:
        assert killed_at_step(killed, 8, *arguments, rank=1) != 0
        run_id = the_run(killed)[1].info.run_id
        assert killed_at_step(killed, 5, "--resume", run_id) == -signal.SIGKILL
    finally:
        del os.environ["ROBERTA_BPE_DIR"]
    run("lightning_glue.train", "--resume", run_id, cwd=killed, ROBERTA_BPE_DIR=str(bpe_dir))
    assert_same(killed, whole)


def test_sigterm_stops_two_processes_at_the_same_step(bpe_dir: Path, cache: Path, tmp_path: Path) -> None:
    arguments = [*FLAGS, "--procs", "2", "trainer.max_epochs=500", "trainer.accumulate=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_glue.train", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ROBERTA_BPE_DIR": str(bpe_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not process.stdout.readline().startswith("epoch 2"):
        assert process.poll() is None
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert errors.count("stopped by SIGTERM") == 1
    assert the_run(tmp_path)[1].info.status == "KILLED"


def test_resuming_on_other_data_names_the_difference(
    start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "training_step", 9, crash)
        with pytest.raises(RuntimeError):
            start(tmp_path / "run")
    found = resuming.find("auto", small())
    assert found.position == (0, 6)
    record = {**found.record, "data": {**found.record["data"], "dev": "0" * 64}}
    other = type(found)(found.run_id, found.path, record, found.position)
    with pytest.raises(UserError, match=r"other data: split dev was sha256 000000000000, is sha256 [0-9a-f]{12};"):
        training.train(small(), other)
    assert the_run(tmp_path / "run")[1].info.status == "FAILED"


def test_what_cannot_be_resumed_is_one_line(reference: Path, bpe_dir: Path) -> None:
    _client, finished = the_run(reference)
    run_id = finished.info.run_id

    def refused(*arguments: str) -> str:
        result = run("lightning_glue.train", *arguments, cwd=reference, check=False, ROBERTA_BPE_DIR=str(bpe_dir))
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        return result.stderr

    assert f"run {run_id} is finished; there is nothing to resume" in refused("--resume", run_id)
    assert "task.name=RTE contradicts the run's WNLI; leave it out" in refused("--resume", run_id, "--task", "RTE")
    assert "seed=2 contradicts the run's 1" in refused("--resume", run_id, "--task", "WNLI", "seed=2")
    assert "--resume nowhere.ckpt: no such file" in refused("--resume", "nowhere.ckpt")
    best = next(reference.glob("mlruns/*/*/artifacts/checkpoints/best.ckpt"))
    assert "best.ckpt cannot be resumed: it holds weights only" in refused("--resume", str(best))


def test_the_best_few_are_kept_and_the_rest_evicted(
    tmp_path: Path, cache: Path, bpe_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))
    training.train(small("tracking.keep_best=3", "optimizer.lr=1e-3"))
    client, found = the_run(tmp_path)
    history = client.get_metric_history(found.info.run_id, "dev/accuracy")
    best = sorted(history, key=lambda point: (-point.value, point.step))[:3]
    assert best[0].value > best[-1].value or len(history) > 3
    expected = {"best.ckpt", "last.ckpt", *(f"step-{point.step}.ckpt" for point in best[1:])}
    (folder,) = tmp_path.glob("mlruns/*/*/artifacts/checkpoints")
    assert {path.name for path in folder.glob("*.ckpt")} == expected
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {Path(path).name for path in manifest} == expected
    for path, entry in manifest.items():
        assert hashlib.sha256((folder / Path(path).name).read_bytes()).hexdigest() == entry["sha256"]
    saved = {name: torch.load(folder / name, weights_only=True)["global_step"] for name in expected}
    assert saved == {
        "best.ckpt": best[0].step,
        "last.ckpt": history[-1].step,
        **{f"step-{point.step}.ckpt": point.step for point in best[1:]},
    }
