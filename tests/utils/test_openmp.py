"""OpenMP's threads spin where cores are free, and sleep beside others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_glue.utils import openmp

LOOKING = """
import os, time
{given}
import lightning_glue
time.sleep({seconds})
from lightning_glue.utils.quick_imports import quick_imports
with quick_imports():
    pass
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""
BUSY = "import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"


def look(given: str = "", seconds: float = 0.3) -> str:
    """What a process has told OpenMP once it imports torch."""
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    command = [sys.executable, "-c", LOOKING.format(given=given, seconds=seconds)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_threads_sleep_beside_a_program_that_has_their_core() -> None:
    core = max(os.sched_getaffinity(0))
    busy = subprocess.Popen([sys.executable, "-c", BUSY.format(core=core)])
    try:
        assert look(f"os.sched_setaffinity(0, {{{core}}})") == "PASSIVE 00"
    finally:
        busy.kill()
        busy.wait()


def test_nothing_is_known_of_others_in_a_moment() -> None:
    assert look(seconds=0) == "PASSIVE 00"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("os.environ['OMP_WAIT_POLICY'] = 'ACTIVE'", "ACTIVE None"),
        ("os.environ['GOMP_SPINCOUNT'] = '77'", "None 77"),
        ("os.environ['GOMP_SPINCOUNT'] = '0'", "None 0"),
    ],
)
def test_what_the_user_says_stays(given: str, kept: str) -> None:
    assert look(given) == kept


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have had next to nothing since long ago, and torch is not there yet."""
    begun = openmp._look()
    assert begun
    monkeypatch.setattr(openmp, "_BEGINNING", (time.monotonic() - 1e6, begun[1]))
    monkeypatch.setattr(openmp, "_limited", lambda cores: False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "00")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def spins() -> int:
    openmp.spin_where_cores_are_free()
    return int(os.environ["GOMP_SPINCOUNT"])


@pytest.mark.usefixtures("free")
def test_threads_spin_where_cores_are_free() -> None:
    assert spins() > 0


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(("more", "spinning"), [(0, True), (1, False)])
def test_as_many_cores_must_be_free_as_there_are_threads(
    more: int, spinning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)) + more))
    assert (spins() > 0) == spinning


@pytest.mark.usefixtures("free")
def test_threads_sleep_where_a_container_has_less_time_than_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_limited", lambda cores: True)
    assert spins() == 0


@pytest.mark.parametrize(("quota", "limited"), [("150000", True), ("200000", False), ("max", False), ("-1", False)])
@pytest.mark.parametrize("version", [1, 2])
def test_what_a_control_group_may_use(
    version: int, quota: str, limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openmp, "_GROUPS", tmp_path)
    monkeypatch.setattr(openmp, "_own_group", lambda: tmp_path / "user.slice" / "session.scope")
    if version == 2 and quota != "-1":
        (tmp_path / "user.slice" / "session.scope").mkdir(parents=True)
        (tmp_path / "user.slice" / "session.scope" / "cpu.max").write_text("max 100000\n")
        (tmp_path / "user.slice" / "cpu.max").write_text(f"{quota} 100000\n")
    elif quota != "max":
        (tmp_path / "cpu").mkdir()
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert openmp._limited(2) == limited


@pytest.mark.usefixtures("free")
def test_it_is_too_late_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert spins() == 0


def test_processor_time_of_this_process_is_not_that_of_others() -> None:
    cores = os.sched_getaffinity(0)
    first = openmp._look()
    spent = time.process_time()
    while time.process_time() - spent < 0.5:
        pass
    second = openmp._look()
    assert first and second
    busy, others = openmp._busy_seconds(), second[1] - first[1]
    assert busy and others < (second[0] - first[0]) * len(cores) - 0.4
