"""How a machine is shared out among trials."""

from __future__ import annotations

import os
import selectors
from pathlib import Path

import pytest

from lightning_glue.workers import Group, Place, places


def layout(**given: int | None) -> list[tuple[int, ...]]:
    usual = {"workers": None, "gpus": 0, "gpus_per_trial": 1, "trials_per_gpu": 1, "procs": 1}
    return [place.gpus for place in places(**(usual | given))]


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
    shared = places(workers=2, gpus=0, gpus_per_trial=1, trials_per_gpu=1, procs=2)
    assert [(place.processes, place.threads) for place in shared] == [(2, max(1, cores // 4))] * 2


def test_a_trial_sees_its_own_gpus_of_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(Place(0, 2, (1, 3), 1), "cheap:objective", Path("log"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert group._environment(1, 4242)["CUDA_VISIBLE_DEVICES"] == "1,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    variables = group._environment(1, 4242)
    assert variables["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-d"
    assert (variables["RANK"], variables["WORLD_SIZE"], variables["MASTER_PORT"]) == ("1", "2", "4242")


def test_stopping_a_group_ends_processes_that_do_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[1]}:{Path(__file__).parent}")
    group = Group(Place(0, 1, (), 1), "stubborn:objective", tmp_path / "log")
    (tmp_path / "stubborn.py").write_text(
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{tmp_path}")
    selector = selectors.DefaultSelector()
    group.start()
    group.register(selector)
    (process,) = group.processes
    while "deaf" not in group.last_words():
        assert process.poll() is None, group.last_words()
    group.stop(selector, grace=0.5)
    assert process.returncode == -9
    assert not selector.get_map()
