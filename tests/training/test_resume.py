"""An interrupted and resumed training is the uninterrupted one: same run, metrics and weights to the last bit."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
from helpers.project import ROOT, run, torture

from lightning_glue import config as configuration
from lightning_glue import train as training
from lightning_glue.errors import UserError
from lightning_glue.tracking.journals import journals
from lightning_glue.tracking.logger import MLflowTracker
from lightning_glue.tracking.state import State
from lightning_glue.training import callbacks, checkpoints, module
from lightning_glue.training import resume as resuming
from lightning_glue.training import run as running
from lightning_glue.training.module import GlueModule

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
    runs = client.search_runs([client.get_experiment_by_name("glue-wnli-sample").experiment_id])
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


def last_checkpoint(folder: Path) -> Path:
    (path,) = folder.glob("mlruns/*/*/artifacts/checkpoints/last.ckpt")
    return path


def tensors(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dictionaries and lists, with their place."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, f"{name}/{key}")


def assert_same(folder: Path, reference: Path) -> None:
    assert histories(folder) == histories(reference)
    expected, found = (torch.load(last_checkpoint(each), weights_only=True) for each in (reference, folder))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        one, other = dict(tensors(expected[part])), dict(tensors(found[part]))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
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


def sigint() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def killed(action: Callable[[], None]) -> bool:
    """Do something in a child of this process; whether it was killed with -9."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


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
        training.train(small(*overrides), training.ResumingCaller(resume))

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
        torture("training_step", 1, crash, RuntimeError),  # before the first checkpoint
        torture("training_step", 6, crash, RuntimeError),  # right after one
        torture("training_step", 9, crash, RuntimeError),
        torture("training_step", 20, crash, RuntimeError),  # first of an epoch
        torture("validation_step", 1, crash, RuntimeError),  # in an evaluation
        torture("training_step", 0, sigterm, SystemExit),
        torture("training_step", 11, sigterm, SystemExit),  # right before an evaluation
        torture("training_step", 19, sigterm, SystemExit),  # last of an epoch
        ("training_step", 27, sigterm, SystemExit),  # in the middle of an optimizer step
        torture("training_step", 59, sigterm, SystemExit),  # last of all
        torture("on_validation_epoch_end", 2, sigterm, SystemExit),
        torture("on_validation_epoch_end", 1, sigint, SystemExit),
        torture("on_save_checkpoint", 5, sigint, SystemExit),  # in the middle of writing last.ckpt
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
        torture(["trainer.max_steps=17", "trainer.checkpoint_every_steps=2"], 29),
        torture(["trainer.max_steps=25", "trainer.val_check_interval=1.0"], 41),  # resumed at the start of an epoch
        torture(["trainer.early_stopping_patience=1", "optimizer.lr=0"], 11),
        torture(["trainer.precision=bf16-mixed", "data.length_pool=3"], 33),
        # evaluations after 8 micro-batches, not after 6: no optimizer step is cut in two
        torture(["trainer.accumulate=4", "trainer.val_check_interval=6", "trainer.max_epochs=2"], 21),
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


