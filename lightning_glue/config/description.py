"""What ``--data FILE.yaml`` says of data of one's own, checked: keys, types and paths, no content of the files."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from lightning_glue.config.check import checked
from lightning_glue.config.compose import options
from lightning_glue.config.schema import Part
from lightning_glue.errors import ConfigError, DataError, suggest
from lightning_glue.tasks import TASKS, name_fault
from lightning_glue.utils.paths import plain_name
from lightning_glue.utils.redact import first_line, hide_secrets

FORMATS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
           ".parquet": "parquet", ".pq": "parquet"}  # fmt: skip
_MOST = 1 << 22  # bytes of a description


@dataclass
class OwnData(Part):
    """Data of one's own, as they are described; docs/data.md has every key.

    Paths are absolute, ``dev`` and ``test`` by the names of their splits.
    """

    train: str
    text: str | int | Annotated[list[str | int], MinLen(1)]
    label: str | int
    name: str
    dev: str | list[str] | dict[str, str] | None = None
    test: str | list[str] | dict[str, str] | None = None
    format: Literal["tsv", "csv", "jsonl", "parquet"] | None = None
    index: str | int | None = None
    kind: Literal["classes", "regression", "multi-label"] | None = None
    labels: list[str] | None = None
    range: list[float] | None = None
    metrics: list[str] | None = None
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    dev_share: Annotated[float, Gt(0), Lt(1)] | None = None
    dev_seed: Annotated[int, Ge(0), Le(2**32 - 1)] | None = None
    header: bool | None = None
    separator: str = ","
    quoting: Literal["csv", "none"] | None = None
    label_separator: str = "|"

    @property
    def texts(self) -> list[str | int]:
        return self.text if isinstance(self.text, list) else [self.text]

    @property
    def files(self) -> dict[str, str]:
        """Paths by split, in the order of the description."""
        assert self.dev is None or isinstance(self.dev, dict)
        assert self.test is None or isinstance(self.test, dict)
        return {"train": self.train, **(self.dev or {}), **(self.test or {})}


def is_description(data: str | None) -> bool:
    """Whether ``--data`` is a path: else ``conf/data/`` says what there is."""
    if data is None or data in options("data"):
        return False
    return "/" in data or data.lower().endswith((".yaml", ".yml")) or Path(data).is_file()


def read_description(data: str | os.PathLike[str] | Mapping[str, Any]) -> OwnData:
    """The description in a YAML file, whose paths are relative to its folder; or one given as a dictionary.

    Raises:
        DataError: there is no such file, or it is no YAML.
        ConfigError: a key is unknown or missing, or has a value that cannot be meant; names the file and the key.
    """
    if isinstance(data, Mapping):
        return _checked(dict(data), Path.cwd(), "", "")
    path = Path(os.path.expanduser(data))
    found = _load(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no description: expected keys such as train, text and label; see docs/data.md")
    return _checked(found, path.absolute().parent, f"{path}: ", path.stem)


def _load(path: Path) -> Any:
    import yaml

    if path.suffix.lower() in FORMATS:
        raise DataError(f"--data {path}: expected a description of it, a YAML file with train, text and label; see "
                        "docs/data.md")  # fmt: skip
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"--data {path} is no file; expected glue, sample, or a description's file")
        if path.stat().st_size > _MOST:
            raise DataError(f"{path} has {path.stat().st_size} bytes: that is no description of data; see docs/data.md")
        text = path.read_text(encoding="utf-8-sig")
        return _without_repeats(path, text)
    except OSError as error:
        raise DataError(f"--data {path}: {error.strerror}; expected glue, sample, or a description's file") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise DataError(f"{where} is no YAML: {problem or first_line(error)}; see docs/data.md") from None


def _without_repeats(path: Path, text: str) -> Any:
    """What a YAML file holds. Of a key that stands there twice YAML itself takes the last one.

    Raises:
        DataError: a key stands there twice.
    """
    import yaml

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    known: dict[str, int] = {}
    for key, _ in root.value if isinstance(root, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if str(key.value) in known:
            raise DataError(f"{path}:{line}: {str(key.value)[:80]!r} stands in line {known[key.value]} already")
        known[str(key.value)] = line
    return yaml.safe_load(text)


def _checked(found: dict[Any, Any], folder: Path, where: str, stem: str) -> OwnData:
    names = [part.name for part in dataclasses.fields(OwnData)]
    for key in found:
        if key not in names:
            raise ConfigError(f"{where}unknown key {str(key)[:80]!r}{suggest(str(key), names)}")
    if "name" not in found:
        train = found.get("train")
        found["name"] = stem or usual_name(train if isinstance(train, str) else "")
    if any(isinstance(one, bool) for key in ("labels", "class_weights") for one in _listed(found.get(key))):
        raise ConfigError(f"{where}labels: YAML reads yes, no, true and false as truth values; put them into quotes")
    own = checked(OwnData, found, where)
    try:
        _check_together(own)
        own.train = _absolute(own.train, folder)
        own.dev, own.test = (_by_split(role, getattr(own, role), folder) for role in ("dev", "test"))
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
    return own


def _listed(value: object) -> list[object]:
    return [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []


def usual_name(train: str) -> str:
    """A name for data that have none: of the training file, or of its folder where the file is called ``train``."""
    path = Path(os.path.expanduser(train)).absolute()
    name = path.parent.name if path.stem.casefold() in ("train", "training", "data") else path.stem
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-._")[:64] or "own"


def _check_together(own: OwnData) -> None:
    """Raise ConfigError where values exclude one another."""
    name = plain_name(own.name, "name")
    if name.casefold() in {task.casefold() for task in TASKS} or name.casefold().startswith("glue-"):
        raise ConfigError(f"name: {name} is the name of a built-in task or its model; choose another")
    if len(own.texts) > 2:
        raise ConfigError(f"text: {len(own.texts)} columns; expected one, or two for a pair")
    columns = [*own.texts, own.label, *([] if own.index is None else [own.index])]
    if len({type(column) for column in columns}) > 1:
        raise ConfigError("text, label and index: names and positions; expected one or the other")
    if isinstance(columns[0], int) and (own.header or min(map(int, columns)) < 0):
        raise ConfigError("text, label and index: positions count from 0, in files without a header; else give names")
    if isinstance(columns[0], str) and own.header is False:
        raise ConfigError("header: false, but columns are given by name; give their positions, from 0")
    if len(set(columns[: len(own.texts) + 1])) < len(own.texts) + 1:
        raise ConfigError("text and label name the same column twice")
    _check_labels(own)
    if own.dev is not None and (own.dev_share is not None or own.dev_seed is not None):
        raise ConfigError("dev_share and dev_seed are of a dev set that is taken from train; leave them or dev out")
    for key in ("separator", "label_separator"):
        if len(getattr(own, key)) != 1 or getattr(own, key) in '\r\n"\0':
            raise ConfigError(f"{key}: {getattr(own, key)!r}; expected one character")
    if own.metrics is not None and (not own.metrics or len(set(own.metrics)) < len(own.metrics)):
        raise ConfigError("metrics: expected a list of different names, the one that selects the checkpoint first")


def _check_labels(own: OwnData) -> None:
    regression = own.kind == "regression"
    if own.labels is not None:
        if regression:
            raise ConfigError("labels: a regression has none; leave them or kind: regression out")
        own.labels = [label.strip() for label in own.labels]  # as those of files
        if fault := next(filter(None, map(name_fault, own.labels)), ""):
            raise ConfigError(f"labels: {fault}")
        if len(set(own.labels)) < len(own.labels) or len(own.labels) < (1 if own.kind == "multi-label" else 2):
            raise ConfigError(f"labels: {', '.join(own.labels)[:200]}; expected two or more, each once")
    if own.range is not None:
        if not regression:
            raise ConfigError("range: only a regression has one; say kind: regression")
        if len(own.range) != 2 or own.range[0] >= own.range[1]:
            raise ConfigError(f"range: {own.range}; expected the lowest and the highest label")
    if own.class_weights is not None and regression:
        raise ConfigError("class_weights: a regression has no classes")
    if isinstance(own.class_weights, dict) and any(weight < 0 for weight in own.class_weights.values()):
        raise ConfigError("class_weights: expected numbers that are not negative")


def _absolute(path: str, folder: Path) -> str:
    if not path or "\0" in path:
        raise ConfigError(f"{path!r} is no path of a file")
    if re.match("[A-Za-z][A-Za-z0-9+.-]*://", path):
        raise ConfigError(f"{hide_secrets(path)} is an address; expected a file of this machine: fetch it first")
    given = os.path.join(folder, os.path.expanduser(path))
    plain = os.path.abspath(given)
    return plain if os.path.realpath(plain) == os.path.realpath(given) else given  # ".." behind a link


def _by_split(role: str, given: str | list[str] | dict[str, str] | None, folder: Path) -> dict[str, str] | None:
    """Paths by the name of the split: ``dev``; of several ``dev_<name>``, that of the file where none is given."""
    if given is None:
        return None
    if isinstance(given, str):
        return {role: _absolute(given, folder)}
    named = given if isinstance(given, dict) else {}
    for path in given if isinstance(given, list) else []:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(path).stem)
        if stem in named:
            raise ConfigError(f"{role}: two files are called {stem}; give each a name: {role}: {{name: path, ...}}")
        named = {**named, stem: path}
    if not named:
        raise ConfigError(f"{role}: no file; expected a path, or leave it out")
    found: dict[str, str] = {}
    for name, path in named.items():
        bare = name.removeprefix(role).lstrip("_-")
        split = plain_name(f"{role}_{bare}" if bare else role, role)
        if split in found:
            raise ConfigError(f"{role}: {name!r} is {split} too; give each file a name of its own")
        found[split] = _absolute(path, folder)
    return found


def format_of(own: OwnData, path: str) -> str:
    """How a file is written: as the description says, else by its suffix."""
    if own.format:
        return own.format
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(f"{path}: the suffix {suffix!r} tells no format; say format: tsv, csv, jsonl or parquet")
    return FORMATS[suffix]
