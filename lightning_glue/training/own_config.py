"""The configuration of a run that goes on: its own, with what says where it is to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_glue import config as configuration
from lightning_glue.config import Config
from lightning_glue.errors import ConfigError


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
        if key in identity and shown[key] != own[key]:
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
