"""What tells a process from every other one, and how a process ends with the one that started it.

Imports nothing heavy: it is the first thing that a started process runs.
"""

from __future__ import annotations

import os
import signal
import sys

PARENT = "LIGHTNING_GLUE_PARENT"  # in the environment of a child that is to end with its parent: the parent's pid
_PR_SET_PDEATHSIG = 1
_UNKNOWN = "-"


def process_identity() -> str:
    """This process among all of all machines: host name, boot id, PID namespace, pid, start time; no blank in any.

    A host name alone is shared by containers and by machines called localhost, and a pid is used again.
    """
    return " ".join([*_place(), str(os.getpid()), _state("self")[1]])


def process_is_gone(identity: str) -> bool:
    """Whether the process that gave this identity has ended, where that is certain; False in all other cases.

    Certain is: it ran on this machine since it was started last, in this PID namespace, and now there is no process of
    that number, or one that started at another time, or what is left of one that nobody has waited for.
    """
    *place, pid, start = identity.split(" ") if identity.count(" ") == 4 else ["", "0", ""]
    if tuple(place) != _place() or _UNKNOWN in place or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    if os.readlink("/proc/self") != str(os.getpid()):  # the /proc of another PID namespace
        return False
    ended, started = _state(pid)
    return ended or (_UNKNOWN not in (start, started) and start != started)


def _place() -> tuple[str, str, str]:
    """Host name, boot id and PID namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return os.uname().nodename, file.read().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return os.uname().nodename, _UNKNOWN, _UNKNOWN


def _state(pid: str) -> tuple[bool, str]:
    """Whether a process has ended and only waits to be waited for; when it started, in ticks since the machine did."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(") ")[2].split()  # the name before may hold anything
    except OSError:
        return False, _UNKNOWN
    return fields[0] in "ZX" and int(fields[17]) <= 1, fields[19]


def end_with_parent() -> None:
    """Die with the parent that asked for it in the environment, now if it is gone; children are asked anew."""
    parent = os.environ.pop(PARENT, "")
    if parent:
        end_with(int(parent), signal.SIGKILL)


def end_with(parent: int, number: signal.Signals) -> None:
    """Let the kernel send this process a signal when its parent dies; send it now if that has happened before."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


if __name__ == "__main__":  # PARENT COMMAND...: becomes the command, which gets SIGTERM when the parent dies
    end_with(int(sys.argv[1]), signal.SIGTERM)
    os.execvp(sys.argv[2], sys.argv[2:])
