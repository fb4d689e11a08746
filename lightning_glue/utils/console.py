"""The command line: arguments, errors on one line, commands to type next, progress of long work."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from lightning_glue.errors import UserError
from lightning_glue.utils.redact import hide_secrets


def program(name: str) -> str:
    """How to call ``name`` of this Python's environment from here: ``.venv/bin/mlflow`` where it is not activated."""
    path = Path(sys.executable).parent / name
    if shutil.which(name) == str(path) or not path.exists():
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def command(name: str, *arguments: str) -> str:
    """A command line to be typed here: ``name`` as :func:`program` calls it, with what a shell would split quoted."""
    return shlex.join([program(name), *arguments])


class Parser(argparse.ArgumentParser):
    """Says on one line what is wrong with an argument, as all the other errors are said."""

    def error(self, message: str) -> NoReturn:
        optional = ", key=value"  # parse_intermixed_args counts it among what is missing
        self.exit(2, f"error: {message.removesuffix(optional)}; see {self.prog} --help\n")


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


def run_main(main: Callable[[], None]) -> None:
    """Run a command-line ``main``; a :class:`UserError` becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {hide_secrets(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
