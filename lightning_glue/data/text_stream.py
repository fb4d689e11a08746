"""Texts from a stream, row by row: TSV, CSV, JSON lines or plain lines. A bad row is one that says what is wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, BinaryIO

from lightning_glue.data.reader import encoding_fault, same_column
from lightning_glue.errors import DataError, suggest
from lightning_glue.tasks import Task, half_a_character, input_columns

FORMATS = ("tsv", "csv", "jsonl", "lines")
_SUFFIXES = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "lines"}
_LONGEST = 1 << 20  # bytes of a line, characters of a CSV field: what is longer is no row of texts
_BOM = b"\xef\xbb\xbf"
_SHOWN = 60  # characters of a wrong value in a message


@dataclass(frozen=True)
class TextRow:
    """One row.

    Attributes:
        line: where it begins, from 1.
        texts: one or two; empty for a bad row.
        kept: values of the columns that are carried through.
        fault: what is wrong with a bad row; empty for a good one.
    """

    line: int
    texts: tuple[str, ...]
    kept: tuple[Any, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class Layout:
    """Where the texts stand.

    Attributes:
        format: one of :data:`FORMATS`.
        text, pair: names of columns; empty: the usual ones, or the task's own.
        keep: columns to carry through.
    """

    task: Task
    format: str
    text: str = ""
    pair: str = ""
    keep: Sequence[str] = field(default=())


def format_of(name: str) -> str:
    """The format that a file's name tells; plain lines where it tells none."""
    return _SUFFIXES.get(PurePath(name).suffix.casefold(), "lines")


def check_layout(layout: Layout) -> None:
    """Raise DataError where the format has no columns for what is wanted."""
    if layout.format not in FORMATS:
        raise DataError(f"format {layout.format!r}{suggest(layout.format, FORMATS)}")
    if layout.pair and layout.task.num_texts == 1:
        raise DataError(f"--pair {layout.pair}: {layout.task.name} takes one text an example; leave --pair out")
    if layout.format != "lines":
        return
    if layout.task.num_texts == 2:
        raise DataError(f"{layout.task.name} takes pairs, a plain line is one text; give --format tsv, csv or jsonl")
    if layout.text or layout.keep:
        raise DataError("plain lines have no columns: leave --text and --keep out, or give --format tsv, csv or jsonl")


