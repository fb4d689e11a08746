"""The places where jobs run: slots, each with a warm process, and groups of several for DDP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_glue.execution.joining import Files
from lightning_glue.execution.place import AUTO, Division
from lightning_glue.execution.throughput import best_division
from lightning_glue.pipeline.graph import TRAIN, Node

if TYPE_CHECKING:
    from lightning_glue.execution.engines import Engine
    from lightning_glue.execution.executor import Executor
    from lightning_glue.pipeline.request import Benchmark

OBJECTIVE = "lightning_glue.pipeline.jobs:carry_out"
_LARGE = ("MNLI", "QQP")  # trained by several processes, where they may


@dataclass(eq=False)
class Team:
    """A group of worker processes and the slots that it takes while it is at work.

    Attributes:
        slots: numbers of them; teams that share one are never at work at once.
        suits: kinds of team that a job asks for: ``one`` process, a slot's ``procs``, ``ddp`` over several slots.
        ready: processes that have said that they are.
        stillborn: how often in a row its processes died before that.
    """

    group: Executor
    slots: frozenset[int]
    suits: str = "one"
    gpus: int = 0
    ready: int = 0
    stillborn: int = 0

    @property
    def name(self) -> str:
        return "+".join(map(str, sorted(self.slots)))

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of a training's configuration that say where it runs."""
        return {"trainer.gpus": str(self.gpus), "trainer.procs": 1 if self.gpus else self.group.place.processes}


def wanted(node: Node) -> Sequence[str]:
    """The kinds of team that may carry a job out, the best first."""
    if node.kind != TRAIN:
        return ("one",)
    return ("ddp", "procs", "one") if node.task in _LARGE else ("procs", "one")


def make_teams(benchmark: Benchmark, engine: Engine, objective: str = OBJECTIVE, *, shows: bool = False) -> list[Team]:
    """The teams that the engine has room for, none of them started."""
    request, gpus, config = benchmark.request, benchmark.gpus, benchmark.any_config
    workers, jobs_per_gpu = request.workers, request.jobs_per_gpu
    if workers == AUTO:
        how = best_division(Division(gpus=gpus), config, benchmark.folder / "logs" / "measured", shows=shows)
        workers, jobs_per_gpu = how.workers, how.trials_per_gpu
    files = Files(tuple(benchmark.configs), config["data.glue_dir"] if config["data.source"] == "glue" else None)

    def make(folder: str, **how: Any) -> Sequence[Executor]:
        logs = benchmark.folder / "logs" / folder
        division = Division(**({"workers": workers, "gpus": gpus} | how))
        return engine.groups(division, objective, logs, files)

    ones = make("slots", trials_per_gpu=jobs_per_gpu)
    teams = [Team(one, frozenset([number]), gpus=int(bool(gpus))) for number, one in enumerate(ones)]
    if request.procs > 1 and not gpus:
        several = make("procs", procs=request.procs)
        teams += [Team(one, frozenset([number]), "procs") for number, one in enumerate(several)]
    if request.ddp > 1:
        teams += _over_slots(request.ddp, gpus, len(ones), make)
    return teams


def _over_slots(ddp: int, gpus: int, slots: int, make: Any) -> list[Team]:
    """Teams of ``ddp`` processes: on whole GPUs, all jobs that share one counted, or on as many slots of the CPU."""
    if gpus:
        wide = make("ddp", workers=None, gpus_per_trial=ddp)
        first = range(0, gpus - ddp + 1, ddp)
        taken = [frozenset(slot for slot in range(slots) if slot % gpus in range(i, i + ddp)) for i in first]
        return [Team(one, numbers, "ddp", ddp) for one, numbers in zip(wide, taken)]
    count = slots // ddp
    wide = make("ddp", workers=count, procs=ddp) if count else []
    return [Team(one, frozenset(range(i * ddp, (i + 1) * ddp)), "ddp") for i, one in enumerate(wide)]
