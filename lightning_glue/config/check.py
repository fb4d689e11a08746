"""From composed values to the typed schema: types, choices and ranges, each error one line that names the key."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

from lightning_glue.config.schema import Part
from lightning_glue.errors import ConfigError, suggest

_Schema = TypeVar("_Schema", bound=Part)
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text", "list": "a list"}


def checked(schema: type[_Schema], values: Mapping[str, Any], prefix: str = "") -> _Schema:
    """``values``, nested as the schema is, as an instance of it.

    Args:
        prefix: of the keys in an error.

    Raises:
        UserError: a key is unknown or missing, or a value of the wrong type or outside its range.
    """
    from pydantic import ValidationError

    try:
        found = _validator(schema)(values)  # type: ignore[arg-type]  # mypy asks the instances, not the class, for a hash
    except ValidationError as error:
        raise ConfigError(_in_words(dict(error.errors()[0]), values, prefix)) from None
    _refuse_truth_for_number(found, values, prefix)
    return found


@cache
def _validator(schema: type[Any]) -> Callable[[Mapping[str, Any]], Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(schema).validate_python


def _in_words(fault: dict[str, Any], values: Any, prefix: str) -> str:
    """One line for an error of pydantic."""
    kind, context, names = fault["type"], fault.get("ctx", {}), []
    for part in fault["loc"]:  # behind the key stand the member of a union and the place in a list
        if isinstance(values, Mapping) and part in values:
            values = values[part]
            names.append(part)
    key, value = prefix + ".".join(names), _one_line(values)
    if kind == "missing":
        return f"{prefix}{'.'.join([*names, str(fault['loc'][-1])])} is missing"
    if kind == "unexpected_keyword_argument":
        return f"unknown key {key!r}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", context["expected"])
        return f"{key}={value}{suggest(str(value), choices)}"
    if kind == "finite_number":
        return f"{key}={value}; expected a finite number"
    if kind == "greater_than_equal":
        return f"{key}={value} is too small; expected at least {context['ge']:g}"
    if kind in ("greater_than", "less_than"):
        words = f"more than {context['gt']:g}" if "gt" in context else f"less than {context['lt']:g}"
        return f"{key}={value}; expected {words}"
    if kind == "less_than_equal":
        return f"{key}={value} is too large; expected at most {context['le']:.10g}"
    if kind == "expected":
        return f"{key}={value}; expected {context['words']}"
    expected = _KINDS.get(kind.partition("_")[0]) or fault["msg"]
    return f"{key}={value}; expected {expected}"


def _one_line(value: object) -> str:
    """A value in an error, of which a table for instance has many lines."""
    lines = str(value).splitlines()
    return lines[0].strip()[:300] if len(lines) > 1 else str(value)[:300]


def _refuse_truth_for_number(found: Any, values: Mapping[str, Any], prefix: str) -> None:
    """Python counts true as 1, and so does pydantic."""
    for part in dataclasses.fields(found):
        given, value = values.get(part.name), getattr(found, part.name)
        if dataclasses.is_dataclass(value) and isinstance(given, Mapping):
            _refuse_truth_for_number(value, given, f"{prefix}{part.name}.")
        elif isinstance(given, bool) and not isinstance(value, bool):
            raise ConfigError(f"{prefix}{part.name}={str(given).lower()}; expected a number")
