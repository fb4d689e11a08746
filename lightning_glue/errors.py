"""The exceptions a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
