"""Trainings in real processes against faults: servers, disks and processes that fail in the middle."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from helpers.postgres import Postgres
from helpers.project import ROOT, run
from helpers.servers import MlflowServer

from lightning_glue.tracking.journal import Journal
from lightning_glue.tracking.journals import journals
from lightning_glue.tracking.state import State

KILLS = int(os.environ.get("LIGHTNING_GLUE_KILLS", "3"))  # 20: the full version, about ten minutes
FLAGS = [
    *("--task", "WNLI", "--model", "tiny", "--data", "sample", "--gpus", "0"),
    *("data.batch_size=32", "trainer.log_every=1", "tracking.system_metrics_seconds=null"),
]


@pytest.fixture(autouse=True)
def _environment(bpe_dir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def start(folder: Path, *arguments: str, hook: str = "", launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A training; ``hook`` is Python run at the start of every training step, with ``step`` and ``module``."""
    folder.mkdir(exist_ok=True)
    (folder / "hooked.py").write_text(f"""
import os, resource, signal, sys
from lightning_glue import train
from lightning_glue.training import module
from lightning_glue.utils.console import run_main
original = module.GlueModule.training_step
def hooked(self, *arguments):
    step, rank = self.global_step, self.global_rank
    {hook or "pass"}
    return original(self, *arguments)
module.GlueModule.training_step = hooked
run_main(train.main)
""")
    program = ["hooked.py"] if hook else ["-m", "lightning_glue.train"]
    command = [sys.executable, *launcher, *program, *FLAGS, *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def the_run(uri: str) -> tuple[mlflow.MlflowClient, mlflow.entities.Run]:
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("glue-wnli-sample").experiment_id])
    return client, found


