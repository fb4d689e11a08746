"""Which jobs there are, which may begin, and which comes first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_glue.pipeline.graph import Graph, Node, gating, make_graph, priorities, seconds_left, standing

COSTS = {"MNLI": 100.0, "RTE": 3.0, "WNLI": 1.0, "QQP": 60.0, "STS-B": 2.0}


def all_of(tasks: str, seeds: int) -> set[tuple[str, int]]:
    return {(task, seed) for task in tasks.split() for seed in range(1, seeds + 1)}


def test_a_seed_is_trained_and_predicted_and_two_are_combined() -> None:
    graph = make_graph(all_of("RTE", 2), False, COSTS)
    assert graph["RTE/seed-2/predict"].needs == ("RTE/seed-2/train",)
    assert graph["RTE/ensemble"].after == graph["RTE/soup"].after == ("RTE/seed-1/predict", "RTE/seed-2/predict")
    assert list(graph)[-2:] == ["report", "submission"]
    assert "RTE/ensemble" not in make_graph(all_of("RTE", 1), False, COSTS)


def test_mnli_comes_first_where_others_start_from_it() -> None:
    """Even where it is itself cheaper than another task."""
    costs = COSTS | {"QQP": 101.0}
    alone, gates = (make_graph(all_of("MNLI QQP RTE WNLI", 1), transfer, costs) for transfer in (False, True))
    assert standing(alone, (), ()).ready[:2] == ["QQP/seed-1/train", "MNLI/seed-1/train"]
    assert standing(gates, (), ()).ready == [f"{task}/seed-1/train" for task in ("MNLI", "QQP", "WNLI")]
    assert gates["RTE/seed-1/train"].needs == ("MNLI/seed-1/train",)
    assert "RTE/seed-1/train" in standing(gates, {"MNLI/seed-1/train"}, ()).ready


def test_what_depends_on_a_failure_is_lost_and_nothing_else() -> None:
    graph = make_graph(all_of("MNLI RTE WNLI", 3), True, COSTS)
    lost = standing(graph, (), {"MNLI/seed-2/train"}).lost
    assert lost == {f"{task}/seed-2/{kind}" for task in ("MNLI", "RTE") for kind in ("train", "predict")}
    fewer = standing(graph, (), {"MNLI/seed-2/train", "WNLI/seed-1/train", "WNLI/seed-3/train"}).lost
    assert {"WNLI/ensemble", "WNLI/soup"} <= fewer  # of one seed there is none
    assert not {"MNLI/ensemble", "RTE/soup", "report", "submission"} & fewer


def test_nothing_is_reported_where_nothing_could_be_trained() -> None:
    graph = make_graph(all_of("RTE", 2), False, COSTS)
    assert standing(graph, (), {"RTE/seed-1/train", "RTE/seed-2/train"}).lost == set(graph)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Any graph without circles."""
    graph: Graph = {}
    for number in range(draw(st.integers(1, 8))):
        earlier = st.sets(st.sampled_from(sorted(graph)), max_size=3) if graph else st.just(set[str]())
        needs, after = draw(earlier), draw(earlier)
        after -= needs
        least, cost = draw(st.integers(0, len(after))), draw(st.floats(0.1, 10))
        name, kind = f"job-{number:02d}", draw(st.sampled_from(["train", "predict"]))
        graph[name] = Node(name, kind, needs=tuple(needs), after=tuple(after), least=least, cost=cost)
    return graph


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(0, 10**6), st.integers(1, 4))
def test_all_that_can_be_done_is_done_in_order(graph: Graph, seed: int, slots: int) -> None:
    """Jobs fail and end at random: nothing begins before its needs, the first to begin is the most urgent, and at the
    end every job is done or waits for one that failed."""
    chance = random.Random(seed)
    fate = {name: chance.random() < 0.3 for name in graph}
    done, failed, running = set[str](), set[str](), list[str]()
    urgent, gates = priorities(graph), gating(graph)
    while True:
        now = standing(graph, done, failed)
        waiting = [name for name in now.ready if name not in running]
        order = [(name not in gates, -urgent[name]) for name in waiting]
        assert order == sorted(order)
        for name in waiting[: slots - len(running)]:
            assert set(graph[name].needs) <= done
            assert all(one in done or one in now.lost for one in graph[name].after)
            assert sum(one in done for one in graph[name].after) >= graph[name].least
            running.append(name)
        if not running:
            break
        ended = running.pop(chance.randrange(len(running)))
        (failed if fate[ended] else done).add(ended)
    assert not now.open and done | now.lost == set(graph) and not done & now.lost
    for name in now.lost - failed:
        node = graph[name]
        short = sum(one in done for one in node.after) < node.least
        assert short or any(one in now.lost for one in node.needs)


@settings(max_examples=30, deadline=None)
@given(graphs())
def test_a_job_is_at_least_as_urgent_as_all_that_waits_for_it_together_with_itself(graph: Graph) -> None:
    urgent = priorities(graph)
    for node in graph.values():
        behind = [urgent[one.name] for one in graph.values() if node.name in one.inputs]
        assert urgent[node.name] == pytest.approx(node.cost + max(behind, default=0.0))


def test_time_left_is_the_work_over_the_slots_and_no_less_than_the_longest_chain() -> None:
    graph = make_graph({("MNLI", 1), ("QQP", 1)}, False, COSTS)
    left = ["MNLI/seed-1/train", "QQP/seed-1/train"]
    assert seconds_left(graph, left, {}, 2.0, slots=1) == 320
    assert seconds_left(graph, left, {}, 2.0, slots=8) == 200
    assert seconds_left(graph, left, {"MNLI/seed-1/train": 0.5}, 2.0, slots=1) == 220
    assert seconds_left(graph, [], {}, 2.0, slots=1) == 0
