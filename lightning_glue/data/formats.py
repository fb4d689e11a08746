"""Rows of files of one's own: TSV, CSV, JSON lines and Parquet, each row with its place in the file."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lightning_glue.data.reader import binary_fault, encoding_fault, lines_of, opened
from lightning_glue.errors import DataError, suggest
from lightning_glue.utils.redact import first_line

Column = str | int
_QUOTED = re.compile(rb'"[^"]*(?:"|$)')  # what may hold line ends


@dataclass(frozen=True)
class BadRow:
    """Why a row cannot be read."""

    reason: str


Row = tuple[int, list[Any] | BadRow]  # number of the line (from 1; of Parquet that of the row), and its values


@dataclass(frozen=True)
class Dialect:
    """How a text file is written.

    Attributes:
        quoted: fields may be quoted as RFC 4180 has it; else a quote is an ordinary character.
        header: whether its first line names the columns.
    """

    separator: str
    quoted: bool
    header: bool


def dialect_of(kind: str, separator: str, *, quoted: bool, header: bool) -> Dialect:
    """Of a file of that kind: TSV has tabs, and quotes only where that is said; CSV always may have them."""
    return Dialect("\t", quoted, header) if kind == "tsv" else Dialect(separator, True, header)


def read_rows(path: Path, kind: str, columns: Sequence[Column], dialect: Dialect) -> Iterator[Row]:
    """The values of some columns of every row, in the order of the file.

    Args:
        kind: tsv, csv, jsonl or parquet.

    Raises:
        DataError: the file is missing, is not of that kind, or lacks a column.
    """
    try:
        if kind == "parquet":
            yield from _parquet_rows(path, columns)
            return
        with opened(path) as file:
            yield from _json_rows(path, file, columns) if kind == "jsonl" else _table_rows(path, file, columns, dialect)
    except FileNotFoundError:
        see = "see train, dev and test of the description"
        if not path.is_absolute():  # of a model that was converted
            see = "the model knows it by its name alone: go to its folder, or describe it with --data FILE.yaml"
        raise DataError(f"no file {path}; {see}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or first_line(error)}") from None


def place(path: Path | str, kind: str, number: int) -> str:
    """A row's place as errors have it."""
    return f"{path}: row {number}" if kind == "parquet" else f"{path}:{number}"


def _table_rows(path: Path, file: BinaryIO, columns: Sequence[Column], dialect: Dialect) -> Iterator[Row]:
    rows = _csv_rows(path, file, dialect) if dialect.quoted else _plain_rows(path, file, dialect)
    first = next(rows, None)
    if first is None:
        return
    number, fields = first
    if isinstance(fields, BadRow):
        raise DataError(f"{path}:{number}: {fields.reason}")
    if dialect.header and not any(name.strip() for name in fields):
        raise DataError(f"{path}:{number}: a blank line, expected the names of the columns; remove it")
    places = _places(f"{path}:{number}", columns, fields, dialect)
    width = len(fields)
    if not dialect.header:
        yield number, [fields[i] for i in places]
    for number, fields in rows:
        if isinstance(fields, BadRow):
            yield number, fields
        elif len(fields) != width:
            found = f"found {len(fields)} fields" if any(fields) else "found a blank line"
            yield number, BadRow(f"{found}, expected {width}")
        else:
            yield number, [fields[i] for i in places]


def _places(where: str, columns: Sequence[Column], first: list[str], dialect: Dialect) -> list[int]:
    """Where the columns are among the fields of the first line."""
    if not dialect.header:
        beyond = [column for column in columns if int(column) >= len(first)]
        if beyond:
            raise DataError(f"{where}: found {len(first)} fields, but column {beyond[0]} is asked for (from 0)")
        return [int(column) for column in columns]
    names = [name.strip() for name in first]
    for column in columns:
        if names.count(str(column)) != 1:
            raise DataError(f"{where}: {_no_column(str(column), names)}")
    return [names.index(str(column)) for column in columns]


def _no_column(column: str, names: Sequence[str]) -> str:
    if column in names:
        return f"the header has the column {column!r} {list(names).count(column)} times"
    for separator, said in ((";", "';'"), ("\t", "tabs"), ("|", "'|'"), (",", "commas")):
        if len(names) == 1 and column in [name.strip().strip('"') for name in names[0].split(separator)]:
            return f"no column {column!r}, but fields seem to be separated by {said}; see separator and format"
    shown = [name[:40] for name in names[:20]]
    return f"no column {column!r}{suggest(column, shown)}"


