"""Data of one's own: from what ``--data FILE.yaml`` says to a resolved description.

A resolved description is plain values: what :func:`lightning_glue.tasks.described_task` makes a task of, with labels in
order, the range, weights and metrics in force, and path, format and digest of each file. It is part of the
configuration, and so of the run, its checkpoints, its export and whatever is made of them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from lightning_glue.config.description import OwnData, format_of, is_description, read_description
from lightning_glue.data.formats import BadRow, Column, dialect_of, place, read_rows
from lightning_glue.data.own_rows import Label, read_label, shown
from lightning_glue.data.reader import NUMBER
from lightning_glue.errors import ConfigError, DataError
from lightning_glue.tasks import name_fault
from lightning_glue.utils.digests import known_sha256

DEV_SHARE, DEV_SEED = 0.1, 1
_FEW = 20  # rows that may well have a label each
_WIDEST = 1e30  # of a regression's labels, which are float32 in between
_INTEGER = re.compile("[+-]?[0-9]+")


def given_data(data: str | os.PathLike[str] | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    """What ``--data`` names, as :func:`lightning_glue.config.compose` takes it: ``glue``, ``sample``, or a description.

    Raises:
        UserError: a description or its training file cannot be used; see :func:`resolve`.
    """
    if data is None or (isinstance(data, str) and not is_description(data)):
        return data
    return resolve(read_description(data))


def data_of_call(data: str | os.PathLike[str] | Mapping[str, Any] | None, **said: Any) -> str | dict[str, Any] | None:
    """:func:`given_data` of a call in Python, whose arguments may be keys of a description.

    Raises:
        UserError: it is described twice, or not whole; or as :func:`given_data`.
    """
    keys = {key: _plain(value) for key, value in said.items() if value is not None}
    if keys and data is not None and not isinstance(data, Mapping):
        raise ConfigError(f"data={data!r} and {next(iter(keys))}={said[next(iter(keys))]!r}; expected one or the other")
    if isinstance(data, Mapping) or keys:
        return given_data({**_plain(data or {}), **keys})
    return given_data(None if data is None else os.fspath(data))


def _plain(value: Any) -> Any:
    """Paths as texts, whatever holds them."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def resolve(own: OwnData) -> dict[str, Any]:
    """The description with all that follows from the training file, as plain values.

    Raises:
        ConfigError: the description does not fit the file.
        DataError: a file is missing, or the training file has no row that can be read.
    """
    files = _files(own)
    said: dict[str, Any] = {"name": own.name, "kind": own.kind or "classes", **_layout(own), "files": files}
    path, kind = Path(own.train), files["train"]["format"]
    faults: list[str] = []
    labels = list(_labels(own, path, kind, faults))
    if not labels:
        found = f"{faults[0]}, and so every row" if faults else f"{path}: no rows"
        raise DataError(f"{found}; expected at least one with a text and a label")
    said |= {"labels": [], "class_weights": None, "range": None, "bounded": True}
    if own.kind == "regression":
        numbers = [float(str(label)) for label in labels]
        if not max(map(abs, [*numbers, *(own.range or ())])) < _WIDEST:
            raise ConfigError(f"label: {own.label!r} has numbers of {_WIDEST:g} and more, too large to be predicted")
        said |= {"range": own.range or [min(numbers), max(numbers)], "bounded": own.range is not None}
    else:
        _refuse_header_as_row(own, path, labels)
        said["labels"] = own.labels or _ordered(own, path, labels, faults)
        said["class_weights"] = _weights(own, said["labels"], labels)
    return said | {"metrics": own.metrics or usual_metrics(said["kind"], len(said["labels"]))}


def _layout(own: OwnData) -> dict[str, Any]:
    """How the files are read."""
    shares = own.dev is None
    return {
        "text": own.texts,
        "label": own.label,
        "index": own.index,
        "header": isinstance(own.label, str),
        "separator": own.separator,
        "quoting": own.quoting or "none",
        "label_separator": own.label_separator,
        "dev_share": (own.dev_share or DEV_SHARE) if shares else None,
        "dev_seed": DEV_SEED if own.dev_seed is None else own.dev_seed,
    }


def _files(own: OwnData, *, train: bool = True) -> dict[str, dict[str, str]]:
    """Path, format and digest of each file, by split."""
    paths = own.files if own.dev else {"train": own.train, "dev": own.train, **own.files}
    found = {}
    for split, path in paths.items():
        if split == "train" and not train:
            continue
        see = split.partition("_")[0]
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise DataError(f"{split}: {path} is no file; see {see}")  # a device or a pipe has no end
            digest = known_sha256(Path(path))
        except OSError as error:
            raise DataError(f"{split}: cannot read {path}: {error.strerror}; see {see}") from None
        kind = format_of(own, path)
        if kind in ("jsonl", "parquet") and not isinstance(own.label, str):
            raise ConfigError(f"{split}: {path} has its columns by name; give names for text and label")
        found[split] = {"path": path, "format": kind, "sha256": digest}
    return found


