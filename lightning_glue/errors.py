"""The one exception a user is meant to read, and the entry point that prints it without a traceback."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable

from lightning_glue.addresses import hide_secrets


class UserError(Exception):
    """A mistake the user can mend: names what was found, what was expected and what to do."""


class Diverged(UserError):
    """The weights ceased to be numbers; ``where`` is the step."""

    def __init__(self, where: str, lr: float) -> None:
        super().__init__(f"the training diverged at {where}; lower optimizer.lr ({lr:g})")
        self.where = where


def suggest(found: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` for the valid name nearest to ``found``, else the list of valid names."""
    names = list(valid)
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(found.casefold(), folded, n=1, cutoff=0.5)
    return f"; did you mean {folded[near[0]]!r}?" if near else f"; expected one of: {', '.join(names)}"


def first_line(error: BaseException, most: int = 300) -> str:
    """What an error says, on one line and without passwords; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return hide_secrets(lines[0])[:most] if lines else type(error).__name__


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