def read_rows(stream: BinaryIO, name: str, layout: Layout) -> Iterator[TextRow]:
    """The rows of a stream, each as soon as it is there.

    Lines end at a line feed. TSV has no quoting, as GLUE's files; CSV is that of RFC 4180. Both begin with a header.
    Blank lines at the end are left out, except of plain lines, each of which is a row.

    Args:
        name: of the stream in messages.

    Raises:
        DataError: the stream is no such file at all, or has no such columns.
        OSError: it cannot be read.
    """
    lines = _checked(_lines(stream), name)
    if layout.format == "lines":
        for number, line, fault in lines:
            yield TextRow(number, () if fault else (line,), (), fault)
        return
    cut = _without_blank_end(lines)
    yield from _json_rows(cut, name, layout) if layout.format == "jsonl" else _table_rows(cut, name, layout)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines without their ends; of one that is too long the beginning, one byte longer than it may be."""
    number = 0
    while line := stream.readline(_LONGEST + 2):
        number += 1
        if len(line) > _LONGEST and not line.endswith(b"\n"):
            while (rest := stream.readline(_LONGEST)) and not rest.endswith(b"\n"):
                pass
            line = line[: _LONGEST + 1]
        yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _checked(lines: Iterable[tuple[int, bytes]], name: str) -> Iterator[tuple[int, str, str]]:
    """Line number, text and what is wrong with it.

    Raises:
        DataError: the first line shows another encoding.
    """
    for number, line in lines:
        if number == 1:
            line = line.removeprefix(_BOM)
            if fault := encoding_fault(line, line.count(b"\t") + 1 if b"\t" in line else None):
                raise DataError(f"{name}:1: {fault}")
        if len(line) > _LONGEST:
            yield number, "", f"the line is longer than {_LONGEST} bytes"
            continue
        try:
            yield number, line.decode("utf-8"), ""
        except UnicodeDecodeError as error:
            yield number, "", f"invalid UTF-8 at byte {error.start + 1} of the line"


def _without_blank_end(lines: Iterable[tuple[int, str, str]]) -> Iterator[tuple[int, str, str]]:
    blank: list[int] = []
    for number, line, fault in lines:
        if not line and not fault:
            blank.append(number)
            continue
        yield from ((skipped, "", "") for skipped in blank)
        blank.clear()
        yield number, line, fault


def _columns(layout: Layout, names: Sequence[str], place: str) -> tuple[list[str], list[str]]:
    """The columns of the texts and those to keep, as they are called here.

    Raises:
        DataError: there are none of these names.
    """
    asked = (layout.text, layout.pair)[: layout.task.num_texts]
    usual = [input_columns(layout.task), ("sentence1", "sentence2") if len(asked) == 2 else ("sentence",)]
    splits = layout.task.splits
    usual += [tuple(split.columns[i] for i in split.text_columns) for split in splits if split.columns]
    if layout.task.own:  # first as they are called in the files that the task was made from
        usual.insert(0, tuple(map(str, layout.task.own.text)))
    found: list[str] = []
    for position, given in enumerate(asked):
        wanted = [given] if given else [group[position] for group in usual]
        there = next((name for name in wanted if name in names), None)
        if there is None and not given:
            there = next((name for one in wanted for name in names if same_column(name, one)), None)
        if there is None or there in found:
            option = ("--text", "--pair")[position]
            shown = ", ".join(repr(name[:_SHOWN]) for name in names[:12])
            raise DataError(f"{place}: no column {wanted[0]!r} for {option}; "
                            f"found {shown}; name it with {option}")  # fmt: skip
        found.append(there)
    for name in layout.keep:
        if name not in names:
            raise DataError(f"{place}: no column {name!r} to --keep{suggest(name, names)}")
    return found, list(layout.keep)


def _table_rows(lines: Iterator[tuple[int, str, str]], name: str, layout: Layout) -> Iterator[TextRow]:
    rows = _tsv(lines) if layout.format == "tsv" else _csv(lines)
    head = next(rows, None)
    if head is None:
        raise DataError(f"{name}: no rows, expected a header; check that the file is complete")
    number, header, fault = head
    if fault:
        raise DataError(f"{name}:{number}: {fault}; expected a header")
    header = [cell.strip() for cell in header]
    texts, keep = (list(map(header.index, part)) for part in _columns(layout, header, f"{name}:{number}"))
    for number, row, fault in rows:
        if not fault and len(row) != len(header):
            fault = f"found {f'{len(row)} fields' if any(row) else 'a blank line'}, expected {len(header)}"
        if fault:
            yield TextRow(number, (), (None,) * len(keep), fault)
        else:
            yield TextRow(number, tuple(row[i] for i in texts), tuple(row[i] for i in keep))


def _tsv(lines: Iterable[tuple[int, str, str]]) -> Iterator[tuple[int, list[str], str]]:
    for number, line, fault in lines:
        yield number, line.split("\t"), fault


def _csv(lines: Iterator[tuple[int, str, str]]) -> Iterator[tuple[int, list[str], str]]:
    """Records of RFC 4180, whose quoted fields may hold line ends."""
    begin, faults = 0, list[str]()

    def fed() -> Iterator[str]:
        nonlocal begin
        for number, line, fault in lines:
            begin = begin or number
            faults.extend([fault] if fault else [])
            yield line + "\n"

    csv.field_size_limit(_LONGEST)
    reader = csv.reader(fed(), strict=True)
    while True:
        begin = 0
        faults.clear()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if not begin:
                return
            yield begin, [], f"no record of a CSV file ({error})"
            continue
        yield begin, row, faults[0] if faults else ""


def _json_rows(lines: Iterable[tuple[int, str, str]], name: str, layout: Layout) -> Iterator[TextRow]:
    texts: list[str] = []
    keep = list(layout.keep)
    for number, line, fault in lines:
        found: Any = None
        if not fault:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                fault = f"no JSON ({error})" if line.strip() else "found a blank line"
        if not fault and not isinstance(found, dict):
            fault = f"found {str(found)[:_SHOWN]!r}, expected a JSON object"
        if not fault and not texts:
            texts, _ = _columns(layout, list(found), f"{name}:{number}")
        if not fault:
            fault = next((f"no key {key!r}" if key not in found else
                          f"{key!r} is {str(found[key])[:_SHOWN]!r}, expected a text"
                          for key in texts if not isinstance(found.get(key), str)), "")  # fmt: skip
        kept = tuple(found.get(key) if isinstance(found, dict) else None for key in keep)
        if not fault and any(half_a_character(found[key]) for key in texts):
            fault = "a text holds half a character"
        yield TextRow(number, () if fault else tuple(found[key] for key in texts), kept, fault)
