"""Processes that run trials: each group is one trial's DDP processes, warm from one trial to the next."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lightning_glue.channel import Channel, Message
from lightning_glue.launch import without_launcher

GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL
_READABLE = 40  # characters of a study's name in the name of its folder


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


@dataclass
class Group:
    """A running group: ``python -m lightning_glue.trial`` once per process, with the environment torchrun would give.

    Attributes:
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
                    [sys.executable, "-m", "lightning_glue.trial", "--channel", str(theirs.fileno()),
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

    def send(self, message: Message) -> None:
        """To every process."""
        for rank in range(len(self.channels)):
            self.send_to(rank, message)

    def send_to(self, rank: int, message: Message) -> None:
        """To one process; a dead one shows when its channel is read."""
        with suppress(OSError):
            self.channels[rank].send(message)

    def register(self, selector: selectors.BaseSelector) -> None:
        for rank, channel in enumerate(self.channels):
            selector.register(channel, selectors.EVENT_READ, (self, rank))

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

    def stop(self, selector: selectors.BaseSelector, grace: float = GRACE_SECONDS) -> None:
        stop([self], selector, grace)

    def close(self, selector: selectors.BaseSelector) -> None:
        """Kill what still runs, and forget it."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for channel in self.channels:
            with suppress(KeyError):  # its end was read before
                selector.unregister(channel)
            channel.close()
        self.processes, self.channels = [], []

    def last_words(self, lines: int = 15) -> str:
        """The end of the log."""
        if not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def stop(
    groups: list[Group],
    selector: selectors.BaseSelector,
    grace: float = GRACE_SECONDS,
    heard: Callable[[Group, int, Message], None] = lambda group, rank, message: None,
) -> None:
    """End every process of the groups and what it has started, all at once; SIGKILL after ``grace`` seconds.

    Args:
        selector: where the groups are registered.
        heard: is called with what a process says meanwhile, its group and its rank; a trial that waits for a decision
            gets it there and goes on to its orderly end.
    """
    for group in groups if grace else ():
        group.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(group.is_running() for group in groups):
        for key, _ in selector.select(timeout=0.1):
            group, rank = key.data
            messages = group.channels[rank].receive()
            if messages is None:
                selector.unregister(key.fileobj)
            for message in messages or ():
                heard(group, rank, message)
    for group in groups:
        group.close(selector)


def _visible(gpus: tuple[int, ...]) -> list[str]:
    """Names of the GPUs with these numbers, among those this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(max(gpus) + 1)]
    return [names[number] for number in gpus]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def study_folder(name: str, study_id: str) -> Path:
    """Where this machine keeps a study's logs and the checkpoints of its running trials: one for each study alone."""
    readable = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)
    return Path("mlruns") / ".tune" / f"{readable[:_READABLE].lstrip('.')}-{study_id}"


def scratch_folder(study: Path, trial: int, seed: int) -> Path:
    """Checkpoints of one training while its trial is not finished, in its study's folder."""
    return study / f"trial-{trial}-seed-{seed}"
