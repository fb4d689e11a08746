"""What the ledger says, whatever was cut off in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_glue.pipeline.graph import make_graph
from lightning_glue.pipeline.ledger import Idle, Ledger, idle

GRAPH = make_graph({("RTE", 1), ("RTE", 2)}, False, {"RTE": 1.0})
TRAIN, PREDICT = "RTE/seed-1/train", "RTE/seed-1/predict"


def finish(ledger: Ledger, job: str, number: int = 1) -> None:
    ledger.append(job, "done", id=f"{job}#{number}", of=ledger.inputs(GRAPH, job), run_id="r1", metrics={})


def again(ledger: Ledger, session: str = "s1") -> Ledger:
    found = Ledger(ledger.path, session)
    found.refresh()
    return found


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl", "s1", "d1")


def test_what_is_done_stays_done_and_is_seen_by_another_driver(ledger: Ledger) -> None:
    ledger.append(TRAIN, "started", slot="0")
    ledger.append(TRAIN, "run", run_id="r1")
    assert again(ledger).entry(TRAIN).run_id == "r1"
    finish(ledger, TRAIN)
    assert ledger.done(GRAPH) == again(ledger, "s2").done(GRAPH) == {TRAIN}
    other = again(ledger)
    finish(ledger, PREDICT)
    assert other.refresh() and other.done(GRAPH) == {TRAIN, PREDICT}


def test_one_more_seed_makes_what_combines_them_anew_and_nothing_else(ledger: Ledger) -> None:
    for job in GRAPH:
        if "seed-2" not in job:
            finish(ledger, job)
    assert {"RTE/ensemble", "report", TRAIN} <= ledger.done(GRAPH)
    for job in ("RTE/seed-2/train", "RTE/seed-2/predict"):
        finish(ledger, job)
    assert ledger.done(GRAPH) == {job for job in GRAPH if "seed" in job}


def test_a_training_that_was_lost_is_done_again_with_all_that_follows(ledger: Ledger) -> None:
    for job in GRAPH:
        finish(ledger, job)
    assert ledger.done(GRAPH) == set(GRAPH)
    ledger.append(TRAIN, "lost")
    assert {TRAIN, PREDICT} == set(GRAPH) - ledger.done(GRAPH)
    assert not ledger.entry(TRAIN).run_id  # a new one
    finish(ledger, TRAIN, 2)
    assert {PREDICT} == set(GRAPH) - ledger.done(GRAPH)
    finish(ledger, PREDICT, 2)
    assert ledger.done(GRAPH) == {job for job in GRAPH if "seed" in job}


def test_what_another_driver_has_made_of_more_seeds_is_not_made_of_fewer_again(ledger: Ledger) -> None:
    fewer = make_graph({("RTE", 1)}, False, {"RTE": 1.0})
    for job in GRAPH:
        finish(ledger, job)
    assert ledger.done(fewer) == set(fewer)


def test_failures_and_attempts_count_in_their_session_alone(ledger: Ledger) -> None:
    for state in ("started", "died", "started", "stopped", "started"):
        ledger.append(TRAIN, state)
    ledger.append(TRAIN, "failed", kind="user", message="no such file")
    assert ledger.entry(TRAIN).attempts == 2
    assert ledger.failed(GRAPH) == {TRAIN: "no such file"}
    assert not again(ledger, "s2").failed(GRAPH) and not again(ledger, "s2").entry(TRAIN).attempts


def test_a_run_is_gone_on_with_unless_it_failed_by_itself(ledger: Ledger) -> None:
    ledger.append(TRAIN, "run", run_id="r1")
    ledger.append(TRAIN, "failed", kind="died", message="killed")
    assert ledger.entry(TRAIN).run_id == "r1"
    ledger.append(TRAIN, "failed", kind="diverged", message="diverged")
    assert not ledger.entry(TRAIN).run_id


@given(st.floats(0, 1))
def test_a_line_that_is_cut_off_is_left_out_and_the_next_one_counts(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.jsonl", "s1", "d1")
    finish(ledger, TRAIN)
    whole = ledger.path.read_bytes()
    kept = round(share * len(whole))
    ledger.path.write_bytes(whole[:kept])  # its driver was killed, or the disk was full
    after = again(ledger)
    assert (TRAIN in after.done(GRAPH)) == (kept == len(whole))
    finish(after, "RTE/seed-2/train")
    found = again(ledger)
    assert "RTE/seed-2/train" in found.done(GRAPH)
    assert found.entry(TRAIN).done is None or kept >= len(whole) - 1


@pytest.mark.parametrize(
    "line",
    ["", "{}", "[1]", "null", '{"job": 1, "state": "done", "time": 1}', '{"job": "a", "state": "done", "time": 1}',
     '{"job": "a", "state": "run", "time": 1}', '{"job": "a", "state": "new", "time": 1}', "[" * 100_000],
)  # fmt: skip
def test_what_is_no_event_hinders_nobody(ledger: Ledger, line: str) -> None:
    ledger.path.write_text(line + "\n")
    finish(ledger, TRAIN)
    assert again(ledger).done(GRAPH) == {TRAIN}


def test_a_line_that_is_being_written_is_waited_for(ledger: Ledger) -> None:
    finish(ledger, TRAIN)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-20])
    reader = again(ledger)
    assert not reader.done(GRAPH)
    ledger.path.write_bytes(whole)
    assert reader.refresh() and reader.done(GRAPH) == {TRAIN}


def test_a_slot_is_idle_from_a_jobs_end_to_the_next_ones_start() -> None:
    def event(time: float, job: str, state: str, slot: str, *of: str) -> dict[str, object]:
        return {"time": time, "job": job, "state": state, "slot": slot, "driver": "d1", "of": dict.fromkeys(of, "x")}

    events = [
        event(0, "a", "started", "0"), event(10, "a", "died", "0"), event(11, "a", "started", "0"),
        event(0, "b", "started", "1"), event(5, "b", "done", "1"), event(20, "a", "done", "0"),
        event(23, "c", "started", "1", "a"), event(30, "c", "done", "1", "a"), {"time": 40, "job": "a", "state": "run"},
    ]  # fmt: skip
    assert idle(events) == Idle(total=50, given=1 + 3, waited=15)
    assert idle([{"time": 4, "job": "x", "state": "run"}]) == Idle()
