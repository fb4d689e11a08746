"""Trials that cost nothing, for tests of what happens around them; run in real worker processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_glue.errors import UserError
from lightning_glue.execution.job import Outcome


def objective(job: Any, report: Callable[[int, float], bool], tell_run: Callable[[str], None]) -> Outcome:
    """``x``, reported twice; larger is better. ``CHEAP_SECONDS`` slows it down."""
    value = job.config["x"]
    for step in (1, 2):
        time.sleep(float(os.environ.get("CHEAP_SECONDS", "0")))
        if report(step, value):
            return Outcome(value, pruned=True, data={"train": "same"})
    return Outcome(value, data={"train": "same"})


def out_of_memory(job: Any, report: Callable[[int, float], bool], tell_run: Callable[[str], None]) -> Outcome:
    """No room for large ``x``."""
    if job.config["x"] > 0.5:
        raise torch.OutOfMemoryError("tried to allocate 1 PiB")
    return objective(job, report, tell_run)


def dies_once(job: Any, report: Callable[[int, float], bool], tell_run: Callable[[str], None]) -> Outcome:
    """The first attempt at each trial takes its process down."""
    mark = Path(job.checkpoints)
    if not mark.exists():
        mark.mkdir(parents=True)
        os.kill(os.getpid(), 9)
    return objective(job, report, tell_run)


def noisy(job: Any, report: Callable[[int, float], bool], tell_run: Callable[[str], None]) -> Outcome:
    """``x`` plus a tenth of the seed; below 0.2 it has collapsed."""
    values = job.config
    value = values["x"] + values["seed"] / 10
    report(1, value)
    return Outcome(value, collapsed=values["x"] < 0.2, data={"train": "same"})


def other_data(job: Any, report: Callable[[int, float], bool], tell_run: Callable[[str], None]) -> Outcome:
    return Outcome(0.5, data={"train": str(job.config["x"])})


def tells_itself(job: Any, report: Callable[[int, float], bool], tell_run: Callable[[str], None]) -> Outcome:
    """Its process and that one's parent, before it does what ``then`` says: die, or sleep for an hour."""
    tell_run(f"{os.getpid()} {os.getppid()}")
    if job.config.get("then") == "die":
        os.kill(os.getpid(), 9)
    if job.config.get("then") == "sleep":
        time.sleep(3600)
    stop = report(1, 0.5)
    seen = ("PWD", "RAY_AUTH_MODE", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "MLFLOW_TRACKING_URI")
    return Outcome(0.5, pruned=stop, data={"cwd": os.getcwd()} | {name: os.environ.get(name, "") for name in seen})


def rate(job: Any, report: Callable[[int, float], bool], tell_run: Callable[[str], None]) -> Outcome:
    """As fast as ``rates`` says of its number of threads; it has no room where that is 0."""
    value = job.config["rates"][os.environ["OMP_NUM_THREADS"]]
    if value == "mistake":
        raise UserError("no such model")
    if not value:
        os.kill(os.getpid(), 9)
    report(1, 0.0)
    return Outcome(value)
