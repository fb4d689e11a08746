"""How OpenMP's threads, on which torch computes on the CPU, wait for each other.

A training step is thousands of short products, each split among the threads. Whoever is through with its part either
sleeps, and being woken up takes longer than many a part, or spins: minilm's steps take two thirds of the time then. But
where another program has one of the cores, threads spin while the one they wait for is not even running, and a step
takes twice to six times as long. So threads spin for a little while, where cores are free as torch is imported.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

_NONE = "00"  # none, as no user writes it
SPINS = 5000  # of libgomp: 0.05 to 0.2 ms; a wait within a step is rarely longer
_LEAST_SECONDS = 0.05  # to look how busy others are, whose time the system counts in hundredths of a second
_GROUPS, _PERIOD = Path("/sys/fs/cgroup"), "cpu.cfs_period_us"
_SPARE = 0.5  # cores that others may use for a moment


def sleep_while_waiting() -> None:
    """Unless the user has said otherwise. To be called before torch is imported, which is when libgomp reads it."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": _NONE}


def spin_where_cores_are_free() -> None:
    """What :func:`sleep_while_waiting` has set is changed where this process's threads have cores to themselves."""
    if os.environ.get("GOMP_SPINCOUNT") != _NONE or "torch" in sys.modules:
        return
    others, cores = _use_of_others(), len(_cores())
    if others is None or _limited(cores):
        return
    threads = os.environ.get("OMP_NUM_THREADS", "")
    wanted = int(threads) if threads.isdecimal() else cores
    if others + wanted <= cores + _SPARE:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def _cores() -> set[int]:
    """Those that this process may use; none where the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _busy_seconds() -> float | None:
    """Processor time that all programs have used on these cores since the machine was started."""
    with suppress(OSError, ValueError):
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
        used = {name: [int(ticks) for ticks in values] for name, *values in lines}
        # man 5 proc: user, nice, system, idle, iowait, irq, softirq
        ticks = [sum(used[f"cpu{core}"][i] for i in (0, 1, 2, 5, 6)) for core in _cores() if f"cpu{core}" in used]
        return sum(ticks) / os.sysconf("SC_CLK_TCK")
    return None


def _look() -> tuple[float, float] | None:
    """The time, and the processor time of all programs but this one."""
    busy = _busy_seconds()
    return None if busy is None else (time.monotonic(), busy - sum(os.times()[:4]))


_BEGINNING = _look()


def _use_of_others() -> float | None:
    """How many of the cores other programs have used since this module was imported; None: nobody knows."""
    now = _look()
    if _BEGINNING is None or now is None or now[0] - _BEGINNING[0] < _LEAST_SECONDS:
        return None
    return (now[1] - _BEGINNING[1]) / (now[0] - _BEGINNING[0])


def _limited(cores: int) -> bool:
    """Whether a control group may use less time than so many cores have, of which a thread that spins takes as well."""
    for folder in (_own_group(), *_own_group().parents):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max" and int(quota) < cores * int(period):
                return True
    with suppress(OSError, ValueError):  # the first version of control groups
        folder = _GROUPS / "cpu"
        return 0 < int((folder / "cpu.cfs_quota_us").read_text()) < cores * int((folder / _PERIOD).read_text())
    return False


def _own_group() -> Path:
    """This process's folder, which is the root in a container that sees no other."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                return _GROUPS / line.removeprefix("0::/")
    return _GROUPS
