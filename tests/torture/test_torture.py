"""Trainings that are killed, lose their power and run out of disk at random moments, and spoilt files: `make torture`.

Each ends as the training that nothing happened to, bit for bit, with every record in MLflow once. The moments follow
from a seed that is printed; ``TORTURE_SEED`` repeats one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import disks
from helpers.project import ROOT

from lightning_glue.data.download import extract_tar
from lightning_glue.data.tokenizer import read_dictionary
from lightning_glue.errors import UserError
from lightning_glue.tracking.journal import Journal, final_status
from lightning_glue.tracking.journals import journals
from lightning_glue.tracking.mirror import read_manifest
from lightning_glue.tracking.state import State
from lightning_glue.training.resume import read_checkpoint

pytestmark = pytest.mark.torture

KILLS = int(os.environ.get("TORTURE_KILLS", "20"))
SEED = int(os.environ["TORTURE_SEED"])  # see conftest.py
TRAIN = [
    *("-m", "lightning_glue.train", "--task", "WNLI", "--model", "tiny", "--data", "sample", "--gpus", "0"),
    *("data.batch_size=16", "trainer.max_epochs=3", "trainer.log_every=3", "tracking.system_metrics_seconds=1"),
]
SETUPS = {
    "plain": [],
    "best-three": ["tracking.keep_best=3", "trainer.val_check_interval=0.5", "trainer.checkpoint_every_steps=7"],
    "accumulated": ["trainer.accumulate=2", "trainer.checkpoint_every_steps=5", "trainer.val_check_interval=6"],
    "two-processes": ["--procs", "2", "trainer.checkpoint_every_steps=9"],
}
SPEEDS = ("train/examples_per_second", "train/tokens_per_second")


@pytest.fixture(autouse=True)
def _environment(bpe_dir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def moments(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of this test's own."""
    return random.Random(f"{SEED} {request.node.name}")


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with open(folder / "out", "ab") as out:
        return subprocess.Popen([sys.executable, *TRAIN, *arguments], cwd=folder, stdout=out, stderr=out)


