"""The process beside a training: delivers its journals, samples the machine, and outlives it to tell how it ended.

It reads the folders of journals from its standard input, one a line, and ends when that is closed and every journal is
delivered, or the server has been away for too long; then ``python -m lightning_glue.sync`` delivers the rest.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path

from lightning_glue.config.paths import ROOT
from lightning_glue.tracking.client import get_ready
from lightning_glue.tracking.courier import Courier
from lightning_glue.tracking.journal import Journal, is_alive, now, try_lock
from lightning_glue.tracking.pruning import prune
from lightning_glue.tracking.state import State
from lightning_glue.tracking.uploads import Undelivered
from lightning_glue.utils.processes import PARENT
from lightning_glue.utils.quick_imports import quick_imports
from lightning_glue.utils.redact import first_line

_POLL_SECONDS = 0.3  # each delivery costs the same however much it brings
_BACKOFF = (0.5, 15.0)  # seconds between attempts while the server is away: the first, the longest
_LINGER_SECONDS = 60.0  # how long it keeps trying once the training has ended
_SAMPLE = b'{"metrics":[["system/'  # what a sample's record begins with
_WATCHED = "watched"  # lock of the process that has the journal under watch

_process: subprocess.Popen[bytes] | None = None  # this process's watcher
_home = ""  # its working directory, where MLflow's default database is


def is_watching(folder: Path) -> bool:
    """Whether a process has this journal under watch; one that was just told of it may not have yet."""
    with suppress(OSError), try_lock(folder / _WATCHED, shared=True) as free:
        return not free
    return False


def watch(folder: Path | None = None) -> None:
    """Hand a journal to this process's watcher, which is started if need be. More than once does no harm.

    Args:
        folder: the journal; None only starts the watcher, which takes two seconds to get ready.

    Raises:
        OSError: no process can be started.
    """
    global _process
    for _ in range(2):
        if _process is None or _process.poll() is not None or os.getcwd() != _home:
            _start()
        if folder is None:
            return
        assert _process and _process.stdin
        try:
            _process.stdin.write(os.fsencode(json.dumps(str(folder.resolve())) + "\n"))
            return
        except BrokenPipeError:  # it has just died
            _process.stdin.close()
            _process = None


def _start() -> None:
    global _process, _home
    if _process and _process.stdin:
        _process.stdin.close()  # it ends when its journals are delivered
    _home = os.getcwd()
    _process = subprocess.Popen(
        [sys.executable, "-m", "lightning_glue.tracking.watcher"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd=_home,
        start_new_session=True,  # Ctrl-C and a scheduler's signals are for the training
        env={**_own_environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )


def _own_environment() -> dict[str, str]:
    """Without what makes the processes of a training end with it."""
    return {name: value for name, value in os.environ.items() if name != PARENT}


def give_final_status(journal: Journal) -> None:
    """Give a training that is gone without a word its true status; nothing where there is none to be had.

    FAILED where a process of it left a traceback: Lightning then kills the first process, which would have said so.

    Raises:
        OSError: the disk is full, for instance.
    """
    folder = journal.folder
    if journal.status() is not None or not (journal.start() or State(folder).run_id):
        return
    with try_lock(folder / "alive", shared=True) as gone:
        if not gone:  # it was resumed just now
            return
        crashes = sorted(folder.glob("traceback*.txt"))
        for crash in crashes:
            with suppress(OSError):  # the status counts more
                target = journal.artifact(crash.name)
                target.parent.mkdir(exist_ok=True)
                crash.replace(target)
                journal.append({"artifact": crash.name})
        journal.append({"status": ["FAILED" if crashes else "KILLED", now()]})


class Sampler(threading.Thread):
    """MLflow's own samples of CPU, memory, disk, network and GPU, into the journal."""

    def __init__(self, folder: Path, seconds: float, step: int) -> None:
        super().__init__(daemon=True)
        self.journal, self.seconds, self.step = Journal(folder), seconds, step
        self.stopped = threading.Event()

    def run(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id="", tracking_uri="")
        monitor.publish_metrics = self._append  # type: ignore[method-assign]
        while True:
            monitor.collect_metrics()
            if self.stopped.wait(self.seconds):
                return
            monitor.publish_metrics(monitor.aggregate_metrics())
            for one in monitor.monitors:
                one.clear_metrics()

    def _append(self, metrics: dict[str, float]) -> None:
        time_ms = now()
        with suppress(OSError):  # a full disk; the next sample may have room
            self.journal.append({"metrics": [[f"system/{k}", v, time_ms, self.step] for k, v in metrics.items()]})
            self.step += 1


