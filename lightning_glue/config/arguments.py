"""Keys of the configuration as a Python call names them: bare or dotted, values of Python's types."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from lightning_glue.config.compose import quote
from lightning_glue.config.schema import TuneConfig, keys
from lightning_glue.errors import ConfigError, suggest

Overrides: TypeAlias = Sequence[str] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Token:
    """A value in Hydra's grammar already."""

    text: str


# Where a task says what its recipe is; ``optimizer.lr``, ``data.batch_size`` and ``trainer.max_epochs`` take it up.
_RECIPE = ("task.lr", "task.batch_size", "task.max_epochs")


def make_overrides(
    flags: Mapping[str, Any], overrides: Overrides, named: Mapping[str, Any], *, tune: bool = False
) -> dict[str, Any]:
    """Dotted keys and their values; of a key that comes twice the last: flags, then ``overrides``, then ``named``.

    Args:
        named: by bare keys, such as ``max_epochs``.
        tune: whether the keys of a search count.

    Raises:
        ConfigError: a bare key is unknown or names several.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r}; expected a list, for example [{overrides!r}], or a dictionary")
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else [_split(entry) for entry in overrides]
    known = _bare(tune)
    for name, value in named.items():
        found = known.get(name, [])
        if not found:
            raise ConfigError(f"unknown key {name!r}{suggest(name, sorted(known))}")
        if len(found) > 1:
            dotted = " or ".join(f'overrides={{"{key}": ...}}' for key in found)
            raise ConfigError(f"{name!r} names {len(found)} keys; give {dotted}")
        pairs.append((found[0], value))
    return {**flags, **dict(pairs)}


def _bare(tune: bool) -> dict[str, list[str]]:
    """Dotted keys by their last part."""
    dotted = [key for key in keys() if key not in _RECIPE]
    dotted += [f"tune.{part.name}" for part in dataclasses.fields(TuneConfig)] if tune else []
    found: dict[str, list[str]] = {}
    for key in dotted:
        found.setdefault(key.rpartition(".")[2], []).append(key)
    return found


def _split(entry: object) -> tuple[str, Token]:
    key, equals, value = entry.partition("=") if isinstance(entry, str) else ("", "", "")
    if not equals:
        raise ConfigError(f"{entry!r} is no override; expected key=value, for example optimizer.lr=3e-5")
    return key, Token(value)


def to_overrides(given: Mapping[str, Any]) -> list[str]:
    """``key=value`` as :func:`lightning_glue.config.compose` takes them.

    Raises:
        ConfigError: a value is of a type that no key has.
    """
    return [f"{key}={_value(key, value)}" for key, value in given.items()]


def _value(key: str, value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, Token):
        return value.text
    if hasattr(value, "item") and not isinstance(value, Mapping):  # a number of NumPy or torch
        value = value.item()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, float):
        raise ConfigError(f"{key}={value}; expected a finite number")
    if isinstance(value, str | os.PathLike):
        return quote(os.fspath(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(_value(key, part) for part in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_value(key, part)}" for name, part in value.items()) + "}"
    raise ConfigError(f"{key} is a {type(value).__name__}; expected a text, a number, true or false, a list or None")
