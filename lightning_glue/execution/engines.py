"""Where the slots of a search or a benchmark come from: this machine, or the nodes of a Ray cluster."""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lightning_glue.errors import ConfigError, UserError, suggest
from lightning_glue.execution.place import AUTO

if TYPE_CHECKING:
    from lightning_glue.execution.executor import Executor
    from lightning_glue.execution.joining import Files
    from lightning_glue.execution.place import Division

ENGINES = ("local", "ray")


class Engine(Protocol):
    """Gives slots, as a context manager: they end with it."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_: object) -> None: ...

    def gpus(self) -> int:
        """GPUs that there are."""

    def groups(self, how: Division, objective: str, folder: Path, files: Files | None = None) -> Sequence[Executor]:
        """A group of processes, not started yet, for every slot.

        Args:
            how: the devices are shared out.
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

    def groups(self, how: Division, objective: str, folder: Path, files: Files | None = None) -> Sequence[Executor]:
        from lightning_glue.execution.local import groups
        from lightning_glue.execution.place import places

        return groups(places(how), objective, folder)


def add_engine_options(parser: ArgumentParser, what: str) -> None:
    """``--engine`` and ``--address`` of a command that gives slots ``what``: trials or jobs."""
    parser.add_argument("--engine", default="local", metavar="NAME", help=f"where the {what} run: local (this machine, "
                        "the default) or ray (the nodes of a Ray cluster)")  # fmt: skip
    parser.add_argument("--address", metavar="HOST:PORT", help="of the Ray cluster, or auto (default: RAY_ADDRESS; "
                        "without it a cluster of this machine alone)")  # fmt: skip


def count_or_auto(text: str) -> int | str:
    """A number of trainings at a time, as a command line gives it."""
    if text == AUTO:
        return text
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r}; expected a number or {AUTO}") from None


def check_counts(request: Any, names: Iterable[str]) -> None:
    """Raise UserError where one of these attributes is no number above 0; ``workers`` may be ``auto`` here."""
    for name in names:
        value = getattr(request, name)
        if value is None or (name, value) == ("workers", AUTO):
            continue
        if not isinstance(value, int):
            raise UserError(f"{name}={value!r}; expected a number")
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected at least 1")
    if request.workers == AUTO and request.engine != "local":
        raise UserError(f"--workers auto measures this machine; give a number with --engine {request.engine}")


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
