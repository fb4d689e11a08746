"""The configuration of a run that goes on: its own, with what says where it is to go on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.errors import ConfigError

# What the name of a group of conf/ stands for: it must be the run's own.
_GROUPS = {"task": ["task.name"], "model": ["model.name", "model.source"], "data": ["data.source", "task.description"]}


def asked_keys(reference: str, named: Mapping[str, str | None], overrides: Iterable[str]) -> set[str]:
    """The keys of the configuration that somebody who resumes a run has asked for.

    Args:
        named: task, model, data and experiment, as far as they were named.
        overrides: ``key=value``, or the choice of a group: ``task=MNLI``.

    Raises:
        ConfigError: an experiment was named.
    """
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    keys = {"model.architecture" if key.startswith("model.architecture.") else key for key in keys}
    keys |= {name for name, value in named.items() if value is not None}
    if recipe := named.get("experiment") or next((key for key in keys if key.startswith("experiments")), None):
        raise ConfigError(
            f"--resume {reference}: the run goes on with its own configuration, not with the experiment {recipe}; "
            "leave --experiment out"
        )
    return {part for key in keys for part in _GROUPS.get(key, [key])}


def _check_description(reference: str, asked: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ConfigError where ``--data`` describes other data than a run's, wherever the files lie."""
    for key in sorted(asked.keys() | own.keys()):
        if asked.get(key) != own.get(key):
            values = [str(said.get(key))[:80] for said in (asked, own)]
            raise ConfigError(
                f"--resume {reference}: {key} of --data, {values[0]}, contradicts the run's, {values[1]}; leave "
                "--data out"
            )


def continued(reference: str, own: dict[str, Any], present: Config, given: set[str]) -> Config:
    """The configuration of a run to resume.

    Args:
        reference: how the run was named.
        own: the run's configuration, by dotted keys.
        present: the configuration that is asked for.
        given: keys of it that were asked for.

    Raises:
        UserError: one of them contradicts the run's own configuration.
    """
    own = configuration.flatten(configuration.compose()) | own  # keys that are newer than the run
    asked, shown = configuration.flatten(present), configuration.recorded(present)
    identity = configuration.identity(configuration.unflatten(own))
    for key in given & asked.keys():
        if key == "task.description":
            asked_for, of_run = (configuration.without_place(said.get(key)) for said in (asked, own))
            _check_description(reference, asked_for, of_run)
        elif key in identity and shown[key] != own[key]:
            raise ConfigError(
                f"--resume {reference}: {key}={asked[key]} contradicts the run's {own[key]}; leave it out"
            )
    here = {key: asked[key] for key in given & asked.keys()}
    for key in ("data.glue_dir", "data.bpe_dir"):  # the run may have begun on another machine, or elsewhere on this one
        if own.get(key) and not Path(own[key]).expanduser().is_dir():
            here.setdefault(key, asked[key])
    if asked["tracking.uri"] or "***" in str(own["tracking.uri"]):
        here["tracking.uri"] = asked["tracking.uri"]  # what was recorded may lack the password
    return configuration.unflatten(own | here)