@pytest.mark.torture
def test_the_last_steps_are_evaluated_and_that_is_resumed_exactly(
    start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations after 3 and 6 of 8 steps, and after the last, in which the process is interrupted."""
    start(tmp_path / "whole", "trainer.max_steps=8")
    assert [step for step, _ in histories(tmp_path / "whole")["dev/loss"]] == [3, 6, 8]
    with monkeypatch.context() as patch:
        interrupt(patch, "on_validation_epoch_end", 2, crash)
        with pytest.raises(RuntimeError):
            start(tmp_path / "run", "trainer.max_steps=8")
    start(tmp_path / "run", "trainer.max_steps=8", resume="auto")
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.torture
def test_a_stop_after_early_stopping_stays_stopped(
    start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies between the last evaluation and the end of the run."""
    overrides = ["trainer.early_stopping_patience=1", "optimizer.lr=0"]
    start(tmp_path / "whole", *overrides)
    with monkeypatch.context() as patch:
        patch.setattr(running.Training, "conclude", lambda *_: crash())
        with pytest.raises(RuntimeError):
            start(tmp_path / "run", *overrides)
    start(tmp_path / "run", *overrides, resume="auto")
    assert_same(tmp_path / "run", tmp_path / "whole")


FLAGS = ["--task", "WNLI", "--model", "tiny", "--data", "sample", *OVERRIDES]


def killed_at_step(folder: Path, call: int, *arguments: str, rank: int = 0) -> int:
    """Train in processes of their own; process ``rank`` kills itself at a call of training_step. The exit code."""
    code = f"""
import os, signal, sys
from lightning_glue import train
from lightning_glue.training import module
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


@pytest.mark.torture
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


@pytest.mark.torture
@pytest.mark.parametrize(
    ("number", "all_of_them", "code"), [(signal.SIGTERM, False, 143), torture(signal.SIGINT, True, 130)]
)
def test_a_signal_stops_two_processes_at_the_same_step(
    number: signal.Signals, all_of_them: bool, code: int, bpe_dir: Path, cache: Path, tmp_path: Path
) -> None:
    """A scheduler's, sent to process 0, and Ctrl-C, which the terminal sends to both."""
    arguments = [*FLAGS, "--procs", "2", "trainer.max_epochs=500", "trainer.accumulate=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_glue.train", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ROBERTA_BPE_DIR": str(bpe_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not process.stdout.readline().startswith("epoch 2"):
        assert process.poll() is None
    (os.killpg if all_of_them else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors.count(f"stopped by {number.name}") == 1
    assert "Traceback" not in errors
    step = torch.load(last_checkpoint(tmp_path), weights_only=True)["global_step"]
    assert f"saved at step {step}: " in errors
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
    differs = r"other data: split dev was sha256 000000000000, is sha256 [0-9a-f]{12} \(.*dev\.tsv\);"
    with pytest.raises(UserError, match=differs):
        training.train(small(), training.ResumingCaller(other))
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
    spy, scores = Deletions(monkeypatch), iter([0.2, 0.4, 0.3, 0.4, 0.6, 0.1, 0.6, 0.5, 0.7, 0.6])
    told = SimpleNamespace(compute=lambda *_: {"accuracy": next(scores)}, mean_loss=module.metrics.mean_loss)
    monkeypatch.setattr(module, "metrics", told)
    training.train(small("tracking.keep_best=3"))
    client, found = the_run(tmp_path)
    history = client.get_metric_history(found.info.run_id, "dev/accuracy")
    best = sorted(history, key=lambda point: (-point.value, point.step))[:3]
    assert [round(point.value, 3) for point in best] == [0.7, 0.6, 0.6]
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
    spy.assert_recorded_before()


class Deletions:
    """Writes down in what order checkpoints are said to be gone, the journal is on the disk, and they are gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        self._spy(monkeypatch, MLflowTracker, "evict_artifact", lambda _, path: ("said", Path(path).name))
        self._spy(monkeypatch, MLflowTracker, "save", lambda _: ("synced", ""))
        self._spy(monkeypatch, Path, "unlink", lambda path, **_: ("gone", path.name))

    def _spy(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, event: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            self.events.append(event(*args, **kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    def assert_recorded_before(self) -> None:
        """After a loss of power a file that is gone must be known to be: nothing finds out later."""
        deleted = [(i, name) for i, (what, name) in enumerate(self.events) if what == "gone" and "step-" in name]
        deleted = [(i, name) for i, name in deleted if name.endswith(".ckpt")]
        assert deleted
        for i, name in deleted:
            said = self.events.index(("said", name))
            assert ("synced", "") in self.events[said:i]


def test_a_signal_before_the_first_step_ends_the_run_and_says_that_nothing_is_kept(
    start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes in the middle of writing a file of the run."""
    original = MLflowTracker.log_text

    def log_text(self: MLflowTracker, text: str, path: str) -> None:
        sigint()
        original(self, text, path)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(MLflowTracker, "log_text", log_text)
        start(tmp_path / "run")
    _, found = the_run(tmp_path / "run")
    assert (stop.value.code, found.info.status) == (130, "KILLED")
    errors = capsys.readouterr().err
    assert "no checkpoint yet: " in errors and f"--resume {found.info.run_id}\n    starts over" in errors
    assert (Path(State(journals(tmp_path / "run" / "mlruns" / ".journal")[0]).artifact_uri) / "git.diff").exists()


def test_a_failure_that_cannot_be_written_down_is_a_failure(
    start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of artifacts cannot be written: neither can the traceback, but the status can."""

    def log_text(self: MLflowTracker, text: str, path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patch, pytest.raises(PermissionError, match=r"git\.diff"):
        patch.setattr(MLflowTracker, "log_text", log_text)
        start(tmp_path / "run")
    assert the_run(tmp_path / "run")[1].info.status == "FAILED"
    assert "the run's end could not be written in full: [Errno 13]" in capsys.readouterr().err


def interrupted(start: Callable[..., None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run that crashed after its first evaluation; its id."""
    with monkeypatch.context() as patch:
        interrupt(patch, "training_step", 9, crash)
        with pytest.raises(RuntimeError):
            start(folder)
    return the_run(folder)[1].info.run_id


@pytest.mark.torture
def test_a_moved_project_goes_on_where_it_is(
    reference: Path, start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = interrupted(start, tmp_path / "old", monkeypatch)
    (tmp_path / "old").rename(tmp_path / "new")
    start(tmp_path / "new", resume=run_id)
    assert_same(tmp_path / "new", reference)
    assert not (tmp_path / "old").exists()
    client, found = the_run(tmp_path / "new")
    assert found.info.artifact_uri.startswith(str(tmp_path / "new"))
    assert client.list_artifacts(run_id, "fairseq")


def test_what_is_gone_or_damaged_is_refused(
    start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = interrupted(start, tmp_path / "run", monkeypatch)
    last = last_checkpoint(tmp_path / "run")
    whole, best = last.read_bytes(), last.with_name("best.ckpt")
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2], whole[:-30]):
        last.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"run {run_id} cannot go on: .*restore that file, or .*{best}") as error:
            resuming.find(run_id, small())
        assert "\n" not in str(error.value)
    last.write_bytes(whole)
    weight = max(torch.load(last, weights_only=True)["state_dict"].values(), key=torch.numel)
    place = whole.find(weight.numpy().tobytes()) + weight.numel()
    last.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
    with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
        resuming.find("auto", small())
    last.unlink()
    for reference in (run_id, "auto"):
        with pytest.raises(UserError, match=rf"run \w+ cannot go on: its last checkpoint is gone, looked for .*{last}"):
            resuming.find(reference, small())
    last.write_bytes(whole)
    assert resuming.find("auto", small()).position == (0, 6)
    (tmp_path / "run" / "mlflow.db").unlink()
    with pytest.raises(UserError, match=rf"in the database {tmp_path / 'run' / 'mlflow.db'}, which is gone"):
        resuming.find(run_id, small())
    assert resuming.find("auto", small()) is None
    assert not (tmp_path / "run" / "mlflow.db").exists()


@pytest.mark.torture
def test_kills_around_every_evaluation_leave_each_kept_checkpoint_right(
    start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 before last.ckpt is written, and again before what is superfluous is deleted."""
    overrides = ["trainer.max_epochs=1", "trainer.accumulate=1", "trainer.val_check_interval=2", "tracking.keep_best=2"]
    values = {2: 0.5, 4: 0.7, 6: 0.6, 8: 0.65, 10: 0.8}

    def scripted(trainer: object, module: object) -> dict[str, float]:
        return {"dev/accuracy": values[trainer.global_step]}

    monkeypatch.setattr(callbacks, "dev_metrics", scripted)
    monkeypatch.setattr(checkpoints, "dev_metrics", scripted)

    def saved(folder: Path) -> dict[str, tuple[int, str]]:
        found = {}
        for path in last_checkpoint(folder).parent.glob("*.ckpt"):
            state = torch.load(path, weights_only=True)
            content = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(state["state_dict"].items()))
            found[path.name] = (state["global_step"], hashlib.sha256(content).hexdigest())
        return found

    for each in ("whole", "run"):
        (tmp_path / each).mkdir()
    assert not killed(lambda: start(tmp_path / "whole", *overrides))
    kills = 0
    original = checkpoints.Checkpoints.save_last
    for place in [*("before", "after")] * len(values):

        def save_last(self: checkpoints.Checkpoints, trainer: object, place: str = place) -> None:
            if place == "after":
                original(self, trainer)
            os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.Checkpoints, "save_last", save_last)
            kills += killed(lambda: start(tmp_path / "run", *overrides, resume="auto"))
    assert kills == 2 * len(values)
    assert not killed(lambda: start(tmp_path / "run", *overrides, resume="auto"))
    assert {name: step for name, (step, _) in saved(tmp_path / "whole").items()} == {
        "best.ckpt": 10,
        "step-4.ckpt": 4,
        "last.ckpt": 10,
    }
    assert saved(tmp_path / "run") == saved(tmp_path / "whole")


@pytest.mark.torture
def test_a_checkpoint_is_saved_every_few_minutes(
    start: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = iter(range(10**6))
    monkeypatch.setattr(
        checkpoints, "time", SimpleNamespace(monotonic=lambda: 60 * next(minutes))
    )  # one with every look
    overrides = ["trainer.max_epochs=1", "trainer.val_check_interval=1.0", "trainer.checkpoint_every_minutes=4"]
    saved: list[int] = []
    original = checkpoints.Checkpoints.save_last
    monkeypatch.setattr(
        checkpoints.Checkpoints,
        "save_last",
        lambda self, trainer: (saved.append(trainer.global_step), original(self, trainer)),
    )
    start(tmp_path / "run", *overrides)
    assert saved == [3, 7, 10]
    assert configuration.digest(small(*overrides)) == configuration.digest(small(*overrides[:2]))


@pytest.fixture
def store(tmp_path: Path, new_store: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    """An empty store in the current folder."""
    new_store(tmp_path)
    monkeypatch.chdir(tmp_path)
    return mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


def stored_run(client: mlflow.MlflowClient, files: dict[str, bytes]) -> str:
    """A run that came from another machine, with files among its checkpoints."""
    experiment = client.get_experiment_by_name("glue-wnli-sample")
    run = client.create_run(experiment.experiment_id if experiment else client.create_experiment("glue-wnli-sample"))
    for name, content in files.items():
        Path("upload").mkdir(exist_ok=True)
        (Path("upload") / name).write_bytes(content)
        client.log_artifact(run.info.run_id, f"upload/{name}", "checkpoints")
    client.set_terminated(run.info.run_id, "KILLED")
    return run.info.run_id


def manifest_of(name: str, content: bytes, file: str = "checkpoints/stored.ckpt") -> bytes:
    return json.dumps({name: {"file": file, "sha256": hashlib.sha256(content).hexdigest()}}).encode()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("{outside}/file.ckpt", "checkpoints/stored.ckpt"),
        ("../../../outside/file.ckpt", "checkpoints/stored.ckpt"),
        ("checkpoints/../../../outside/file.ckpt", "checkpoints/stored.ckpt"),
        ("checkpoints/last.ckpt\n", "checkpoints/stored.ckpt"),
        ("checkpoints/last.ckpt", "../stored.ckpt"),
        ("checkpoints/last.ckpt", "checkpoints"),
    ],
)
def test_a_manifest_writes_and_reads_nothing_but_checkpoints(
    name: str, file: str, store: mlflow.MlflowClient, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    content, name = b"owned", name.format(outside=tmp_path / "outside")
    run_id = stored_run(store, {"stored.ckpt": content, "manifest.json": manifest_of(name, content, file)})
    with pytest.raises(UserError, match="names no checkpoint of a run"):
        resuming.find(run_id, small())
    assert not list((tmp_path / "outside").iterdir())
    assert not list(Path("mlruns/.journal/.scratch").glob("*-*"))


@pytest.mark.parametrize("manifest", [b"", b"[1]", b'{"checkpoints/last.ckpt": 5}', b"[" * 10**5, b"\xff"])
def test_a_damaged_manifest_is_one_line(manifest: bytes, store: mlflow.MlflowClient) -> None:
    run_id = stored_run(store, {"manifest.json": manifest})
    with pytest.raises(UserError, match=r"checkpoints/manifest\.json is damaged"):
        resuming.find(run_id, small())


def test_a_checkpoint_from_elsewhere_that_was_changed_is_refused(store: mlflow.MlflowClient) -> None:
    manifest = manifest_of("checkpoints/last.ckpt", b"as it was written")
    run_id = stored_run(store, {"stored.ckpt": b"as it is now", "manifest.json": manifest})
    with pytest.raises(UserError, match=r"stored\.ckpt is damaged \(its SHA-256 is not that of the manifest\)"):
        resuming.find(run_id, small())


def test_a_run_from_elsewhere_is_resumed_under_its_own_id_and_leaves_nothing(store: mlflow.MlflowClient) -> None:
    """It began while the server was away: its checkpoints know the id of its journal alone."""
    record = {"run_id": "f" * 32, "config": {}}
    torch.save({checkpoints.RECORD: record, checkpoints.POSITION: [1, 4], "state_dict": {}}, "x.ckpt")
    content = Path("x.ckpt").read_bytes()
    files = {"stored.ckpt": content, "manifest.json": manifest_of("checkpoints/last.ckpt", content)}
    run_id = stored_run(store, files)
    dead = Path("mlruns/.journal/.scratch/dead")
    dead.mkdir(parents=True)
    (dead / "lock").touch()  # of a process that was killed
    temporary = set(Path("/tmp").glob("tmp*"))
    found = resuming.find(run_id, small())
    assert (found.run_id, found.position, found.path.name) == (run_id, (1, 4), "last.ckpt")
    assert found.path.is_relative_to("mlruns/.journal/.scratch")
    assert not dead.exists()
    assert not set(Path("/tmp").glob("tmp*")) - temporary
    (Path("upload") / "stored.ckpt").write_bytes(content[:-1] + b"x")
    store.log_artifact(run_id, "upload/stored.ckpt", "checkpoints")
    with pytest.raises(UserError, match="stored.ckpt is damaged"):
        resuming.find(run_id, small())


@pytest.mark.parametrize("files", [{}, {"last-0123.ckpt": b"x"}, {"manifest.json": b"{}"}])
def test_auto_passes_over_runs_that_never_had_a_checkpoint(
    files: dict[str, bytes],
    store: mlflow.MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever the server has of them: a job that restarts must not end in the same error for ever."""
    run_id = stored_run(store, files)
    monkeypatch.setattr(resuming, "unfinished_runs", lambda *_: [run_id])  # it is asked of servers alone
    assert resuming.find("auto", small()) is None
    assert f"--resume auto passes over a run: run {run_id} has no" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"run {run_id} has no"):
        resuming.find(run_id, small())


def test_no_password_of_an_address_is_kept_and_the_present_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_glue.train import check_arguments, parse_arguments

    uri = "http://ann:s3cret@mlflow.example"
    recorded = configuration.recorded(small(f"tracking.uri={uri}"))
    assert "s3cret" not in json.dumps(recorded)
    del recorded["trainer.checkpoint_every_minutes"]  # a run of an earlier version
    monkeypatch.setattr(sys, "argv", ["train", "--resume", "x"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    config = check_arguments(parse_arguments(), recorded)
    assert config.tracking.uri == uri
    assert configuration.digest(config) == configuration.digest(small())
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert check_arguments(parse_arguments(), recorded).tracking.uri is None
    plain = configuration.recorded(small("tracking.uri=http://mlflow.example"))
    assert check_arguments(parse_arguments(), plain).tracking.uri == "http://mlflow.example"