def at_work(folder: Path) -> list[int]:
    """Processes of the program whose working directory is ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            here = entry.name.isdigit() and (entry / "cwd").resolve() == folder.resolve()
            if here and b"lightning_glue" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for_all(folder: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while left := at_work(folder):
        assert time.monotonic() < deadline, f"processes {left} did not end"
        time.sleep(0.3)


def kill_all(folder: Path) -> None:
    for process in at_work(folder):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def end_of(process: subprocess.Popen[bytes], folder: Path, seconds: float = 240) -> None:
    """Wait for a training that is to end well."""
    assert process.wait(timeout=seconds) == 0, (folder / "out").read_text()[-3000:]


def is_finished(folder: Path) -> bool:
    """Whether a training here has come to its end: ``--resume auto`` would then begin another."""
    records = [record for one in journals(folder / "mlruns/.journal") for record in Journal(one).read()]
    return final_status(records) == "FINISHED"


def go_on(folder: Path, setup: str) -> None:
    """To the end, unless it is there already, with everything delivered."""
    if not is_finished(folder):
        end_of(start(folder, *SETUPS[setup], "--resume", "auto"), folder)
    wait_for_all(folder)
    deliver(folder)


def deliver(folder: Path) -> None:
    """What ``make sync`` does."""
    command = [sys.executable, "-m", "lightning_glue.sync"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


class Reference:
    """The trainings that nothing happened to, made once for each set-up."""

    def __init__(self, folder: Path, new_store: Callable[[Path], None]) -> None:
        self.folder, self.new_store = folder, new_store
        self.seconds: dict[str, float] = {}

    def of(self, setup: str) -> Path:
        folder = self.folder / setup
        if setup not in self.seconds:
            folder.mkdir()
            self.new_store(folder)
            began = time.monotonic()
            end_of(start(folder, *SETUPS[setup]), folder)
            self.seconds[setup] = time.monotonic() - began
            wait_for_all(folder)
        return folder


@pytest.fixture(scope="module")
def references(
    tmp_path_factory: pytest.TempPathFactory, new_store: Callable[[Path], None], bpe_dir: Path, cache: Path
) -> Reference:
    os.environ["ROBERTA_BPE_DIR"] = str(bpe_dir)
    return Reference(tmp_path_factory.mktemp("whole"), new_store)


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / "mlflow.db") as database:
        return database.execute(query).fetchall()


def histories(folder: Path, run: str) -> list[tuple[Any, ...]]:
    """Metric, step and value of every point of a run but those of speed and of the machine."""
    found = rows(folder, f"select key, step, value, is_nan from metrics where run_uuid = '{run}' order by key, step")
    return [
        (key, step, None if key in SPEEDS else value, nan)
        for key, step, value, nan in found
        if not key.startswith("system/")
    ]


def unequal(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ."""
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and one.equal(other) else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: keys"]
        return [place for key in one for place in unequal(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{path}: length"]
        return [place for i, pair in enumerate(zip(one, other)) for place in unequal(*pair, f"{path}[{i}]")]
    return [] if one == other else [path]


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same(folder: Path, whole: Path) -> None:
    """One finished run with the checkpoints, the metrics, the model and the registration of the undisturbed one."""
    ((expected, _),) = rows(whole, "select run_uuid, status from runs")
    ((run, status),) = rows(folder, "select run_uuid, status from runs where status = 'FINISHED'")
    assert rows(folder, "select count(*) from runs") == [(1,)], status
    assert histories(folder, run) == histories(whole, expected)
    assert len(rows(folder, "select name, version from model_versions")) == 1
    theirs, ours = (path / f"mlruns/1/{name}/artifacts" for path, name in ((whole, expected), (folder, run)))
    names = sorted(path.name for path in (theirs / "checkpoints").glob("*.ckpt"))
    assert sorted(path.name for path in (ours / "checkpoints").glob("*.ckpt")) == names
    for name in names:
        one, other = load(theirs / "checkpoints" / name), load(ours / "checkpoints" / name)
        kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "position", "callbacks")
        assert not [place for key in kept if key in one for place in unequal(one[key], other[key], f"{name}:{key}")]
    manifest = json.loads((ours / "checkpoints/manifest.json").read_text())
    assert sorted(manifest) == [f"checkpoints/{name}" for name in names]
    for entry in manifest.values():
        assert hashlib.sha256((ours / entry["file"]).read_bytes()).hexdigest() == entry["sha256"]
    export = "fairseq/checkpoint_best.pt"
    assert not unequal(load(theirs / export)["model"], load(ours / export)["model"])


@pytest.mark.parametrize("setup", SETUPS)
def test_killed_again_and_again(
    setup: str, references: Reference, moments: random.Random, tmp_path: Path, new_store: Callable[[Path], None]
) -> None:
    """kill -9 of the training's first process; nobody else is left at work for long."""
    whole = references.of(setup)
    new_store(tmp_path)
    for _ in range(KILLS // len(SETUPS)):
        if is_finished(tmp_path):
            break
        process = start(tmp_path, *SETUPS[setup], "--resume", "auto")
        try:
            process.wait(timeout=moments.uniform(0.05, 1.0) * references.seconds[setup])
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    go_on(tmp_path, setup)
    assert_same(tmp_path, whole)


@pytest.mark.skipif(disks.refused() is not None, reason=disks.refused() or "")
@pytest.mark.parametrize("cut", range(4))
def test_the_power_fails(
    cut: int, references: Reference, moments: random.Random, tmp_path: Path, new_store: Callable[[Path], None]
) -> None:
    """What no fsync had brought to the disk is gone, in whatever order the kernel had written."""
    setup = list(SETUPS)[cut % 2]
    whole = references.of(setup)
    with disks.Disk(tmp_path, megabytes=400) as disk:
        new_store(disk.folder)
        disk.settle()
        process = start(disk.folder, *SETUPS[setup])
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moments.uniform(0.4, 1.0) * references.seconds[setup])
        disk.power_cut(lambda: kill_all(disk.folder))
        process.wait()
        go_on(disk.folder, setup)
        assert_same(disk.folder, whole)


@pytest.mark.skipif(disks.refused() is not None, reason=disks.refused() or "")
@pytest.mark.parametrize("fill", range(3))
def test_the_disk_fills_up(
    fill: int, references: Reference, moments: random.Random, tmp_path: Path, new_store: Callable[[Path], None]
) -> None:
    """The training ends with one line, or goes on where there is room; freed and resumed it is as if nothing was."""
    setup = list(SETUPS)[fill]
    whole = references.of(setup)
    with disks.Disk(tmp_path, megabytes=400) as disk:
        new_store(disk.folder)
        process = start(disk.folder, *SETUPS[setup])
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moments.uniform(0.1, 0.9) * references.seconds[setup])
        disk.fill(left=moments.choice([0, 4096, 65536, 1 << 20]))
        process.wait(timeout=240)
        assert "Traceback" not in (disk.folder / "out").read_text()
        disk.free()
        wait_for_all(disk.folder)
        go_on(disk.folder, setup)
        assert_same(disk.folder, whole)


