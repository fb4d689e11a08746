"""A controller in a process of its own: ``python -m helpers.control STORAGE STUDY TOTAL OBJECTIVE``."""

from __future__ import annotations

import sys
from pathlib import Path

import optuna

from lightning_glue.execution.job import Job
from lightning_glue.execution.local import groups
from lightning_glue.execution.place import Division, places
from lightning_glue.tuning.controller import Controller, Running, study_folder
from lightning_glue.tuning.storage import open_storage
from lightning_glue.tuning.strategy import make_sampler
from lightning_glue.tuning.study import SharedStudy

HEARTBEAT = 3.0  # seconds; a busy machine must not take a controller for dead


class Silent:
    def changed(self, running: list[Running]) -> None: ...

    def finished(self, trial: optuna.trial.FrozenTrial, runs: list[str]) -> None: ...


def share(
    storage: str,
    name: str,
    total: int | None,
    *,
    retries: int = 2,
    heartbeat: float = HEARTBEAT,
    pruner: optuna.pruners.BasePruner | None = None,
):
    """A study of one parameter ``x`` between 0 and 1; ``total`` None: its queue is to be filled."""
    study = SharedStudy(
        name,
        open_storage(storage),
        make_sampler("random", seed=1),
        pruner or optuna.pruners.NopPruner(),
        {"space": {"x": "0 to 1"}},
        heartbeat=heartbeat,
        retries=retries,
    )
    if total is not None:
        study.fill_queue(total, [])
    return study


SPACE = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}


def make_job(running: Running, seed: int, checkpoints: Path) -> Job:
    return Job(running.parameters | {"seed": seed}, {}, str(checkpoints))


def control(study: SharedStudy, objective: str, *, seeds: int = 1, workers: int = 1, procs: int = 1) -> Controller:
    where = places(Division(workers=workers, procs=procs))
    executors = groups(where, f"helpers.cheap:{objective}", study_folder(study.name, study.id))
    return Controller(study, SPACE, make_job, executors, Silent(), seeds=seeds)


if __name__ == "__main__":
    storage, name, total, objective = sys.argv[1:5]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    control(share(storage, name, int(total)), objective).run()
