"""What long work shows on the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def program(name: str) -> str:
    """How to call ``name`` of this Python's environment from here: ``.venv/bin/mlflow`` where it is not activated."""
    folder = Path(sys.executable).parent
    if "VIRTUAL_ENV" not in os.environ and folder.is_relative_to(Path.cwd()) and (folder / name).exists():
        return str(folder.relative_to(Path.cwd()) / name)
    return name


@contextmanager
def progress_bar(title: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show ``title``, a bar, the rate and the time left on stderr; silent when stderr is no terminal.

    Yields:
        A function that moves the bar by a number of ``unit``.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    rate = TextColumn("{task.fields[rate]}")
    console = Console(stderr=True)
    with Progress(*columns, rate, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(count: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, advance=count, rate=f"{speed:,.0f}/s" if speed else "")

        yield advance
