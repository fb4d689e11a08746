"""How a machine is shared out among trials."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.project import ROOT

from lightning_glue.execution.executor import stop
from lightning_glue.execution.local import Group
from lightning_glue.execution.place import Division, Place, places
from lightning_glue.tuning.controller import scratch_folder, study_folder


def layout(**given: int | None) -> list[tuple[int, ...]]:
    return [place.gpus for place in places(Division(**given))]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [()]),
        ({"workers": 3}, [(), (), ()]),
        ({"gpus": 4}, [(0,), (1,), (2,), (3,)]),
        ({"gpus": 4, "workers": 2}, [(0,), (1,)]),
        ({"gpus": 4, "gpus_per_trial": 2}, [(0, 1), (2, 3)]),
        ({"gpus": 5, "gpus_per_trial": 2}, [(0, 1), (2, 3)]),
        ({"gpus": 2, "trials_per_gpu": 2}, [(0,), (1,), (0,), (1,)]),
    ],
)
def test_gpus_are_shared_out(given: dict[str, int], expected: list[tuple[int, ...]]) -> None:
    assert layout(**given) == expected


def test_processes_of_all_trials_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    shared = places(Division(workers=2, procs=2))
    assert [(place.processes, place.threads) for place in shared] == [(2, max(1, cores // 4))] * 2


def test_a_trial_sees_its_own_gpus_of_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(Place(0, 2, (1, 3), 1), "helpers.cheap:objective", Path("log"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert group._environment(1, 4242)["CUDA_VISIBLE_DEVICES"] == "1,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    variables = group._environment(1, 4242)
    assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-d"
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["MASTER_PORT"]) == ("1", "2", "4242")


STUBBORN = """
import os, signal, sys, time
def deaf(number, frame):
    print("signalled", time.monotonic(), flush=True)
signal.signal(signal.SIGTERM, deaf)
print("ready", flush=True)
if "CLOSE" in os.environ:
    os.closerange(3, 64)
while True:
    time.sleep(60)
"""


@pytest.fixture
def stubborn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Group]:
    """Starts groups of processes that do not end by themselves."""
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")

    def start(number: int, cores: tuple[int, ...] = ()) -> Group:
        group = Group(Place(number, 1, (), 1, cores), "stubborn:objective", tmp_path / f"log{number}")
        group.start()
        return group

    return start


def wait_until_ready(group: Group) -> None:
    while "ready" not in group.last_words():
        assert group.processes[0].poll() is None, group.last_words()
        time.sleep(0.05)


def test_all_groups_are_signalled_at_once_and_killed_after_one_grace(stubborn: Callable[[int], Group]) -> None:
    groups = [stubborn(number) for number in range(3)]
    selector = selectors.DefaultSelector()
    for group in groups:
        group.register(selector)
        wait_until_ready(group)
    processes = [process for group in groups for process in group.processes]
    grace = 3.0
    stop(groups, selector, grace)
    assert [process.returncode for process in processes] == [-9] * 3
    assert not selector.get_map()
    signalled = [float(group.last_words().split("signalled ")[1]) for group in groups]
    assert max(signalled) - min(signalled) < grace  # the last did not wait for the first one's end


def test_a_group_stays_on_the_cores_of_its_place(stubborn: Callable[..., Group]) -> None:
    core = max(os.sched_getaffinity(0))
    group = stubborn(0, (core,))
    wait_until_ready(group)
    assert os.sched_getaffinity(group.processes[0].pid) == {core}
    group.close(selectors.DefaultSelector())


def test_waiting_for_a_process_that_has_closed_its_channel_costs_nothing(
    stubborn: Callable[[int], Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSE", "1")
    group = stubborn(0)
    selector = selectors.DefaultSelector()
    group.register(selector)
    wait_until_ready(group)
    before = time.process_time()
    stop([group], selector, grace=1.5)
    assert time.process_time() - before < 0.75


@pytest.mark.parametrize("name", ["a/b", "a_b", "a b", "..", ".", "", "/etc", "x" * 300, "ü" * 300, "a\nb"])
def test_a_study_has_a_folder_of_its_own_whatever_its_name(name: str, tmp_path: Path) -> None:
    folder = study_folder(name, "0" * 32)
    assert folder.parent == Path("mlruns/.tune") and folder.name not in (".", "..")
    assert folder != study_folder(name, "1" * 32)
    (tmp_path / scratch_folder(folder, 12345, 99)).mkdir(parents=True)
    assert [path.name for path in (tmp_path / "mlruns").iterdir()] == [".tune"]
