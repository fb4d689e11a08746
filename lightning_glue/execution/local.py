"""The executor of this machine: a group of worker processes on a place, warm from one training to the next."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lightning_glue.execution.channel import Channel
from lightning_glue.execution.executor import Speaks
from lightning_glue.execution.place import CORES, Place
from lightning_glue.utils.launch import without_launcher

_LAST_LINES = 15  # of a log


@dataclass
class Group(Speaks):
    """A running group: ``python -m lightning_glue.execution.worker`` once per process, as torchrun would start it.

    Attributes:
        objective: ``module:function`` that trains a job, see :data:`~lightning_glue.execution.job.Objective`.
        log: the file its processes print to.
    """

    place: Place
    objective: str
    log: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    channels: list[Channel] = field(default_factory=list)

    def start(self) -> None:
        """Start the processes; each says ``ready`` when its imports are done."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        port = _free_port() if self.place.processes > 1 else 0
        with open(self.log, "ab") as log:
            for rank in range(self.place.processes):
                ours, theirs = socket.socketpair()
                process = subprocess.Popen(
                    [sys.executable, "-m", "lightning_glue.execution.worker", "--channel", str(theirs.fileno()),
                     "--objective", self.objective],
                    env={**without_launcher(os.environ), **self._environment(rank, port)},
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C reaches the controller alone, which ends them in order
                )  # fmt: skip
                theirs.close()
                self.processes.append(process)
                self.channels.append(Channel(ours))

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        world = self.place.processes
        variables = {"OMP_NUM_THREADS": str(self.place.threads), "PYTHONUNBUFFERED": "1"}
        if self.place.cores:
            variables[CORES] = ",".join(map(str, self.place.cores))
        if self.place.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, _visible(self.place.gpus)))
        if world > 1:
            variables |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "GROUP_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": f"trial-{self.place.number}",
            }
        return variables

    def exit_reason(self) -> str:
        """What became of the processes, once a channel has closed."""
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
        for rank, process in enumerate(self.processes):
            code = process.returncode
            if code is not None and code < 0:
                return f"process {rank} was ended by {signal.Signals(-code).name}"
        codes = [str(process.returncode) for process in self.processes if process.returncode]
        return f"process exited with code {codes[0]}" if codes else "process closed its channel"

    def signal(self, number: int) -> None:
        """To every process and what it has started."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def close(self, selector: selectors.BaseSelector) -> None:
        """Kill what still runs, and forget it."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self.close_channels(selector)
        self.processes = []

    def last_words(self) -> str:
        """The end of the log."""
        if not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:])


def _visible(gpus: tuple[int, ...]) -> list[str]:
    """Names of the GPUs with these numbers, among those this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(max(gpus) + 1)]
    return [names[number] for number in gpus]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def groups(places: Sequence[Place], objective: str, folder: Path) -> list[Group]:
    """A group for every place, its log in ``folder``."""
    return [Group(place, objective, folder / f"worker-{place.number}.log") for place in places]
