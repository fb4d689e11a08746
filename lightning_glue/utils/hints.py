"""What a user types next: a target of make in a folder that has them, else the program itself."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_glue.utils.console import command, program

# Variables of the Makefile and what they are to a command; an empty flag is an argument by itself.
_FLAGS = {
    "RUN": "",
    "TASK": "--task",
    "MODEL": "--model",
    "GPUS": "--gpus",
    "EXPERIMENT": "--experiment",
    "INIT_FROM": "--init-from",
    "RESUME": "--resume",
}
_LIGHT = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"  # MLflow's own evaluation jobs: seven more processes


def has_targets() -> bool:
    """Whether the current folder has the project's Makefile."""
    try:
        return "-m lightning_glue.train" in Path("Makefile").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def hint(target: str, given: Mapping[str, str], arguments: Sequence[str] = ()) -> str:
    """How ``python -m lightning_glue.<target>`` is called from here.

    Args:
        given: values of the Makefile's variables, such as RUN.
        arguments: whatever else the command takes.
    """
    if has_targets():
        return make(target, given, arguments)
    flags = [part for name, value in given.items() for part in (_FLAGS[name], value) if part]
    return command("python", "-m", f"lightning_glue.{target}", *flags, *arguments)


def make(target: str, given: Mapping[str, str], arguments: Sequence[str] = ()) -> str:
    """A command line of make. Only ARGS is split by the shell that make calls; make itself reads ``$$`` as ``$``."""
    values = {**given, **({"ARGS": shlex.join(arguments)} if arguments else {})}
    words = [f"{name}={shlex.quote(value.replace('$', '$$'))}" for name, value in values.items()]
    return " ".join(["make", target, *words])


def serve_pages(*arguments: str) -> str:
    """What serves MLflow's pages here, with one process: a quarter of the time and memory of plain ``mlflow ui``."""
    if has_targets():
        return make("ui", {}, arguments)
    return f"{_LIGHT} {shlex.join([program('mlflow'), 'ui', '--workers', '1', *arguments])}"
