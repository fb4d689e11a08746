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


def places(*, workers: int | None, gpus: int, gpus_per_trial: int, trials_per_gpu: int, procs: int) -> list[Place]:
    """Share the machine out: one group per ``gpus_per_trial`` GPUs, ``trials_per_gpu`` times; one on a CPU.

    Args:
        workers: as many groups as this instead (fewer than there is room for on GPUs).
        procs: processes of a trial on the CPU.
    """
    if not gpus:
        count = workers or 1
        threads = max(1, len(os.sched_getaffinity(0)) // (count * procs))
        return [Place(number, procs, (), threads) for number in range(count)]
    sets = [tuple(range(i, i + gpus_per_trial)) for i in range(0, gpus - gpus_per_trial + 1, gpus_per_trial)]
    slots = sets * trials_per_gpu
    slots = slots[: workers or len(slots)]
    threads = max(1, len(os.sched_getaffinity(0)) // (len(slots) * gpus_per_trial))
    return [Place(number, gpus_per_trial, slot, threads) for number, slot in enumerate(slots)]
