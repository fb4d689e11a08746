"""Texts in files of Hydra's, where ``${`` begins an interpolation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def escaped(value: Any) -> Any:
    """A value of a configuration as a file of Hydra's may have it: no text in it is an interpolation."""
    return _mapped(value, lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def unescaped(value: Any) -> Any:
    """What :func:`escaped` was given."""
    return _mapped(value, lambda text: re.sub(r"(\\*)\\\$\{", lambda found: found[1][::2] + "${", text))


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list | tuple) else value
