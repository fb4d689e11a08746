"""A configuration as dotted keys, and what of it makes two trainings the same training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lightning_glue.config.check import checked
from lightning_glue.config.schema import Config
from lightning_glue.utils.redact import hide_secrets

_DESCRIPTION = ("task", "description")


def flatten(config: Config) -> dict[str, Any]:
    """The whole configuration as dotted keys, with the learning rate in force."""
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": part for key, part in value.items() if (name, key) != _DESCRIPTION})
        else:
            flat[name] = value
    flat["optimizer.lr"] = config.lr
    if config.task.description:  # a built-in task has none, and the keys that its runs always had
        flat[".".join(_DESCRIPTION)] = config.task.description
    return flat


# Where and how a run is carried out; none of these keys changes what comes out beyond rounding.
_PLACE = {
    "trainer.preflight",
    "trainer.auto_batch",
    "trainer.cuda_graphs",
    "trainer.gpus",
    "trainer.procs",
    "trainer.checkpoint_every_steps",
    "trainer.checkpoint_every_minutes",
    "data.glue_dir",
    "data.bpe_dir",
}


_CHOSEN = {"trainer.accumulate", "trainer.val_check_interval"}  # what auto_batch changes


def recorded(config: Config) -> dict[str, Any]:
    """:func:`flatten` without the passwords of addresses: what is kept of a configuration, wherever that is."""
    return {key: hide_secrets(value) if isinstance(value, str) else value for key, value in flatten(config).items()}


def identity(config: Config) -> dict[str, Any]:
    """The keys of :func:`flatten` that make two trainings the same training.

    With ``trainer.auto_batch`` not the two that follow from the memory of the machine, see
    :mod:`lightning_glue.training.auto_batch`.
    """
    left_out = _CHOSEN if config.trainer.auto_batch else set()
    found = {key: value for key, value in flatten(config).items() if key not in left_out and decides(key)}
    name = ".".join(_DESCRIPTION)
    return found | {f"{name}.{key}": value for key, value in without_place(found.pop(name, None)).items()}


def decides(key: str) -> bool:
    """Whether a key changes what comes out of a training beyond rounding."""
    return key not in _PLACE and not key.startswith("tracking.")


def without_place(description: Mapping[str, Any] | None) -> dict[str, Any]:
    """A description without where its files lie and what is in them: that is compared as for every task, by split."""
    if not description:
        return {}
    return {**description, "files": {split: file["format"] for split, file in description["files"].items()}}


def digest(config: Config) -> str:
    """Hexadecimal digest of :func:`identity`."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:32]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as dictionaries: one for each group, single keys beside them."""
    groups: dict[str, Any] = {}
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        (groups.setdefault(group, {}) if group else groups)[name] = value
    return groups


def unflatten(flat: Mapping[str, Any]) -> Config:
    """The configuration that :func:`flatten` gave.

    Raises:
        UserError: a key is unknown or missing, or a value of the wrong type or outside its range.
    """
    return checked(Config, nested(flat))
