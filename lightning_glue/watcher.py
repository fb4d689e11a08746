"""The process beside a training: delivers its journals, samples the machine, and outlives it to tell how it ended.

It reads the folders of journals from its standard input, one a line, and ends when that is closed and every journal is
delivered, or the server has been away for too long; then ``python -m lightning_glue.sync`` delivers the rest.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from lightning_glue import config as configuration
from lightning_glue.delivery import Courier, Undelivered
from lightning_glue.journal import Journal, Record, final_status, is_alive, now
from lightning_glue.processes import PARENT

_POLL_SECONDS = 0.2
_BACKOFF = (0.5, 15.0)  # seconds between attempts while the server is away: the first, the longest
_LINGER_SECONDS = 60.0  # how long it keeps trying once the training has ended

_process: subprocess.Popen[str] | None = None  # this process's watcher
_home = ""  # its working directory, where MLflow's default database is


def is_watching() -> bool:
    return _process is not None and _process.poll() is None


def watch(folder: Path | None = None) -> None:
    """Hand a journal to this process's watcher, which is started if need be.

    Args:
        folder: the journal; None only starts the watcher, which takes two seconds to get ready.
    """
    global _process, _home
    if not is_watching() or os.getcwd() != _home:
        if _process and _process.stdin:
            _process.stdin.close()  # it ends when its journals are delivered
        _home = os.getcwd()
        _process = subprocess.Popen(
            [sys.executable, "-m", "lightning_glue.watcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C and a scheduler's signals are for the training
            env={**_own_environment(), "PYTHONPATH": os.pathsep.join([str(configuration.ROOT), *sys.path])},
        )
    if folder:
        assert _process.stdin
        _process.stdin.write(f"{folder.resolve()}\n")
        _process.stdin.flush()


def _own_environment() -> dict[str, str]:
    """Without what makes the processes of a training end with it."""
    return {name: value for name, value in os.environ.items() if name != PARENT}


def conclude(journal: Journal) -> None:
    """Give a training that is gone without a word its true status.

    FAILED where a process of it left a traceback: Lightning then kills the first process, which would have said so.
    """
    if final_status(journal.read()) is not None:
        return
    crashes = sorted(journal.folder.glob("traceback*.txt"))
    for crash in crashes:
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
        self.journal.append({"metrics": [[f"system/{k}", v, time_ms, self.step] for k, v in metrics.items()]})
        self.step += 1


def make_sampler(folder: Path, records: list[tuple[Record, int]]) -> Sampler | None:
    (start,) = (record["start"] for record, _ in records[:1])
    if not start["system_metrics"]:
        return None
    taken = [point[3] for record, _ in records for point in record.get("metrics", ()) if point[0].startswith("system/")]
    return Sampler(folder, start["system_metrics"], max(taken, default=-1) + 1)


class Watch:
    """One journal under watch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.journal, self.courier = folder, Journal(folder), Courier(folder)
        self.delay, self.due = 0.0, 0.0
        self.ended: float | None = None
        self.sampler: Sampler | None = None

    def tend(self) -> bool:
        """Do what is to be done now; whether there will be more."""
        alive = is_alive(self.folder)
        if not alive:
            if self.sampler:
                self.sampler.stopped.set()
            self.ended = self.ended or time.monotonic()
            try:
                conclude(self.journal)
            except OSError:  # the disk is full, which most likely ended the training
                self.courier.client.set_terminated(self.courier.state.run_id, "FAILED")
                return False
        if time.monotonic() < self.due:
            return True
        try:
            self.courier.deliver()
            self.delay = 0.0
        except Undelivered:
            if self.ended and time.monotonic() - self.ended > _LINGER_SECONDS:
                return False
            self.delay = min(max(2 * self.delay, _BACKOFF[0]), _BACKOFF[1])
            self.due = time.monotonic() + self.delay
            return not (self.courier.state.fatal and self.ended)
        if alive and not self.sampler:
            self.sampler = make_sampler(self.folder, self.journal.read())
            if self.sampler:
                self.sampler.start()
        return alive or self.courier.state.offset < self.journal.path.stat().st_size


def _read_folders(found: queue.SimpleQueue[Path | None]) -> None:
    for line in sys.stdin:
        found.put(Path(line.rstrip("\n")))
    found.put(None)


def get_ready() -> None:
    """Import MLflow while the training imports torch and builds its model."""
    import mlflow

    if not mlflow.get_tracking_uri().startswith("http"):
        import mlflow.store.tracking.sqlalchemy_store


def main() -> None:
    get_ready()
    found: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
    threading.Thread(target=_read_folders, args=(found,), daemon=True).start()
    watches: list[Watch] = []
    closed = False
    while watches or not closed:
        try:
            folder: Any = found.get(timeout=_POLL_SECONDS)
            closed = closed or folder is None
            if folder is not None:
                watches.append(Watch(folder))
        except queue.Empty:
            pass
        watches = [watch for watch in watches if _tend(watch)]
        if closed:
            time.sleep(_POLL_SECONDS)


def _tend(watch: Watch) -> bool:
    """Tend one journal; a failure, such as a full disk, is written down and ends only that one's watch."""
    try:
        return watch.tend()
    except Exception:
        with open(watch.folder / "watcher.log", "a") as file:
            traceback.print_exc(file=file)
        return False


if __name__ == "__main__":
    main()