def other_files(said: Mapping[str, Any], own: OwnData) -> dict[str, Any]:
    """The description of a run with the files of another one: to score or to predict what it was not trained on.

    Raises:
        ConfigError: they have another number of texts an example.
    """
    if len(own.texts) != len(said["text"]):
        raise ConfigError(f"text: {len(own.texts)} columns, but the model takes {len(said['text'])}")
    return {**said, **_layout(own), "files": _files(own)}


def usual_metrics(kind: str, labels: int) -> list[str]:
    """As GLUE has them: accuracy, of two classes F1 of the second as well; correlations of scores."""
    if kind == "regression":
        return ["pearson", "spearman"]
    if kind == "multi-label":
        return ["f1_micro", "f1_macro"]
    return ["accuracy", "f1"] if labels == 2 else ["accuracy"]


def _labels(own: OwnData, path: Path, kind: str, faults: list[str]) -> Iterator[Label]:
    """The labels of the rows that can be read; what is wrong with the others is said when they are read for good.

    Args:
        faults: gets the first of them.
    """
    quoted, header = own.quoting == "csv", isinstance(own.label, str)
    dialect = dialect_of(kind, own.separator, quoted=quoted, header=header)
    columns: list[Column] = [own.label, *own.texts]
    for number, fields in read_rows(path, kind, columns, dialect):
        if isinstance(fields, BadRow):
            faults += [f"{place(path, kind, number)}: {fields.reason}"] if not faults else []
            continue
        if own.kind is None and isinstance(fields[0], float | Decimal):
            raise ConfigError(_ask_for_kind(own, fields[0]))
        label = read_label(fields[0], own.kind or "classes", own.label_separator)
        if isinstance(label, BadRow):
            faults += [f"{place(path, kind, number)}: {label.reason}"] if not faults else []
            continue
        for one in label if isinstance(label, tuple) else (label,):
            if own.kind != "regression" and own.labels is None and (fault := name_fault(one)):
                raise DataError(f"{place(path, kind, number)}: {fault}; is {own.label!r} the column of the labels?")
        yield label


def _ask_for_kind(own: OwnData, found: object) -> str:
    return (
        f"label: the column {own.label!r} holds numbers such as {found}; say kind: regression to predict them, or "
        "kind: classes where each is the name of a class"
    )


def _refuse_header_as_row(own: OwnData, path: Path, labels: Sequence[Label]) -> None:
    """Raise ConfigError where columns have positions and the label of line 1 stands there alone, as a name would."""
    if isinstance(own.label, str) or own.header is False or own.labels is not None or not isinstance(labels[0], str):
        return
    counts = Counter(map(str, labels))
    if counts.pop(labels[0]) == 1 and min(counts.values(), default=1) > 1:
        raise ConfigError(
            f"{path}:1: the label {labels[0]!r} stands in no other line: is that a header? Then give text and label by "
            "their names; else say header: false"
        )


def _ordered(own: OwnData, path: Path, labels: Sequence[Label], faults: Sequence[str]) -> list[str]:
    """The labels in the order that the run keeps: as numbers where all are whole numbers, else as texts.

    Raises:
        ConfigError: they are numbers that may be meant as such, or too few or too many to be classes.
    """
    names = {one for label in labels for one in (label if isinstance(label, tuple) else (label,))}
    numbers = all(NUMBER.fullmatch(name) for name in names)
    if own.kind is None and numbers and (broken := [name for name in names if not _INTEGER.fullmatch(name)]):
        raise ConfigError(_ask_for_kind(own, min(broken)))
    if len(names) < (1 if own.kind == "multi-label" else 2):
        found = f"every row has the label {min(names)!r}" if names else "no row has a label"
        besides = f", besides what cannot be read ({faults[0]})" if faults else ""
        raise ConfigError(f"{path}: {found} in column {own.label!r}{besides}; expected two classes or more")
    if own.kind is None and len(names) == len(labels) > _FEW:
        raise ConfigError(
            f"{path}: each of {len(labels)} rows has another label in column {own.label!r}; is that the column of the "
            "labels? Else say kind: classes, or kind: regression"
        )
    integers = all(_INTEGER.fullmatch(name) for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if integers else sorted(names)


def _weights(own: OwnData, names: list[str], labels: Sequence[Label]) -> list[float] | None:
    """A weight for each label; ``balanced``: rows / (classes x rows of it), of several labels an example absent /
    present."""
    if own.class_weights is None:
        return None
    if isinstance(own.class_weights, dict):
        if unknown := sorted(set(own.class_weights) - set(names)):
            raise ConfigError(f"class_weights: {unknown[0]!r} is no label; expected {shown(names)}")
        weights = [own.class_weights.get(name, 1.0) for name in names]
        if not any(weights):
            raise ConfigError("class_weights: all are 0, so nothing would be learned")
        return weights
    counts = Counter(one for label in labels for one in (label if isinstance(label, tuple) else (label,)))
    if own.kind == "multi-label":
        return [(len(labels) - counts[name]) / counts[name] if counts[name] else 1.0 for name in names]
    return [len(labels) / (len(names) * counts[name]) if counts[name] else 1.0 for name in names]
