"""What names a process, and processes that end with their parent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers.project import ROOT, torture
from helpers.servers import free_port

from lightning_glue.utils.processes import PARENT, process_identity, process_is_gone

IDENTITY = "from lightning_glue.utils.processes import process_identity; print(process_identity(), flush=True); input()"


def start(*before: str) -> tuple[subprocess.Popen[str], str]:
    """A process that says its identity and waits."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", IDENTITY],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return process, process.stdout.readline().strip()


def test_a_process_is_gone_once_it_has_ended_whether_or_not_anybody_waited_for_it() -> None:
    process, identity = start()
    assert not process_is_gone(identity)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process_is_gone(identity)
    process.communicate()
    assert process_is_gone(identity)
    assert not process_is_gone(process_identity())


def test_a_pid_used_again_is_another_process() -> None:
    own = process_identity()
    *place, start = own.split(" ")
    assert process_is_gone(" ".join([*place, str(int(start) - 1)]))
    assert not process_is_gone(own)


@pytest.mark.parametrize("field", range(3))
def test_nothing_is_certain_about_another_machine_or_namespace(field: int) -> None:
    process, identity = start()
    process.communicate("\n")
    fields = identity.split(" ")
    assert process_is_gone(identity)
    assert not process_is_gone(" ".join([*fields[:field], "other", *fields[field + 1 :]]))


@pytest.mark.parametrize(
    "identity", ["", "-", "host 17", "host 17 1700000000", "a b c d e", "host - - 999999 1", "host - - -1 -", "\n"]
)
def test_nothing_is_certain_about_what_names_no_process(identity: str) -> None:
    assert not process_is_gone(identity)


@pytest.mark.parametrize("proc", [["--mount-proc"], []])
def test_a_process_in_another_pid_namespace_of_this_host_is_not_taken_for_dead(proc: list[str]) -> None:
    unshare = ["unshare", "--pid", "--fork", *proc]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("a PID namespace of its own needs unshare and root")
    process, identity = start(*unshare)
    host, boot, namespace, pid, _ = identity.split(" ")
    own = process_identity().split(" ")
    assert [host, boot] == own[:2] and namespace != own[2] and pid == "1"
    assert not process_is_gone(identity)
    code = f"from lightning_glue.utils.processes import *; print(process_is_gone({process_identity()!r}), "
    code += "process_is_gone(process_identity()))"
    inside = subprocess.run([*unshare, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert inside.stdout == "False False\n"
    process.communicate("\n")
    assert not process_is_gone(identity)  # nobody here can tell


def ended(pid: int, seconds: float = 20) -> bool:
    """Whether a process, which may be somebody else's child by now, ends in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


CHILD = "import {first}, time; print('there', flush=True); time.sleep(60)"
STARTER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}], env={{**os.environ, {name!r}: str(os.getpid())}})
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_dies_with_the_parent_that_asked_for_it() -> None:
    code = STARTER.format(child=CHILD.format(first="lightning_glue"), name=PARENT)
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == "there\n"
    parent.kill()
    assert ended(child)
    parent.communicate()


def test_a_child_whose_parent_died_before_it_could_ask_the_kernel_ends_at_once() -> None:
    process = subprocess.run(
        [sys.executable, "-c", CHILD.format(first="lightning_glue")],
        cwd=ROOT, env={**os.environ, PARENT: str(2**22 + 1)}, capture_output=True, timeout=30,
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (-signal.SIGKILL, b"")


def test_a_command_that_became_one_gets_sigterm_when_its_parent_dies() -> None:
    orderly = "import signal, sys, time\n"
    orderly += "signal.signal(signal.SIGTERM, lambda *_: (print('in order', flush=True), sys.exit()))\n"
    orderly += "print('there', flush=True)\ntime.sleep(60)\n"
    code = "import os, subprocess, sys, time\n"
    code += "start = [sys.executable, '-m', 'lightning_glue.utils.processes', str(os.getpid())]\n"
    code += f"subprocess.Popen([*start, sys.executable, '-c', {orderly!r}])\ntime.sleep(60)\n"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "there\n"
    parent.kill()
    assert parent.communicate(timeout=20)[0] == "in order\n"


def wait_for(ready: Callable[[], object], process: subprocess.Popen[bytes]):
    """What ``ready`` gives once it is something; the process must live until then."""
    deadline = time.monotonic() + 120
    while not (found := ready()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return found


def offspring(process: subprocess.Popen[bytes], word: str) -> list[psutil.Process]:
    """Processes below one, with ``word`` in their command line; watchers, which outlive their training, left out."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if word in command and "lightning_glue.tracking.watcher" not in command:
            found.append(child)
    return found


def run_module(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=folder, start_new_session=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment},
    )  # fmt: skip


TRAIN = ["lightning_glue.train", "--task", "WNLI", "--data", "sample", "--model", "tiny", "--gpus", "0"]


def test_a_rank_that_still_imports_ends_with_rank_0(bpe_dir: Path, cache: Path, tmp_path: Path) -> None:
    leader = run_module(tmp_path, *TRAIN, "--procs", "2", ROBERTA_BPE_DIR=str(bpe_dir))
    (other,) = wait_for(lambda: offspring(leader, "lightning_glue.train"), leader)
    leader.kill()
    leader.wait()
    assert ended(other.pid)


@pytest.mark.torture
def test_ranks_end_with_torchrun(bpe_dir: Path, cache: Path, tmp_path: Path) -> None:
    command = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", *TRAIN]
    torchrun = run_module(tmp_path, *command, "trainer.max_epochs=2000", ROBERTA_BPE_DIR=str(bpe_dir))
    wait_for(lambda: list(tmp_path.glob("mlruns/.journal/*/records")), torchrun)
    ranks = offspring(torchrun, "lightning_glue.train")
    torchrun.kill()
    torchrun.wait()
    assert len(ranks) == 2
    assert all(ended(rank.pid, 60) for rank in ranks)  # in order: they save a checkpoint


def test_workers_that_still_import_end_with_the_controller(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    controller = run_module(tmp_path, "helpers.control", storage, "orphans", "4", "objective", CHEAP_SECONDS="30")
    workers = wait_for(lambda: offspring(controller, "lightning_glue.execution.worker"), controller)
    controller.kill()
    controller.wait()
    assert all(ended(worker.pid) for worker in workers)


@pytest.mark.parametrize("killed", [torture("itself"), torture("mlflow server"), torture("uvicorn")])
def test_nothing_of_a_server_is_left_whichever_of_its_processes_dies(
    killed: str, tmp_path: Path, new_store: Callable[[Path], None]
) -> None:
    new_store(tmp_path)
    port = free_port()
    server = run_module(tmp_path, "lightning_glue.server", "--port", str(port), "--workers", "2")

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200
        except OSError:
            return False

    wait_for(answers, server)
    everyone = offspring(server, "")
    victim = server.pid if killed == "itself" else offspring(server, killed)[0].pid
    os.kill(victim, signal.SIGKILL)
    assert len(everyone) >= 4  # MLflow, uvicorn, two workers
    assert all(ended(one.pid, 60) for one in everyone)
    assert server.wait(timeout=60) != 0
