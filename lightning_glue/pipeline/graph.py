"""The jobs of a benchmark, what each waits for, and which comes first: plain functions, no process and no disk."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

FROM_MNLI = ("RTE", "MRPC", "STS-B")  # start from MNLI's model in Liu et al. 2019, section 5.1
TRAIN, PREDICT, ENSEMBLE, SOUP, REPORT, SUBMISSION = "train", "predict", "ensemble", "soup", "report", "submission"
_SMALL = 0.01  # cost of what takes seconds, in that of the cheapest training


@dataclass(frozen=True)
class Node:
    """A job.

    Attributes:
        name: ``RTE/seed-1/train``, ``RTE/ensemble``, ``report``.
        kind: ``train``, ``predict``, ``ensemble``, ``soup``, ``report`` or ``submission``.
        task, seed: what it is of; empty and 0 where it is of all.
        needs: jobs that must be done before it begins; one of them lost, and so is it.
        after: jobs that must be over before it begins, done or lost.
        least: how many of ``after`` must be done.
        cost: estimated work, see :func:`lightning_glue.pipeline.cost.training_cost`.
    """

    name: str
    kind: str
    task: str = ""
    seed: int = 0
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    least: int = 0
    cost: float = 0.0

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.needs + self.after


Graph = dict[str, Node]  # by name; every job behind those it waits for


def train_name(task: str, seed: int) -> str:
    return f"{task}/seed-{seed}/{TRAIN}"


def predict_name(task: str, seed: int) -> str:
    return f"{task}/seed-{seed}/{PREDICT}"


def make_graph(pairs: Collection[tuple[str, int]], transfer: bool, costs: Mapping[str, float]) -> Graph:
    """The jobs of a benchmark.

    Args:
        pairs: task and seed of each training.
        transfer: RTE, MRPC and STS-B start from MNLI's model of their seed.
        costs: of a training, by task.
    """
    graph: Graph = {}
    small = _SMALL * min(costs.values(), default=0.0)

    def add(node: Node) -> str:
        graph[node.name] = node
        return node.name

    ordered = sorted(pairs, key=lambda pair: (pair[0] != "MNLI", pair))
    ends: list[str] = []
    for task, seed in ordered:
        needs = (train_name("MNLI", seed),) if transfer and task in FROM_MNLI else ()
        trained = add(Node(train_name(task, seed), TRAIN, task, seed, needs, cost=costs[task]))
        predicted = Node(predict_name(task, seed), PREDICT, task, seed, (trained,), cost=costs[task] / 30)
        ends.append(add(predicted))
    for task in dict.fromkeys(task for task, _ in ordered):
        predicted_ones = tuple(predict_name(one, seed) for one, seed in ordered if one == task)
        if len(predicted_ones) > 1:
            ends.append(add(Node(f"{task}/{ENSEMBLE}", ENSEMBLE, task, after=predicted_ones, least=2, cost=small)))
            soup = Node(f"{task}/{SOUP}", SOUP, task, after=predicted_ones, least=2, cost=costs[task] / 10)
            ends.append(add(soup))
    report = add(Node(REPORT, REPORT, after=tuple(ends), least=1, cost=small))
    predictions = tuple(one for one in ends if not one.endswith(SOUP))
    add(Node(SUBMISSION, SUBMISSION, after=(*predictions, report), least=1, cost=small))
    return graph


def priorities(graph: Graph) -> dict[str, float]:
    """Length of the longest path from the beginning of each job to the end of all: the longest comes first."""
    found = {name: 0.0 for name in graph}  # of what waits for the job
    for node in reversed(graph.values()):
        found[node.name] += node.cost
        for name in node.inputs:
            found[name] = max(found[name], found[node.name])
    return found


def gating(graph: Graph) -> set[str]:
    """The jobs that trainings start from: they come before all others."""
    return {name for node in graph.values() if node.kind == TRAIN for name in node.needs}


@dataclass(frozen=True)
class Standing:
    """How far a benchmark is.

    Attributes:
        ready: jobs that may begin, the most urgent first.
        lost: that failed, or wait for what will never be done.
        open: neither done nor lost.
    """

    ready: list[str]
    lost: set[str]
    open: set[str]


def standing(graph: Graph, done: Collection[str], failed: Collection[str]) -> Standing:
    """What may begin now.

    Args:
        done, failed: jobs that have come to their end.
    """
    lost, ready = set[str](), list[str]()
    for node in graph.values():
        if node.name in done:
            continue
        over = [name for name in node.after if name in done or name in lost]
        at_best = sum(name not in lost for name in node.after)
        if node.name in failed or any(name in lost for name in node.needs) or at_best < node.least:
            lost.add(node.name)
        elif len(over) == len(node.after) and all(name in done for name in node.needs):
            ready.append(node.name)
    urgent, gates = priorities(graph), gating(graph)
    ready.sort(key=lambda name: (name not in gates, -urgent[name]))
    return Standing(ready, lost, {name for name in graph if name not in done and name not in lost})


def seconds_left(graph: Graph, left: Iterable[str], fractions: Mapping[str, float], pace: float, slots: int) -> float:
    """Expected time until no job is left: all the work over all slots, and no less than the longest chain.

    Args:
        left: jobs that are not done and not lost.
        fractions: of jobs at work, how much of them is done.
        pace: seconds for a unit of cost.
    """
    work = {name: graph[name].cost * (1 - fractions.get(name, 0.0)) for name in left}
    chain: dict[str, float] = {}
    for node in graph.values():
        if node.name in work:
            chain[node.name] = work[node.name] + max((chain.get(name, 0.0) for name in node.inputs), default=0.0)
    return pace * max(sum(work.values()) / max(1, slots), max(chain.values(), default=0.0))