def make_sampler(journal: Journal) -> Sampler | None:
    """None where the run wants no samples; goes on behind the last one."""
    seconds = (journal.start() or {}).get("system_metrics")
    if not seconds:
        return None
    last = journal.newest(_SAMPLE)
    return Sampler(journal.folder, seconds, 1 + last[0]["metrics"][0][3] if last else 0)


class Watch:
    """One journal under watch, which nothing but its end or its training's ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.journal, self.courier = folder, Journal(folder), Courier(folder, background=True)
        self.delay, self.due = 0.0, 0.0
        self.ended: float | None = None
        self.concluded = self.sampled = False
        self.sampler: Sampler | None = None
        self.noted = ""
        self.lock = ExitStack()
        self.held = False

    def tend(self) -> bool:
        """Do what is to be done now; whether there will be more."""
        if not self.journal.path.exists():  # it was taken back, or removed
            return self._leave()
        try:
            alive = self._look()
            if time.monotonic() < self.due:
                return True
            self.courier.deliver(last=not alive)
            self.delay = 0.0
            if alive and not self.sampled:
                self._sample()
            more = alive or not State(self.folder).is_delivered(self.journal.end())
            if not alive and not self.concluded and not more:  # nothing can be written, but it can be told
                self.courier.terminate("FAILED")
            if self.ended and time.monotonic() - self.ended > _LINGER_SECONDS and self.courier.uploads_fail():
                more = False
            if not more:
                with suppress(OSError):  # a full disk, for instance: it stays as it is
                    prune(self.folder)
            return more or self._leave()
        except Undelivered:
            return self._later() or self._leave()
        except Exception as error:  # of any library: it may pass by like a server that is away
            self._note(error)
            return self._later() or self._leave()

    def _look(self) -> bool:
        """Whether the training is at work; one that has gone without a word gets its status."""
        if not self.held:
            with ExitStack() as attempt:
                self.held = attempt.enter_context(try_lock(self.folder / _WATCHED))
                self.lock = attempt.pop_all() if self.held else self.lock
        if is_alive(self.folder):
            self.ended, self.concluded = None, False
            return True
        if self.sampler:
            self.sampler.stopped.set()
        self.sampler, self.sampled = None, False
        self.ended = self.ended or time.monotonic()
        if not self.concluded:
            with suppress(OSError):  # the disk is full, which most likely ended the training
                give_final_status(self.journal)
                self.concluded = True
        return False

    def _sample(self) -> None:
        self.sampled = True
        self.sampler = make_sampler(self.journal)
        if self.sampler:
            self.sampler.start()

    def _later(self) -> bool:
        """Wait longer than the last time; False where it has been long enough."""
        if self.ended and time.monotonic() - self.ended > _LINGER_SECONDS:
            return False
        self.delay = min(max(2 * self.delay, _BACKOFF[0]), _BACKOFF[1])
        self.due = time.monotonic() + self.delay
        return not (self.courier.state.fatal and self.ended)

    def _leave(self) -> bool:
        if self.sampler:
            self.sampler.stopped.set()
        self.lock.close()
        return False

    def _note(self, error: Exception) -> None:
        """Write down what nobody expected: for the training to tell, and whole."""
        text = first_line(error)
        if text == self.noted:
            return
        self.noted = text
        with suppress(OSError), try_lock(self.folder / "delivery.lock") as mine:
            if mine:
                state = State(self.folder)
                state.record_error = text
                state.save()
        with suppress(OSError), open(self.folder / "watcher.log", "a") as file:
            traceback.print_exc(file=file)


def _read_folders(found: queue.SimpleQueue[Path | None]) -> None:
    for line in sys.stdin.buffer:
        found.put(Path(json.loads(os.fsdecode(line))))
    found.put(None)


def main() -> None:
    found: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
    threading.Thread(target=_read_folders, args=(found,), daemon=True).start()
    with suppress(Exception), quick_imports():  # what is wrong shows again, and is noted, where a journal is delivered
        get_ready()  # while the training imports torch and builds its model
    watches: dict[Path, Watch] = {}
    closed = False
    while watches or not closed:
        try:
            folder = found.get(timeout=_POLL_SECONDS)
            closed = closed or folder is None
            if folder and folder not in watches:
                watches[folder] = Watch(folder)
        except queue.Empty:
            pass
        watches = {folder: watch for folder, watch in watches.items() if watch.tend()}
        if closed:
            time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    main()
