"""What a benchmark looks like on the terminal: a live table, or a line per job where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from lightning_glue.pipeline.disk import work_folder
from lightning_glue.pipeline.graph import TRAIN, Graph, seconds_left, standing
from lightning_glue.pipeline.ledger import Ledger
from lightning_glue.pipeline.progress import Progress, read_progress
from lightning_glue.tasks import get_task
from lightning_glue.utils.console import clock

if TYPE_CHECKING:
    from lightning_glue.pipeline.driver import Running


_SILENT_SECONDS = 900.0  # of a training: no step, no batch of an evaluation, no word in the log


def pace(graph: Graph, ledger: Ledger, at_work: Mapping[str, tuple[float, float]]) -> float | None:
    """Seconds for a unit of cost, from trainings that are done, else from those at work; None before.

    Args:
        at_work: seconds so far and the share that is done of each training at work.
    """
    spent = work = 0.0
    for node in graph.values():
        done = ledger.entry(node.name).done
        if node.kind == TRAIN and done and done.get("seconds"):
            spent, work = spent + done["seconds"], work + node.cost
    if not work:
        for name, (seconds, share) in at_work.items():
            spent, work = spent + seconds * bool(share), work + graph[name].cost * share
    return spent / work if work else None


class Board:
    """Shows the jobs at work with their devices, rates and progress, how many are done, and the time left.

    Args:
        slots: jobs that run at once.
        shows: False: nothing.
    """

    def __init__(self, folder: Path, graph: Graph, ledger: Ledger, slots: int, *, shows: bool = True) -> None:
        self.folder, self.graph, self.ledger, self.slots = folder, graph, ledger, slots
        self.console = Console(stderr=True, quiet=not shows)
        self.live = Live(console=self.console, refresh_per_second=2) if shows and self.console.is_terminal else None
        self._told: set[tuple[str, float]] = set()  # of whose silence

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.update("")
            self.live.stop()

    def update(self, running: Sequence[Running]) -> None:
        now = time.time()
        if self.live:
            self.live.update(self.table(running, now))
        for one in running:
            self._mind_silence(one, now)

    def _mind_silence(self, one: Running, now: float) -> None:
        """Say once that a training may hang, and how it goes on from its checkpoint; whether it does, a human knows."""
        attempt = (one.node.name, one.since)
        if one.node.kind != TRAIN or now - one.since < _SILENT_SECONDS or attempt in self._told:
            return
        group, seen = one.team.group, read_progress(work_folder(self.folder, one.node.name))
        spoken = group.log.stat().st_mtime if group.log.is_file() else 0.0
        silent = now - max(one.since, spoken, seen.time if seen else 0.0)
        if silent < _SILENT_SECONDS:
            return
        self._told.add(attempt)
        numbers = " ".join(str(process.pid) for process in group.processes if hasattr(process, "pid"))
        self._print(
            f"{one.node.name} on {device(one)} gives no sign of life for {clock(silent)}; look into {group.log}. "
            f"If it hangs: kill -9 {numbers or 'its processes'}, and it is tried again from its checkpoint"
        )

    def started(self, running: Running) -> None:
        if not self.live:  # there it is seen
            again = "" if self.ledger.entry(running.node.name).attempts < 2 else ", once more"
            self._print(f"{running.node.name} begins on {device(running)}{again}")

    def ended(self, running: Running, state: str, why: str) -> None:
        """A line that stays."""
        node, metrics = running.node, self.ledger.metrics(running.node.name)
        name = get_task(node.task).selection_metric if node.task else ""
        value = f"  {name} {metrics[name]:.4f}" if state == "done" and name in metrics else ""
        reason = f"  ({why})" if why else ""
        again = ", is tried again" if state == "died" else ""
        spent = clock(time.time() - running.since)
        self._print(f"{node.name} {state}{again}{value}  {spent}{reason}  {self.counts()}")

    def _print(self, line: str) -> None:
        with suppress(OSError):  # nobody reads it any more
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def counts(self) -> str:
        done = len(self.ledger.done(self.graph))
        return f"{done} of {len(self.graph)} jobs done"

    def table(self, running: Sequence[Running], now: float) -> Table:
        table = Table("job", "device", "time", "done", "examples/s", "last value", expand=False, title_justify="left")
        at_work: dict[str, tuple[float, float]] = {}
        for one in sorted(running, key=lambda one: one.team.name):
            seen = read_progress(work_folder(self.folder, one.node.name)) if one.node.kind == TRAIN else None
            seen = seen if seen and seen.time >= one.since else None
            at_work[one.node.name] = (now - one.since, seen.fraction if seen else 0.0)
            table.add_row(one.node.name, device(one), clock(now - one.since), *_cells(seen))
        table.title = self._summary(at_work)
        return table

    def _summary(self, at_work: Mapping[str, tuple[float, float]]) -> str:
        done, failed = self.ledger.done(self.graph), self.ledger.failed(self.graph)
        now = standing(self.graph, done, failed)
        speed = pace(self.graph, self.ledger, at_work)
        shares = {name: share for name, (_, share) in at_work.items()}
        left = None if speed is None else seconds_left(self.graph, now.open, shares, speed, self.slots)
        elsewhere = [
            name
            for name in now.open - at_work.keys()
            if (seen := read_progress(work_folder(self.folder, name))) and time.time() - seen.time < 60
        ]
        parts = [f"{len(done)} done", f"{len(at_work)} here", f"{len(elsewhere)} elsewhere" if elsewhere else "",
                 f"{len(now.open) - len(at_work) - len(elsewhere)} to do",
                 f"{len(now.lost)} lost" if now.lost else "",
                 f"{'-' if left is None else clock(left)} left"]  # fmt: skip
        return "  ".join(part for part in parts if part)


def _cells(seen: Progress | None) -> list[str]:
    if seen is None:
        return ["-", "-", "-"]
    value = "-" if seen.value is None else f"{seen.value:.4f}"
    return [f"{seen.step}/{seen.steps}", f"{seen.rate:,.0f}" if seen.rate else "-", value]


def device(running: Running) -> str:
    """``GPU 0``, ``GPUs 0 1`` or ``slot 0`` of the CPU."""
    gpus = running.team.group.place.gpus
    if gpus:
        return f"GPU{'s' if len(gpus) > 1 else ''} {' '.join(map(str, gpus))}"
    several = running.team.group.place.processes
    return f"slot {running.team.name}" + (f", {several} processes" if several > 1 else "")
