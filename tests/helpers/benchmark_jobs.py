"""Jobs of a benchmark that cost nothing, in real worker processes, and a driver of them.

As a program: ``python -m helpers.benchmark_jobs FOLDER ACTS join|alone`` works on the benchmark in a folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_glue.errors import UserError
from lightning_glue.execution.job import Fitted, Job
from lightning_glue.execution.local import groups
from lightning_glue.execution.place import Division, places
from lightning_glue.pipeline.driver import Driver, Running
from lightning_glue.pipeline.drivers import working
from lightning_glue.pipeline.graph import Graph, Node, make_graph
from lightning_glue.pipeline.ledger import Ledger
from lightning_glue.pipeline.teams import Team

GRAPH = make_graph({("MNLI", 1), ("RTE", 1), ("WNLI", 1)}, True, {"MNLI": 9.0, "RTE": 2.0, "WNLI": 1.0})


def objective(job: Any, report: Any, tell_run: Callable[[str], None]) -> Fitted:
    """Does what the job's act says; each start is a line in ``starts``, with the worker's pid."""
    folder, name, act = Path(job.checkpoints), job.todo["name"], job.todo["act"]
    rank = int(os.environ.get("RANK", "0"))
    with open(folder / "starts", "a") as file:
        file.write(f"{name} {os.getpid()} {rank}\n")
    if act == "die" or (act == "die once" and not (folder / f"died {name.replace('/', '.')}").exists()):
        (folder / f"died {name.replace('/', '.')}").touch()
        os.kill(os.getpid(), 9)
    if act == "user":
        raise UserError("no such file")
    if act == "error":
        raise RuntimeError("something else")
    if act.startswith("sleep"):
        time.sleep(float(act.split()[1]))
    while act.startswith("until") and act.split()[1] not in starts(folder):
        time.sleep(0.05)
    tell_run(f"run of {name}")
    return Fitted(f"run of {name}", {"dev/accuracy": 0.5}, None)


class Told:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def looked(self, running: list[Running]) -> None: ...

    def started(self, running: Running) -> None:
        self.lines.append((running.node.name, "started"))

    def ended(self, running: Running, state: str, why: str) -> None:
        self.lines.append((running.node.name, state))


def drive(
    folder: Path, acts: Mapping[str, str], *, graph: Graph = GRAPH, workers: int = 1, retries: int = 2,
    join: bool = False, ddp: bool = False,
) -> tuple[Driver, Told]:  # fmt: skip
    """Work on a benchmark as the command does; the driver, when it is through."""
    made = groups(places(Division(workers=workers)), "helpers.benchmark_jobs:objective", folder / "logs")
    teams = [Team(group, frozenset([number])) for number, group in enumerate(made)]
    if ddp:
        (wide,) = groups(places(Division(workers=1, procs=2)), "helpers.benchmark_jobs:objective", folder / "ddp")
        teams.append(Team(wide, frozenset([0, 1]), "ddp"))

    def make_job(node: Node, team: Team) -> Job:
        return Job({}, {}, str(folder), todo={"kind": node.kind, "name": node.name, "act": acts.get(node.name, "")})

    with working(folder, join=join) as (this, _):
        ledger, told = Ledger(folder / "ledger.jsonl", this.session, this.id), Told()
        driver = Driver(folder, graph, ledger, teams, make_job, told, retries=retries)
        driver.run()
    return driver, told


def starts(folder: Path) -> list[str]:
    """The jobs in the order in which they were started."""
    path = folder / "starts"
    return [line.split(" ")[0] for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    finished, _ = drive(Path(sys.argv[1]), json.loads(sys.argv[2]), join=sys.argv[3] == "join")
    sys.exit(finished.stopped_by or 0)
