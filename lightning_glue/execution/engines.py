"""Where the slots of a search or a benchmark come from: this machine, or the nodes of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lightning_glue.errors import ConfigError, UserError, suggest

if TYPE_CHECKING:
    from lightning_glue.execution.executor import Executor
    from lightning_glue.execution.joining import Files

ENGINES = ("local", "ray")


class Engine(Protocol):
    """Gives slots, as a context manager: they end with it."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_: object) -> None: ...

    def gpus(self) -> int:
        """GPUs that there are."""

    def groups(
        self,
        *,
        workers: int | None,
        gpus: int,
        gpus_per_trial: int,
        trials_per_gpu: int,
        procs: int,
        objective: str,
        folder: Path,
        files: Files | None = None,
    ) -> Sequence[Executor]:
        """A group of processes, not started yet, for every slot.

        Args:
            workers: as many as this in all, instead of as many as there is room for.
            gpus: of those that there are; 0: the CPU.
            gpus_per_trial, procs: processes of a slot, on GPUs and on the CPU.
            objective: ``module:function`` that trains a job, see :data:`~lightning_glue.execution.job.Objective`.
            folder: for the logs of the processes.
            files: what must be the same wherever a slot is.

        Raises:
            UserError: there is no room for a single one.
        """


class LocalEngine:
    """This machine, shared out by :func:`~lightning_glue.execution.place.places`."""

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __str__(self) -> str:
        return "this machine"

    def gpus(self) -> int:
        import torch

        return torch.cuda.device_count()

    def groups(
        self,
        *,
        workers: int | None,
        gpus: int,
        gpus_per_trial: int,
        trials_per_gpu: int,
        procs: int,
        objective: str,
        folder: Path,
        files: Files | None = None,
    ) -> Sequence[Executor]:
        from lightning_glue.execution.local import groups
        from lightning_glue.execution.place import places

        where = places(
            workers=workers, gpus=gpus, gpus_per_trial=gpus_per_trial, trials_per_gpu=trials_per_gpu, procs=procs
        )
        return groups(where, objective, folder)


def check_engine(name: str, address: str | None) -> None:
    """Raise UserError where they cannot be meant."""
    if name not in ENGINES:
        raise ConfigError(f"unknown --engine {name!r}{suggest(name, ENGINES)}")
    if address is not None and name != "ray":
        raise ConfigError(f"--address {address} is that of a Ray cluster; add --engine ray")


def count_gpus(asked: int | None, engine: Engine) -> int:
    """How many of the engine's GPUs to use.

    Args:
        asked: None: all; 0: the CPU.

    Raises:
        UserError: there are not so many.
    """
    if asked == 0:
        return 0
    there = engine.gpus()
    if asked is not None and asked > there:
        raise UserError(f"--gpus {asked}: {engine} shows {there} CUDA devices")
    return there if asked is None else asked


def open_engine(name: str, address: str | None) -> Engine:
    """The engine of that name.

    Args:
        name: ``local`` or ``ray``.
        address: of a Ray cluster, ``host:port``, or ``auto`` for the one this machine is a node of. None: what
            RAY_ADDRESS says, else a cluster of this machine alone, which ends with the engine.

    Raises:
        UserError: there is no such engine, Ray is not installed, or its cluster cannot be used from here.
    """
    check_engine(name, address)
    if name == "local":
        return LocalEngine()
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise UserError("--engine ray needs Ray, which is not installed; run: pip install 'lightning-glue[ray]'")
    from lightning_glue.execution.ray_engine import RayEngine

    return RayEngine(address or os.environ.get("RAY_ADDRESS"))
