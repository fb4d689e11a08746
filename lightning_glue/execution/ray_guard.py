"""Kills process groups as soon as whoever started it is gone, also where that was killed: ``python ray_guard.py``.

It reads their numbers from its standard input, a line each time they change. A process of its own, because nothing else
outlives an actor that gets SIGKILL; on the standard library alone, because there is one for every slot.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress


def main() -> None:
    groups: list[int] = []
    for line in sys.stdin:
        groups = [int(number) for number in line.split()]
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
