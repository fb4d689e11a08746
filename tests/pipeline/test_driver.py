"""Jobs given out to real worker processes, which die, fail, and are shared with other drivers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers.benchmark_jobs import GRAPH, drive, starts
from helpers.project import ROOT

from lightning_glue.errors import UserError
from lightning_glue.pipeline.drivers import at_work, claim, working
from lightning_glue.pipeline.graph import make_graph
from lightning_glue.pipeline.ledger import Ledger

MNLI, RTE, WNLI = (f"{task}/seed-1/train" for task in ("MNLI", "RTE", "WNLI"))


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")


def start(folder: Path, acts: dict[str, str], how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "helpers.benchmark_jobs", str(folder), json.dumps(acts), how]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def states(folder: Path, job: str) -> list[str]:
    found = Ledger(folder / "ledger.jsonl")
    found.refresh()
    return [event["state"] for event in found.events if event["job"] == job]


def test_all_is_done_by_one_warm_process_in_the_order_of_urgency_and_only_once(tmp_path: Path) -> None:
    driver, _ = drive(tmp_path, {})
    assert driver.ledger.done(GRAPH) == set(GRAPH)
    assert starts(tmp_path) == [MNLI, RTE, WNLI, *(f"{task}/seed-1/predict" for task in ("MNLI", "RTE", "WNLI")),
                                "report", "submission"]  # fmt: skip
    assert len({line.split(" ")[1] for line in (tmp_path / "starts").read_text().splitlines()}) == 1
    assert states(tmp_path, RTE) == ["started", "run", "done"]
    drive(tmp_path, {})
    assert len(starts(tmp_path)) == len(GRAPH)


def test_a_job_whose_process_dies_is_tried_again_and_one_that_fails_takes_only_what_needs_it_along(
    tmp_path: Path,
) -> None:
    driver, told = drive(tmp_path, {MNLI: "die once", RTE: "user", WNLI: "die"}, workers=2, retries=1)
    assert states(tmp_path, MNLI) == ["started", "died", "started", "run", "done"]
    assert states(tmp_path, RTE) == ["started", "failed"]  # it would come again
    assert states(tmp_path, WNLI) == ["started", "died", "started", "failed"]
    assert driver.ledger.failed(GRAPH) == {RTE: "no such file", WNLI: "process 0 was ended by SIGKILL"}
    assert {name for name in GRAPH if not states(tmp_path, name)} == {"RTE/seed-1/predict", "WNLI/seed-1/predict"}
    assert driver.ledger.done(GRAPH) == {MNLI, "MNLI/seed-1/predict", "report", "submission"}
    assert Counter(state for _, state in told.lines)["failed"] == 2

    again, _ = drive(tmp_path, {WNLI: "error"}, retries=0)  # asked again, it tries again; the report is made anew
    assert starts(tmp_path)[-5:] == [RTE, WNLI, "RTE/seed-1/predict", "report", "submission"]
    assert again.ledger.failed(GRAPH) == {WNLI: "RuntimeError: something else"}


def test_a_training_over_two_slots_waits_for_both_and_others_take_them_afterwards(tmp_path: Path) -> None:
    graph = make_graph({("QQP", 1), ("QQP", 2), ("WNLI", 1)}, False, {"QQP": 9.0, "WNLI": 1.0})
    driver, _ = drive(tmp_path, {}, graph=graph, workers=2, ddp=True)
    assert driver.ledger.done(graph) == set(graph)
    ranks = Counter(tuple(line.split(" ")[::2]) for line in (tmp_path / "starts").read_text().splitlines())
    assert ranks["QQP/seed-1/train", "0"] == ranks["QQP/seed-1/train", "1"] == ranks["QQP/seed-2/train", "1"] == 1
    assert ranks["WNLI/seed-1/train", "1"] == 0
    at_once: set[str] = set()
    for event in driver.ledger.events:  # no slot has two jobs
        slots = set(event.get("slot", "").split("+")) - {""}
        if event["state"] == "started":
            assert not at_once & slots
            at_once |= slots
        elif event["state"] == "done":
            at_once -= slots


def test_what_cannot_start_at_all_ends_the_benchmark_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the objective is nowhere to be found
    with pytest.raises(UserError, match=r"(?s)no job can be run: process exited with code 1.*No module named 'helpers"):
        drive(tmp_path, {})


def test_a_second_driver_says_who_is_at_work_and_joins_where_it_is_asked_to(tmp_path: Path) -> None:
    first = start(tmp_path, {MNLI: f"until {WNLI}"}, "alone")
    wait_for(lambda: MNLI in starts(tmp_path))
    with pytest.raises(UserError, match=rf"worked on by process {first.pid} on \S+ since .*--join"):
        drive(tmp_path, {})
    second, _ = drive(tmp_path, {}, join=True)
    assert first.wait(timeout=60) == 0
    assert second.ledger.done(GRAPH) == set(GRAPH)
    assert Counter(starts(tmp_path)) == Counter(list(GRAPH))  # each once
    assert len({event["driver"] for event in second.ledger.events}) == 2
    assert len({event["session"] for event in second.ledger.events}) == 1
    assert not at_work(tmp_path)


def test_the_jobs_of_a_driver_that_is_killed_are_free_and_its_processes_end(tmp_path: Path) -> None:
    first = start(tmp_path, {MNLI: "sleep 100"}, "alone")
    wait_for(lambda: MNLI in starts(tmp_path))
    workers = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.communicate()
    driver, _ = drive(tmp_path, {})
    assert driver.ledger.done(GRAPH) == set(GRAPH)
    assert states(tmp_path, MNLI) == ["started", "started", "run", "done"]
    assert psutil.wait_procs(workers, timeout=40)[1] == []


def test_a_driver_that_is_told_to_stop_gives_its_jobs_back(tmp_path: Path) -> None:
    first = start(tmp_path, {MNLI: "sleep 100"}, "alone")
    wait_for(lambda: states(tmp_path, MNLI) and MNLI in starts(tmp_path))
    workers = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == signal.SIGTERM
    assert states(tmp_path, MNLI) == ["started", "stopped"]
    assert psutil.wait_procs(workers, timeout=5)[1] == []


def test_a_lock_is_free_when_its_process_is_gone(tmp_path: Path) -> None:
    with claim(tmp_path, "a/b") as mine, claim(tmp_path, "a/b") as other, claim(tmp_path, "a/c") as another:
        assert (mine, other, another) == (True, False, True)
    with working(tmp_path, join=False) as (this, others):
        assert not others and [driver.pid for driver in at_work(tmp_path)] == [os.getpid()]
        assert str(os.getpid()) in str(this)
    assert not at_work(tmp_path)
