"""Where a training runs on this machine: its processes, GPUs and threads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_NODES = Path("/sys/devices/system/node")
CORES = "LIGHTNING_GLUE_CORES"  # tells a worker's process the cores of its place
AUTO = "auto"  # how many trainings at a time: as many as :mod:`lightning_glue.execution.throughput` finds best


@dataclass(frozen=True)
class Place:
    """Where a group runs: its number among this controller's groups, its processes, its GPUs, threads per process.

    Attributes:
        cores: those it may use; empty: all that this process may.
    """

    number: int
    processes: int
    gpus: tuple[int, ...]
    threads: int
    cores: tuple[int, ...] = ()


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
        nodes = memory_nodes() if count > 1 else []
        share = [nodes[number % len(nodes)] if len(nodes) > 1 else () for number in range(count)]
        return [Place(number, how.procs, (), threads, share[number]) for number in range(count)]
    each = how.gpus_per_trial
    sets = [tuple(range(i, i + each)) for i in range(0, how.gpus - each + 1, each)]
    slots = sets * how.trials_per_gpu
    slots = slots[: how.workers or len(slots)]
    threads = max(1, len(os.sched_getaffinity(0)) // (len(slots) * each))
    return [Place(number, each, slot, threads) for number, slot in enumerate(slots)]


def memory_nodes(root: Path = _NODES) -> list[tuple[int, ...]]:
    """Cores of each NUMA node, of those that this process may use; a group on one node has its memory near.

    Args:
        root: folder of the kernel's ``node<N>/cpulist``, such as ``0-3,8``.
    """
    usable, nodes = os.sched_getaffinity(0), []
    for file in sorted(root.glob("node[0-9]*/cpulist")):
        spans = [part.partition("-") for part in file.read_text().strip().split(",") if part]
        cores = {core for low, _, high in spans for core in range(int(low), int(high or low) + 1)}
        nodes.append(tuple(sorted(cores & usable)))
    return [cores for cores in nodes if cores]
