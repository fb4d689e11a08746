"""The command line: arguments, errors on one line, commands to type next, progress of long work."""

from __future__ import annotations

import argparse
import errno
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NoReturn

from lightning_glue.errors import UserError
from lightning_glue.utils.files import CANNOT_WRITE
from lightning_glue.utils.logs import log
from lightning_glue.utils.redact import hide_secrets
from lightning_glue.utils.streams import outlive_output

_OF_A_PATH = CANNOT_WRITE | {errno.ENOENT, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
LINE_SECONDS = 60.0  # between two lines of progress, and before the first


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


_bars: ContextVar[bool] = ContextVar("bars", default=True)


@contextmanager
def no_bars() -> Iterator[None]:
    """Within, progress is lines of the logger even on a terminal: nothing is drawn there."""
    token = _bars.set(False)
    try:
        yield
    finally:
        _bars.reset(token)


def draws_bars() -> bool:
    """Whether progress is drawn: stderr is a terminal, and nobody has forbidden it."""
    return _bars.get() and sys.stderr.isatty()


class ProgressLines:
    """Progress of long work where nothing is drawn: every so often a line with amount, rate and time left.

    Args:
        title: what is being done.
        shown: an amount in words.
        every: seconds between two lines, and before the first.
    """

    def __init__(self, title: str, shown: Callable[[float], str], every: float = LINE_SECONDS) -> None:
        self.title, self.shown, self.every = title, shown, every
        self._begin = self._next = time.monotonic()
        self._first: float | None = None  # amount that was there before: a download that goes on
        self._next += every

    def update(self, done: float, total: float | None) -> None:
        """Args: done, total: amounts so far and in all; None: nobody knows."""
        moment = time.monotonic()
        self._first = done if self._first is None else self._first
        if moment < self._next:
            return
        self._next = moment + self.every
        rate = (done - self._first) / max(moment - self._begin, 1e-9)
        left = f", {time.strftime('%H:%M:%S', time.gmtime((total - done) / rate))} left" if total and rate else ""
        log.info("%s: %s%s, %s/s%s", self.title, self.shown(done), f" of {self.shown(total)}" if total else "",
                 self.shown(rate), left)  # fmt: skip


@contextmanager
def progress_bar(title: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Show ``title``, a bar, the rate and the time left on stderr; where that is no terminal, a line a minute.

    Args:
        total: None: nobody knows.

    Yields:
        A function that moves the bar by a number of ``unit``.
    """
    if not draws_bars():
        lines, done = ProgressLines(title, lambda amount: f"{amount:,.0f} {unit}"), 0

        def count_up(count: int) -> None:
            nonlocal done
            done += count
            lines.update(done, total)

        lines.update(0, total)
        yield count_up
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    rate = TextColumn("{task.fields[rate]}")
    with Progress(*columns, rate, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(count: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, advance=count, rate=f"{speed:,.0f}/s" if speed else "")

        yield advance


def clock(seconds: float) -> str:
    """``0:01:30``; hours are not cut at a day."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _meant(path: str) -> str:
    """The path in a user's eyes: files are written under a name of their own beside the one that was asked for."""
    return hide_secrets(str(Path(path).parent) if path.endswith(".part") else path)


def run_main(main: Callable[[], None], outlives_output: bool = False) -> None:
    """Run a command-line ``main``; a :class:`UserError` becomes one line on stderr and exit code 2, and so does a path
    that cannot be used.

    Args:
        outlives_output: that a full disk or a closed pipe took what was printed is no failure: the result is elsewhere.
    """
    stdout = outlive_output()
    try:
        main()
    except UserError as error:
        print(f"error: {hide_secrets(str(error))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _OF_A_PATH or not error.filename:
            raise
        path = _meant(str(error.filename))
        print(
            f"error: {path}: {error.strerror}; expected a path that can be used, with rights and room", file=sys.stderr
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if stdout is None:
        return
    stdout.flush()
    if stdout.lost and not isinstance(stdout.lost, BrokenPipeError):  # as of `| head`, which has all it wanted
        kind = "warning" if outlives_output else "error"
        print(f"{kind}: what was printed is not complete: {stdout.lost.strerror}", file=sys.stderr)
    if stdout.lost and not outlives_output:
        sys.exit(1)
