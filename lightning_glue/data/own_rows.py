"""Rows of files of one's own as texts and labels, each fault with file and line."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from lightning_glue.data.dev_part import bins, dev_rows
from lightning_glue.data.formats import BadRow, Column, dialect_of, place, read_rows
from lightning_glue.data.reader import NUMBER, OnBadRow, Rows
from lightning_glue.errors import DataError
from lightning_glue.tasks import Split, Task, half_a_character, line_fault
from lightning_glue.utils.digests import known_sha256

_SHOWN = 20  # labels in an error
Label = str | tuple[str, ...]


def shown(names: Sequence[str]) -> str:
    """Labels for an error, the first of very many."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def read_label(value: object, kind: str, separator: str) -> Label | BadRow:
    """A cell as a label: the name of a class, the string of a number, or a tuple of names."""
    if value is None or value != value:
        return BadRow(f"no label ({'null' if value is None else 'NaN'})")
    if kind == "multi-label":
        parts = value if isinstance(value, list | tuple) else str(value).split(separator)
        names = [_name(part) for part in parts]
        if None in names:
            return BadRow(f"the labels {value!r} are not all names")
        return tuple(dict.fromkeys(name for name in names if name))
    if isinstance(value, list | tuple | dict):
        return BadRow(f"label {str(value)[:80]} is no single label; kind: multi-label takes any number")
    name = _name(value)
    if name is None:
        return BadRow(f"label {str(value)[:80]!r} is a {type(value).__name__}, neither a text nor a number")
    if not name:
        return BadRow("no label")
    if kind == "regression" and not (NUMBER.fullmatch(name) and abs(float(name)) < float("inf")):
        return BadRow(f"label {name[:80]!r} is not a number")
    return name


