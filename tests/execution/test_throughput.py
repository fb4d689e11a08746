"""How many trainings at a time: measured with real worker processes whose trainings only say how fast they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers.project import ROOT

from lightning_glue import config as configuration
from lightning_glue.errors import UserError
from lightning_glue.execution.job import Job
from lightning_glue.execution.place import Division, memory_nodes, places
from lightning_glue.execution.throughput import Throughput, best, candidates, shared_out
from lightning_glue.execution.throughput_job import measure


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")


@pytest.mark.parametrize(
    ("rates", "chosen", "said"),
    [
        ({"4": 10, "2": 6, "1": 5}, 4, ["1 at a time: 10.0 examples/s", "2 at a time: 12.0 examples/s",
                                       "4 at a time: 20.0 examples/s"]),
        ({"4": 10, "2": 5.2, "1": 2.6}, 1, ["1 at a time: 10.0 examples/s", "2 at a time: 10.4 examples/s",
                                           "4 at a time: 10.4 examples/s"]),
        ({"4": 10, "2": 0, "1": 9}, 1, ["1 at a time: 10.0 examples/s", "2 at a time: no room"]),
    ],
)  # fmt: skip
def test_the_number_that_does_most_is_taken_and_more_than_it_only_where_it_is_worth_it(
    rates: dict[str, Any], chosen: int, said: list[str], tmp_path: Path
) -> None:
    how, found = shared_out(Division(), {"rates": rates}, tmp_path, objective="helpers.cheap:rate")
    assert (how.workers, [str(one) for one in found]) == (chosen, said)


def test_a_mistake_ends_the_measurement(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model"):
        shared_out(Division(), {"rates": {"4": "mistake"}}, tmp_path, objective="helpers.cheap:rate")


def test_what_is_tried() -> None:
    assert [one.workers for one in candidates(Division())] == [1, 2, 4]
    assert [one.workers for one in candidates(Division(procs=2))] == [1, 2]
    assert [one.workers for one in candidates(Division(), most=3)] == [1, 2]
    on_gpus = candidates(Division(workers=9, gpus=8, gpus_per_trial=2))
    assert [(one.gpus, one.workers, one.trials_per_gpu) for one in on_gpus] == [
        (2, None, 1),
        (2, None, 2),
        (2, None, 4),
    ]


def test_the_best_is_not_more_than_it_must_be() -> None:
    assert best([Throughput(1, None)]) == 1
    assert best([Throughput(1, 100.0), Throughput(2, 104.0), Throughput(4, 106.0)]) == 4
    assert best([Throughput(1, 100.0), Throughput(2, 150.0), Throughput(4, 151.0)]) == 2


@pytest.mark.parametrize(
    ("nodes", "cores"),
    [
        ({"0": "0-1", "1": "2-3"}, [(0, 1), (2, 3), (0, 1)]),
        ({"0": "0,2,8-11", "1": "1,3,12-15"}, [(0, 2), (1, 3), (0, 2)]),
        ({"0": "0-3"}, [(), (), ()]),
        ({"0": "0-3", "1": "", "2": "4-7"}, [(), (), ()]),  # memory alone; cores of others
        ({}, [(), (), ()]),
    ],
)
def test_each_training_beside_others_stays_on_one_memory_node(
    nodes: dict[str, str], cores: list[tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in nodes.items():
        (tmp_path / f"node{name}").mkdir()
        (tmp_path / f"node{name}" / "cpulist").write_text(f"{text}\n")
    monkeypatch.setattr("lightning_glue.execution.place.memory_nodes", lambda: memory_nodes(tmp_path))
    assert [place.cores for place in places(Division(workers=3))] == cores
    assert places(Division())[0].cores == ()


def test_a_training_is_measured_whatever_its_length(bpe_dir: Path, cache: Path) -> None:
    """To the end of its first epoch, of two batches here, though the run is to have one step."""
    given = [f"data.bpe_dir={bpe_dir}", "trainer.gpus=0", "data.batch_size=500", "trainer.max_steps=1"]
    config = configuration.flatten(configuration.compose(given, task="WNLI", model="tiny", data="sample"))
    asked: list[tuple[int, float]] = []
    outcome = measure(Job(config, {}, ""), lambda *one: bool(asked.append(one)), lambda run: None)
    assert asked == [(1, 0.0)]
    assert outcome.value and outcome.value > 0
