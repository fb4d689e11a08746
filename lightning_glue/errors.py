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


# What other programs of this field call what a key of ours sets.
_ELSEWHERE = {
    "learning_rate": "lr", "gradient_accumulation_steps": "accumulate", "update_freq": "accumulate",
    "max_seq_length": "max_tokens", "max_length": "max_tokens", "per_device_train_batch_size": "batch_size",
    "max_sentences": "batch_size", "fp16": "precision", "bf16": "precision", "devices": "gpus", "gpu": "gpus",
    "epochs": "max_epochs", "num_train_epochs": "max_epochs", "max_epoch": "max_epochs", "max_update": "max_steps",
    "early_stopping": "early_stopping_patience", "patience": "early_stopping_patience", "warmup": "warmup_ratio",
}  # fmt: skip


def suggest(found: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` for the valid names nearest to ``found``, else the list of valid names.

    Of a name with dots the last part counts most: ``lr`` and ``trainer.lr`` are ``optimizer.lr``.
    """
    names = {name.casefold(): name for name in valid}
    group, dot, last = found.casefold().rpartition(".")
    of_group = [name for name in names if dot and name.startswith(group + dot)]
    lasts = {name: name.rpartition(".")[2] for name in of_group or names}
    near = [name for name in names if name.rpartition(".")[2] in (last, _ELSEWHERE.get(last))]
    if not near and not of_group:
        near = difflib.get_close_matches(found.casefold(), names, n=1, cutoff=0.6)
    if not near and (of_group or not dot):
        similar = difflib.get_close_matches(last, set(lasts.values()), n=1, cutoff=0.6)
        near = [name for name in lasts if lasts[name] in similar]
    if near:
        return f"; did you mean {' or '.join(repr(names[name]) for name in near)}?"
    return f"; expected one of: {', '.join(names[name] for name in of_group or names)}"
