"""Where a training runs on this machine: its processes, GPUs and threads."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a group runs: its number among this controller's groups, its processes, its GPUs, threads per process."""

    number: int
    processes: int
    gpus: tuple[int, ...]
    threads: int


@dataclass(frozen=True)
class Division:
    """How devices are shared out among groups.

    Attributes:
        workers: as many groups as this in all; None: as many as there is room for, one on the CPU.
        gpus: of those that there are; 0: the CPU.
        gpus_per_trial, procs: processes of a group, on GPUs and on the CPU.
        trials_per_gpu: groups that share a GPU.
    """

    workers: int | None = None
    gpus: int = 0
    gpus_per_trial: int = 1
    trials_per_gpu: int = 1
    procs: int = 1


def places(how: Division) -> list[Place]:
    """Share this machine out: one group per ``gpus_per_trial`` GPUs, ``trials_per_gpu`` times; one on a CPU."""
    if not how.gpus:
        count = how.workers or 1
        threads = max(1, len(os.sched_getaffinity(0)) // (count * how.procs))
        return [Place(number, how.procs, (), threads) for number in range(count)]
    each = how.gpus_per_trial
    sets = [tuple(range(i, i + each)) for i in range(0, how.gpus - each + 1, each)]
    slots = sets * how.trials_per_gpu
    slots = slots[: how.workers or len(slots)]
    threads = max(1, len(os.sched_getaffinity(0)) // (len(slots) * each))
    return [Place(number, each, slot, threads) for number, slot in enumerate(slots)]
