"""Processes that run trials: each group is one trial's DDP processes, warm from one trial to the next."""

from __future__ import annotations

import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lightning_glue.channel import Channel, Message
from lightning_glue.launch import without_launcher

GRACE_SECONDS = 20.0  # between SIGTERM and SIGKILL


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

    def stop(self, selector: selectors.BaseSelector, grace: float = GRACE_SECONDS) -> None:
        """End every process and what it has started; SIGKILL after ``grace`` seconds."""
        for channel in self.channels:
            selector.unregister(channel)
        for process in self.processes:
            _signal_session(process, signal.SIGTERM if grace else signal.SIGKILL)
        deadline = time.monotonic() + grace
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            self._answer_reports()
        for process in self.processes:
            _signal_session(process, signal.SIGKILL)
            process.wait()
        for channel in self.channels:
            channel.close()
        self.processes, self.channels = [], []

    def _answer_reports(self) -> None:
        """Let a trial that waits for a decision go on to its orderly end."""
        readable, _, _ = select.select(self.channels[:1], [], [], 0.1)
        for message in (self.channels[0].receive() or []) if readable else []:
            if message["event"] == "report":
                self.send_to(0, {"prune": False})

    def last_words(self, lines: int = 15) -> str:
        """The end of the log."""
        if not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _signal_session(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _visible(gpus: tuple[int, ...]) -> list[str]:
    """Names of the GPUs with these numbers, among those this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(max(gpus) + 1)]
    return [names[number] for number in gpus]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def log_folder(study: str) -> Path:
    """Where this machine keeps a study's logs and the checkpoints of its running trials."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in study)
    return Path("mlruns") / ".tune" / safe


def scratch_folder(study: str, trial: int, seed: int) -> Path:
    """Checkpoints of one training while its trial is not finished."""
    return log_folder(study) / f"trial-{trial}-seed-{seed}"
