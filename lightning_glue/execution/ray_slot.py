"""The actor of a slot: on its node it starts the same group of processes as on one machine, and hands on what they say.

Ray gives it its GPUs (CUDA_VISIBLE_DEVICES); when it dies, also by SIGKILL, so do its processes.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from lightning_glue.execution import ray_guard
from lightning_glue.execution.joining import Files, check_folder, describe
from lightning_glue.execution.local import Group
from lightning_glue.execution.place import Place

_LISTEN_SECONDS = 20.0  # at most, for an answer to receive()


class Slot:
    """Args: environment: variables of the driver that its processes are to have; node: its name, for errors."""

    def __init__(self, environment: dict[str, str], node: str) -> None:
        os.environ.update(environment)
        self.node = node
        self.group: Group | None = None
        self.selector = selectors.DefaultSelector()
        self.guard: subprocess.Popen[bytes] | None = None

    def join(self, folder: str, files: Files | None) -> dict[str, str]:
        """Go to the driver's folder; versions and digests here.

        Raises:
            UserError: the folder or the data are not there, or this node asks no token of those who connect.
        """
        check_folder(Path(folder), self.node)
        os.chdir(folder)
        found = describe(files)
        return found | {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}

    def start(self, number: int, processes: int, gpus: int, share: int, objective: str, log: str) -> None:
        """Start the processes, as on one machine.

        Args:
            share: slots among which the cores of this node are shared out.
        """
        threads = max(1, len(os.sched_getaffinity(0)) // (share * processes))
        self.group = Group(Place(number, processes, tuple(range(gpus)), threads), objective, Path(log))
        self.guard = subprocess.Popen(
            [sys.executable, "-S", "-E", ray_guard.__file__], stdin=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self.group.start()
        assert self.guard.stdin
        self.guard.stdin.write(" ".join(str(process.pid) for process in self.group.processes).encode() + b"\n")
        self.group.register(self.selector)

    def receive(self) -> list[tuple[int, bytes]]:
        """Wait for what processes say: rank and data each, none where a process closed its end."""
        assert self.group
        found = []
        for key, _ in self.selector.select(timeout=_LISTEN_SECONDS):
            try:
                data = self.group.channels[key.data[1]].connection.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                self.selector.unregister(key.fileobj)
            found.append((key.data[1], data))
        return found

    def send(self, rank: int, data: bytes) -> None:
        assert self.group
        with suppress(OSError):  # a dead process shows when it is read
            self.group.channels[rank].connection.sendall(data)

    def signal(self, number: int) -> None:
        if self.group:
            self.group.signal(number)

    def exit_reason(self) -> str:
        return self.group.exit_reason() if self.group else ""

    def last_words(self) -> str:
        return self.group.last_words() if self.group else ""

    def end(self) -> None:
        """Kill the processes, and wait until they are gone."""
        if self.group:
            self.group.signal(signal.SIGKILL)
            for process in self.group.processes:
                process.wait()
        if self.guard and self.guard.stdin:
            self.guard.stdin.write(b"\n")  # their numbers may soon be others'
            self.guard.stdin.close()
            self.guard.wait()