def _name(value: object) -> str | None:
    """A value as the name of a class; None where it is no name."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).strip() if isinstance(value, str | int | float | Decimal) else None


def _text(value: object, column: Column) -> str | BadRow:
    if not isinstance(value, str):
        found = "nothing (null)" if value is None else f"{str(value)[:80]!r}, a {type(value).__name__}"
        return BadRow(f"column {column!r} holds {found}; expected a text")
    if half_a_character(value):
        return BadRow(f"column {column!r} holds half a character")
    return value.strip()


def label_fault(task: Task, label: Label) -> str:
    """What is wrong with a label that could be read; empty if nothing is."""
    if task.is_regression:
        low, high = task.label_offset, task.label_offset + task.label_scale
        outside = task.bounded and not low <= float(str(label)) <= high
        return f"label {label!r} is not a number from {low:g} to {high:g}" if outside else ""
    for one in label if isinstance(label, tuple) else (label,):
        if one not in _known(task):
            return f"label {one[:80]!r} is not one of {shown(task.labels)}"
    return ""


_sets: dict[tuple[str, ...], frozenset[str]] = {}


def _known(task: Task) -> frozenset[str]:
    return _sets.setdefault(task.labels, frozenset(task.labels))


Example = tuple[list[str], Label | None, str | None]  # texts, label, index


def read_examples(task: Task, split: Split) -> Iterator[tuple[int, Example | BadRow]]:
    """Every row of a file with its number: texts, label (of a labelled split) and index (of another), or its fault."""
    own = task.own
    assert own
    columns: list[Column] = [*own.text]
    columns += [own.label] if split.labelled else [own.index] if own.index is not None else []
    kind, said = _kind(task), dialect_of(split.format, own.separator, quoted=own.quoted, header=own.header)
    for number, fields in read_rows(Path(split.path), split.format, columns, said):
        yield number, fields if isinstance(fields, BadRow) else _example(task, split, kind, columns, fields)


def _kind(task: Task) -> str:
    return "regression" if task.is_regression else "multi-label" if task.multilabel else "classes"


def _example(task: Task, split: Split, kind: str, columns: Sequence[Column], fields: list[Any]) -> Example | BadRow:
    assert task.own
    texts: list[str] = []
    for value, column in zip(fields[: task.num_texts], columns):
        text = _text(value, column)
        if isinstance(text, BadRow):
            return text
        texts.append(text)
    rest = fields[task.num_texts :]
    if not split.labelled:
        return texts, None, (_name(rest[0]) or "") if rest else None
    label = read_label(rest[0], kind, task.own.label_separator)
    if isinstance(label, BadRow):
        return label
    fault = label_fault(task, label)
    return BadRow(fault) if fault else (texts, label, None)


def read_own_split(task: Task, split: Split, on_bad_row: OnBadRow = "stop") -> Rows:
    """Rows of a split, whose file may hold another one as well.

    ``sha256`` is the digest of the file; ``dropped`` is 0; what was skipped in
    a file that two splits share is counted for train.

    Raises:
        DataError: the file cannot be read, has no row of the split, or has a malformed one (``on_bad_row="stop"``).
    """
    texts: tuple[list[str], ...] = tuple([] for _ in range(task.num_texts))
    labels: list[Any] = []
    index: dict[str, int] = {}
    lines, skipped = array("Q"), 0
    sha256 = known_sha256(Path(split.path)) if os.path.isfile(split.path) else ""
    for number, example in read_examples(task, split):
        where = place(split.path, split.format, number)
        if isinstance(example, BadRow):
            if on_bad_row == "stop":
                raise DataError(f"{where}: {example.reason}; {_advice(split, example)}")
            skipped += 1
            continue
        for column, text in zip(texts, example[0]):
            column.append(text)
        labels.append(example[1])
        lines.append(number)
        if not split.labelled:
            entry = str(len(index)) if example[2] is None else example[2]
            if fault := _index_fault(entry, index):
                raise DataError(f"{where}: {fault}; predictions go by index: give every row one of its own")
            index[entry] = number
    _refuse_empty(split, len(labels), skipped)
    known = labels if split.labelled else None
    rows = Rows(Path(split.path), texts, known, 0, skipped, sha256, [*index] or None, lines)
    return _part(task, split, rows) if split.part else rows


def _index_fault(entry: str, others: dict[str, int]) -> str:
    """Why an index cannot stand before a prediction, in a file of lines and tabs; empty if it can."""
    if not entry:
        return "no index"
    if entry in others:
        return f"index {entry[:80]!r} stands in row {others[entry]} already"
    fault = line_fault(entry)
    return f"index {entry[:80]!r} {fault}" if fault else ""


def _advice(split: Split, bad: BadRow) -> str:
    if not split.labelled:
        return "fix the row: every row of this file gets a prediction, so none is skipped"
    of_labels = "; labels: of the description may name more" if "is not one of" in bad.reason else ""
    return f"fix the row or set data.on_bad_row=skip{of_labels}"


def _refuse_empty(split: Split, rows: int, skipped: int) -> None:
    if not rows:
        found = f"all {skipped} rows are malformed" if skipped else "no rows"
        raise DataError(f"{split.path}: {found}, expected at least one; check that the file is complete")


def _part(task: Task, split: Split, rows: Rows) -> Rows:
    """Those rows of a training file that are of the split."""
    assert task.own and task.own.dev_share and rows.labels
    strata: Any = bins([float(str(label)) for label in rows.labels]) if task.is_regression else rows.labels
    of_dev = dev_rows(rows.texts, strata, task.own.dev_share, task.own.dev_seed)
    kept = [row for row, dev in enumerate(of_dev) if dev == (split.part == "dev")]
    if not kept:
        raise DataError(
            f"{split.path}: its {len(rows)} rows are too few to take a dev set of {task.own.dev_share:g} from; "
            "give a file: dev"
        )
    texts = tuple([column[row] for row in kept] for column in rows.texts)
    labels: Any = [rows.labels[row] for row in kept]
    lines, skipped = array("Q", (rows.lines[row] for row in kept)), rows.skipped if split.part == "train" else 0
    return Rows(rows.path, texts, labels, 0, skipped, rows.sha256, None, lines)


def split_digest(task: Task, split: Split, sha256: str) -> str:
    """Digest of what a split is made of: of its file, and of which part of it."""
    if not split.part or not task.own:
        return sha256
    said = f"{sha256} {split.part} {task.own.dev_share} {task.own.dev_seed}"
    return hashlib.sha256(said.encode()).hexdigest()
