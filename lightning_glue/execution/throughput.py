"""How many trainings at a time a machine does best, by a short measurement."""

from __future__ import annotations

import dataclasses
import os
import selectors
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lightning_glue.errors import UserError
from lightning_glue.execution.executor import readable, stop, stop_signals
from lightning_glue.execution.job import Job
from lightning_glue.execution.local import groups
from lightning_glue.execution.place import Division, places

if TYPE_CHECKING:
    from lightning_glue.execution.executor import Executor

_OBJECTIVE = "lightning_glue.execution.throughput_job:measure"
_MOST = 4  # trainings at a time that are tried
_WORTH = 1.05  # times the throughput of fewer, for which more at a time are taken: a search learns less from them


@dataclass(frozen=True)
class Throughput:
    """What so many trainings at a time came to.

    Attributes:
        examples: a second, of all of them together; None: it could not be told, or there was no room for them.
    """

    trainings: int
    examples: float | None

    def __str__(self) -> str:
        found = "no room" if self.examples is None else f"{self.examples:.1f} examples/s"
        return f"{self.trainings} at a time: {found}"


def candidates(how: Division, most: int = _MOST) -> list[Division]:
    """Ways to share the machine out that are worth a try: 1, 2, 4, ... trainings on a device, at most ``most``.

    On the CPU not more processes than cores; of several GPUs one is tried for all.
    """
    if how.gpus:
        one = dataclasses.replace(how, workers=None, gpus=how.gpus_per_trial)
        return [dataclasses.replace(one, trials_per_gpu=count) for count in _powers(most)]
    cores = len(os.sched_getaffinity(0)) // how.procs
    return [dataclasses.replace(how, workers=count) for count in _powers(max(1, min(most, cores)))]


def _powers(most: int) -> Iterator[int]:
    count = 1
    while count <= most:
        yield count
        count *= 2


def shared_out(
    how: Division, config: Mapping[str, Any], folder: Path, objective: str = _OBJECTIVE
) -> tuple[Division, list[Throughput]]:
    """``how`` with as many trainings at a time as do the most examples a second, and what was measured.

    Each candidate's trainings run together for a few seconds, in worker processes of their own; nothing is tracked.

    Args:
        config: of a training, by dotted keys.
        folder: for the workers' logs.

    Raises:
        UserError: nothing can be trained with this configuration.
        KeyboardInterrupt: a signal came.
    """
    found: list[Throughput] = []
    for division in candidates(how):
        one = _measure(division, config, folder, objective)
        found.append(one)
        if one.examples is None:
            break  # more of them have no room either
    count = best(found)
    name = "trials_per_gpu" if how.gpus else "workers"
    return dataclasses.replace(how, **{name: count}), found


def best_division(how: Division, config: Mapping[str, Any], folder: Path, *, shows: bool) -> Division:
    """:func:`shared_out`, and what was measured on the terminal."""
    if shows:
        print("how many at a time: a few seconds of training with each", flush=True)
    how, found = shared_out(how, config, folder)
    if shows:
        print(*(f"  {one}" for one in found), sep="\n", flush=True)
    return how


def best(found: Sequence[Throughput]) -> int:
    """The number that is worth it: each step to more must bring more."""
    chosen = found[0]
    for one in found[1:]:
        if (one.examples or 0.0) > _WORTH * (chosen.examples or 0.0):
            chosen = one
    return chosen.trainings


def _measure(division: Division, config: Mapping[str, Any], folder: Path, objective: str) -> Throughput:
    where = places(division)
    teams = groups(where, objective, folder)
    selector = selectors.DefaultSelector()
    stopped: list[int] = []

    def stop_here(number: int, _: FrameType | None) -> None:
        stopped.append(number)

    with stop_signals(stop_here):
        try:
            for team in teams:
                team.start()
                team.register(selector)
            rate = _listen(teams, selector, {"job": asdict(Job(dict(config), {}, ""))}, stopped)
        finally:
            stop(teams, selector, grace=0)
    if stopped:
        signal.raise_signal(stopped[0])  # to whoever had it before
        raise KeyboardInterrupt
    return Throughput(len(teams), rate)


def _listen(
    teams: Sequence[Executor], selector: selectors.BaseSelector, job: dict[str, Any], stopped: list[int]
) -> float | None:
    """Send the job to each team, let all begin at once; the sum of what they do, None where one does not get there."""
    waiting: dict[str, set[tuple[int, int]]] = {"ready": set(), "report": set(), "done": set()}
    everybody = {(number, rank) for number, team in enumerate(teams) for rank in range(team.place.processes)}
    rates: dict[int, float | None] = {}
    while waiting["done"] != everybody and not stopped:
        for team, rank in readable(selector, 0.5):
            messages = team.channels[rank].receive()
            if messages is None:
                return None  # it was ended: for want of memory, most likely
            for message in messages:
                event, number = message["event"], team.place.number
                if event == "failed":
                    if message["kind"] == "user":
                        raise UserError(message["message"])
                    return None
                waiting.setdefault(event, set()).add((number, rank))
                if event == "done" and rank == 0:
                    rates[number] = message["value"]
                if event == "ready" and waiting["ready"] == everybody:
                    for one in teams:
                        one.send(job)
                if event == "report" and waiting["report"] == everybody:
                    for one in teams:
                        one.send({"prune": False})
    values = [rates.get(number) for number in range(len(teams))]
    return None if stopped or None in values else sum(value for value in values if value is not None)
