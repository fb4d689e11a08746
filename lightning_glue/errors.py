"""The exceptions a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: names what was found, what was expected and what to do."""


class ConfigError(UserError):
    """A configuration that cannot be meant: an unknown task, model or key, a value outside its range."""


class DataError(UserError):
    """Texts, labels or their files that are missing, damaged, or not what the task wants."""


class CheckpointError(UserError):
    """A model file or folder that is missing, damaged, or of another kind."""


class TrackingError(UserError):
    """MLflow, or the journal of a run, cannot be used; or a run is not there."""


class Diverged(UserError):
    """The weights ceased to be numbers; ``where`` is the step."""

    def __init__(self, where: str, lr: float) -> None:
        super().__init__(f"the training diverged at {where}; lower optimizer.lr ({lr:g})")
        self.where = where


class OutOfMemory(UserError):
    """The longest batch does not fit into the memory of the device."""


class Interrupted(KeyboardInterrupt):
    """A training or a search that a library's caller asked for was told to stop, and did so in order.

    Attributes:
        run_id: of the run, which is KILLED; empty where there was none yet.
    """

    def __init__(self, text: str, run_id: str = "") -> None:
        super().__init__(text)
        self.run_id = run_id


def suggest(found: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` for the valid name nearest to ``found``, else the list of valid names."""
    names = list(valid)
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(found.casefold(), folded, n=1, cutoff=0.5)
    return f"; did you mean {folded[near[0]]!r}?" if near else f"; expected one of: {', '.join(names)}"