def database(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def histories(uri: str) -> dict[str, list[tuple[int, float | None]]]:
    """Every metric's (step, value) as the server has them; values of speed left out."""
    client, found = the_run(uri)
    return {
        name: [(m.step, None if "per_second" in name else m.value) for m in history]
        for name in found.data.metrics
        if (history := client.get_metric_history(found.info.run_id, name))
    }


def wait_for_status(uri: str, *statuses: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while the_run(uri)[1].info.status not in statuses:
        assert time.monotonic() < deadline, the_run(uri)[1].info.status
        time.sleep(0.2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, bpe_dir: Path, cache: Path) -> Path:
    """An uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    run("lightning_glue.train", *FLAGS, "trainer.max_epochs=12", cwd=folder, ROBERTA_BPE_DIR=str(bpe_dir))
    return folder


@pytest.mark.torture
def test_random_kills_leave_no_trace_in_the_history(whole: Path, tmp_path: Path) -> None:
    """kill -9 at random moments, each time resumed: record by record the history of the uninterrupted training."""
    reference, folder = whole, tmp_path / "run"
    (journal,) = journals(reference / "mlruns" / ".journal")
    stretch = len(Journal(journal).read()) // KILLS
    chance = random.Random(KILLS)
    kills, flags = 0, ["trainer.max_epochs=12", "trainer.checkpoint_every_steps=7", "--resume", "auto"]
    while True:
        process = start(folder, *flags)
        goal = _records(folder) + chance.randint(0, stretch)
        while kills < KILLS and process.poll() is None and _records(folder) < goal:
            time.sleep(0.005)
        if kills < KILLS and process.poll() is None:
            time.sleep(chance.uniform(0, 0.2))
            process.kill()
            kills += 1
        _, errors = process.communicate(timeout=200)
        if process.returncode != -signal.SIGKILL:
            break
    assert process.returncode == 0, errors
    assert kills >= KILLS // 2
    assert histories(database(folder)) == histories(database(reference))
    assert the_run(database(folder))[1].info.status == "FINISHED"


def _records(folder: Path) -> int:
    return sum(len(Journal(one).read()) for one in journals(folder / "mlruns" / ".journal"))


@pytest.mark.torture
def test_a_server_killed_three_times_has_everything(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    server.start()
    hook = "import time; time.sleep(0.2)"  # long enough for a server to come back
    process = start(tmp_path / "run", "trainer.max_epochs=12", f"tracking.uri={server.uri}", hook=hook)
    try:
        (folder,) = _wait_for_journals(tmp_path / "run")
        for _ in range(3):
            _wait_for_growth(Journal(folder), 4)
            server.kill()
            _wait_until(lambda: State(folder).error is not None, "nobody notices that the server is away")
            _wait_for_growth(Journal(folder), 12)  # more than two seconds, after which a training looks how it is
            server.start()
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert errors.count("does not answer") == 1  # one warning
        run("lightning_glue.sync", cwd=tmp_path / "run")
        wait_for_status(server.uri, "FINISHED")
        assert histories(server.uri) == histories(database(whole))
    finally:
        process.kill()
        server.kill()


def _wait_for_journals(folder: Path) -> list[Path]:
    for _ in range(600):
        if found := journals(folder / "mlruns" / ".journal"):
            return found
        time.sleep(0.1)
    pytest.fail("no journal appeared")


def _wait_for_growth(journal: Journal, records: int) -> None:
    """Wait until training has logged so much more, server or not."""
    goal = len(journal.read()) + records
    _wait_until(lambda: len(journal.read()) >= goal, "the training does not go on")


def _wait_until(true: Callable[[], bool], else_: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, else_
        time.sleep(0.1)


@pytest.mark.torture
def test_a_server_that_never_comes_back_costs_nothing(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    process = start(tmp_path / "run", "trainer.max_epochs=12", f"tracking.uri={server.uri}")
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "best evaluation" in output
    server.start()
    try:
        run("lightning_glue.sync", cwd=tmp_path / "run")
        assert the_run(server.uri)[1].info.status == "FINISHED"
        assert histories(server.uri) == histories(database(whole))
        again = run("lightning_glue.sync", cwd=tmp_path / "run")
        assert again.stdout == "1 of 1 journals delivered in full\n"
    finally:
        server.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root; test_journal.py fills a file up to a limit instead")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.torture
def test_a_full_disk_is_a_clear_error_and_a_resumable_run(whole: Path, small_disk: Path, tmp_path: Path) -> None:
    (small_disk / "ballast").write_bytes(b"x" * 88_000)
    flags = ["trainer.max_epochs=12", f"tracking.journal={small_disk / 'journal'}"]
    process = start(tmp_path / "run", *flags)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert f"cannot write the journal {small_disk / 'journal'}" in errors
    assert "No space left on device; nothing before is lost: free space, then --resume" in errors
    (small_disk / "ballast").unlink()
    process = start(tmp_path / "run", *flags, "--resume", "auto")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert histories(database(tmp_path / "run")) == histories(database(whole))
    assert the_run(database(tmp_path / "run"))[1].info.status == "FINISHED"


@pytest.mark.torture
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("way", ["raise ValueError('no such luck')", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_end_of_any_process_ends_all_and_marks_the_run(rank: int, way: str, tmp_path: Path) -> None:
    hook = f"if (step, rank) == (5, {rank}): open('end', 'w').close(); {way}"
    process = start(tmp_path / "run", "--procs", "2", hook=hook)
    _, errors = process.communicate(timeout=200)  # the pipes close when the last process has ended
    assert time.time() - (tmp_path / "run" / "end").stat().st_mtime < 30
    assert process.returncode != 0
    status = "KILLED" if (rank, way[:2]) == (0, "os") else "FAILED"
    wait_for_status(database(tmp_path / "run"), status)
    texts = [path.read_text() for path in (tmp_path / "run").rglob("traceback*.txt")]
    assert any("no such luck" in text for text in texts) == ("luck" in way), errors
    assert process.returncode == -signal.SIGKILL or status == "FAILED"


@pytest.mark.torture
def test_under_torchrun_all_processes_resume_the_same_run(whole: Path, tmp_path: Path) -> None:
    flags = ["trainer.max_epochs=3", "trainer.checkpoint_every_steps=4", "--resume", "auto"]
    hook = "if (step, rank) == (10, 0): os.kill(os.getpid(), signal.SIGKILL)"
    process = start(tmp_path / "run", *flags, hook=hook, launcher=TORCHRUN)
    process.communicate(timeout=200)
    assert process.returncode != 0
    wait_for_status(database(tmp_path / "run"), "KILLED", "FAILED")  # whether process 1 saw it before it was stopped
    process = start(tmp_path / "run", *flags, launcher=TORCHRUN)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert the_run(database(tmp_path / "run"))[1].info.status == "FINISHED"  # one run, not two
    process = start(tmp_path / "reference", "trainer.max_epochs=3", launcher=TORCHRUN)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert histories(database(tmp_path / "run")) == histories(database(tmp_path / "reference"))


@pytest.mark.torture
def test_under_torchrun_the_crash_of_another_process_is_on_the_run(tmp_path: Path) -> None:
    hook = "if (step, rank) == (5, 1): raise ValueError('no such luck')"
    process = start(tmp_path / "run", hook=hook, launcher=TORCHRUN)
    process.communicate(timeout=200)
    assert process.returncode != 0
    wait_for_status(database(tmp_path / "run"), "FAILED")
    (text,) = (path.read_text() for path in (tmp_path / "run").rglob("traceback-1.txt"))
    assert "no such luck" in text


@pytest.mark.torture
def test_under_torchrun_a_mistake_is_the_same_line_in_every_process(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "--resume", "0" * 32, launcher=TORCHRUN)
    _, errors = process.communicate(timeout=200)
    assert process.returncode != 0
    assert errors.count(f"error: run {'0' * 32}: no checkpoint to be had") == 2


@pytest.mark.torture
def test_a_database_restarted_under_the_server_loses_nothing(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    database_server = Postgres()
    server = MlflowServer(tmp_path / "server", database_server.new_database("mlflow").replace("://", "+psycopg://", 1))
    try:
        server.start()
        hook = "import time; time.sleep(0.2)"
        process = start(tmp_path / "run", "trainer.max_epochs=12", f"tracking.uri={server.uri}", hook=hook)
        (folder,) = _wait_for_journals(tmp_path / "run")
        for _ in range(2):
            _wait_for_growth(Journal(folder), 6)
            database_server.stop()
            _wait_for_growth(Journal(folder), 12)
            database_server.start()
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        run("lightning_glue.sync", cwd=tmp_path / "run")
        wait_for_status(server.uri, "FINISHED")
        assert histories(server.uri) == histories(database(whole))
    finally:
        server.kill()
        database_server.remove()