def _decoded(line: bytes) -> str | BadRow:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow(f"invalid UTF-8 at byte {error.start + 1} of the line")


def _plain_rows(path: Path, file: BinaryIO, dialect: Dialect) -> Iterator[tuple[int, list[str] | BadRow]]:
    """Lines end at a line feed only, fields at a separator, as in GLUE's files."""
    for i, (number, line) in enumerate(lines_of(file)):
        if i == 0 and (fault := encoding_fault(line)):
            raise DataError(f"{path}:{number}: {fault}")
        text = _decoded(line)
        yield number, text if isinstance(text, BadRow) else text.split(dialect.separator)


def _csv_rows(path: Path, file: BinaryIO, dialect: Dialect) -> Iterator[tuple[int, list[str] | BadRow]]:
    """RFC 4180 by the csv module; a quoted field may go over several lines, and a row's number is that of its first."""
    source, blank = _TextLines(path, file), list[int]()
    with _long_fields():
        reader = csv.reader(source, delimiter=dialect.separator, strict=True)
        while True:
            start = source.number + 1
            source.bad = None
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise DataError(f"{path}:{start}: a quote is opened in this row and never closed") from None
                yield start, BadRow(f"no CSV: {_in_words(error)}")
                continue
            if not fields:
                blank.append(start)
                continue
            yield from ((number, list[str]()) for number in blank)  # those at the end of the file are left out
            blank.clear()
            yield start, source.bad or fields


def _in_words(error: csv.Error) -> str:
    if "new-line character" in str(error):  # the module speaks to programmers here
        return "a carriage return that ends no line stands outside of quotes"
    return str(error)


class _TextLines:
    """A file's lines as the csv module takes them: with their ends, which may stand in a quoted field.

    Attributes:
        number: of the last line that was handed out.
        bad: what was wrong with a line since it was last cleared.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.number = path, file, 0
        self.bad: BadRow | None = None

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        line = next(self.file)
        self.number += 1
        if self.number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
            bare = _QUOTED.sub(b"", line.removesuffix(b"\n").removesuffix(b"\r"))
            if fault := binary_fault(line) or encoding_fault(bare):
                raise DataError(f"{self.path}:1: {fault}")
        text = _decoded(line)
        if isinstance(text, BadRow):
            self.bad = text
            return line.decode("utf-8", "replace")
        return text


@contextmanager
def _long_fields() -> Iterator[None]:
    """Within, a field may be as long as it is; the csv module's own limit, of the process, is 131,072 characters."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _json_rows(path: Path, file: BinaryIO, columns: Sequence[Column]) -> Iterator[Row]:
    """An object a line."""
    for i, (number, line) in enumerate(lines_of(file)):
        if i == 0:
            if fault := encoding_fault(line):
                raise DataError(f"{path}:{number}: {fault}")
            if line.strip() == b"{":
                raise DataError(f"{path}:{number}: an object over several lines; expected one on each line: jq -c .")
            if line.lstrip().startswith(b"["):
                raise DataError(f"{path}:{number}: a JSON array; expected JSON lines, an object on each: jq -c '.[]'")
        yield number, _of_object(line, columns)


def _of_object(line: bytes, columns: Sequence[Column]) -> list[Any] | BadRow:
    text = _decoded(line)
    if isinstance(text, BadRow):
        return text
    if not text.strip():
        return BadRow("found a blank line, expected a JSON object")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow(f"no JSON: {first_line(error)}")
    if not isinstance(found, dict):
        return BadRow(f"found a JSON {type(found).__name__}, expected an object with {', '.join(map(str, columns))}")
    missing = [str(column) for column in columns if column not in found]
    if missing:
        return BadRow(_no_column(missing[0], [*found]))
    return [found[str(column)] for column in columns]


def _parquet_rows(path: Path, columns: Sequence[Column]) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in columns:
                if names.count(str(column)) != 1:
                    raise DataError(f"{path}: {_no_column(str(column), names)}")
            number = 0
            for batch in file.iter_batches(batch_size=8192, columns=list(dict.fromkeys(map(str, columns)))):
                values = [batch.column(str(column)).to_pylist() for column in columns]
                for fields in zip(*values):
                    number += 1
                    yield number, list(fields)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no Parquet file that can be read: {first_line(error)}") from None