def test_the_watcher_is_killed_all_the_time(
    references: Reference, moments: random.Random, tmp_path: Path, new_store: Callable[[Path], None]
) -> None:
    whole = references.of("plain")
    new_store(tmp_path)
    process = start(tmp_path)
    while process.poll() is None:
        time.sleep(moments.uniform(0.5, 2.5))
        for other in at_work(tmp_path):
            try:
                if (
                    other != process.pid
                    and b"lightning_glue.tracking.watcher" in Path(f"/proc/{other}/cmdline").read_bytes()
                ):
                    os.kill(other, signal.SIGKILL)
            except (OSError, ProcessLookupError):
                continue
    end_of(process, tmp_path)
    go_on(tmp_path, "plain")
    assert_same(tmp_path, whole)


HOSTILE = int(os.environ.get("TORTURE_FILES", "300"))


def spoilt(whole: bytes, moments: random.Random) -> bytes:
    """A file with a few bytes changed, cut off, doubled or taken out."""
    data = bytearray(whole)
    for _ in range(moments.randint(1, 4)):
        place = moments.randrange(len(data) or 1)
        match moments.randrange(4):
            case 0 if data:
                data[place] = moments.randrange(256)
            case 1:
                del data[place:]
            case 2:
                data[place:place] = data[place : place + moments.randrange(64)]
            case _:
                del data[place : place + moments.randrange(64)]
    return bytes(data)


@pytest.mark.parametrize("kind", ["checkpoint", "dictionary", "archive", "journal", "state", "manifest"])
def test_spoilt_files_are_read_or_refused_in_one_line(
    kind: str, references: Reference, moments: random.Random, tmp_path: Path
) -> None:
    """Of a training, each with random damage; what is read never leads out of its folder."""
    folder = references.of("plain")
    (artifacts,) = folder.glob("mlruns/1/*/artifacts")
    (journal,) = folder.glob("mlruns/.journal/*")
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        archive.add(artifacts / "fairseq/input0/dict.txt", "model/dict.txt")
    name, read = {
        "checkpoint": (artifacts / "checkpoints/last.ckpt", read_checkpoint),
        "dictionary": (artifacts / "fairseq/input0/dict.txt", read_dictionary),
        "archive": (tmp_path / "model.tar.gz", lambda path: extract_tar(path, path.parent / "out", ["dict.txt"])),
        "journal": (journal / "records", lambda path: Journal(path.parent).read()),
        "state": (journal / "delivery.json", lambda path: State(path.parent).save()),
        "manifest": (artifacts / "checkpoints/manifest.json", read_manifest),
    }[kind]
    whole = name.read_bytes()
    for number in range(HOSTILE):
        place = tmp_path / "files" / f"{number}"
        place.mkdir(parents=True)
        (place / name.name).write_bytes(spoilt(whole, moments))
        try:
            read(place / name.name)
        except UserError as error:
            assert "\n" not in str(error)
        assert {path.name for path in (tmp_path / "files").iterdir()} == {str(number)}
        shutil.rmtree(place)


def test_what_is_left_of_a_training_is_no_rubbish(references: Reference) -> None:
    """Temporary files, parts and locks of an undisturbed training."""
    folder = references.of("plain")
    left = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith((".part", ".tmp"))]
    assert not left
    shutil.rmtree(folder / "mlruns/.journal")  # all that it was for is delivered
    deliver(folder)
