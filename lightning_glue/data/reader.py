"""Read one split of a GLUE task, row by row, exactly as the official files are laid out."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from lightning_glue.errors import DataError, UserError
from lightning_glue.tasks import Split, Task

if TYPE_CHECKING:
    from hashlib import _Hash

OnBadRow = Literal["stop", "skip"]

_BOM = b"\xef\xbb\xbf"
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")  # float() takes 1_0 and digits of any script

# Names that other distributions give an official column, in small letters without signs between them.
_SYNONYMS = (
    {"index", "id", "idx"},
    {"label", "goldlabel", "quality", "score", "isduplicate"},
    {"sentence", "text"},
    {"sentence1", "premise", "#1string"},
    {"sentence2", "hypothesis", "#2string"},
)


@dataclass(frozen=True)
class Rows:
    """The rows of one split.

    ``texts`` holds one list per text column, ``labels`` the label strings (``None`` for unlabelled splits), ``index``
    the strings of the index column (``None`` for labelled ones, where nothing asks for it); of a task with any number
    of labels an example, ``labels`` holds tuples; ``lines`` holds the number of each row's (first) line, from 1, of a
    Parquet file that of the row; all lists have ``len(rows)`` entries in the order of the file. ``dropped`` counts
    the rows that ``Split.drop_malformed`` left out, ``skipped`` those that ``on_bad_row="skip"`` left out. ``sha256``
    is the hex digest of the file's bytes.
    """

    path: Path
    texts: tuple[list[str], ...]
    labels: list[str] | list[tuple[str, ...]] | None
    dropped: int
    skipped: int
    sha256: str
    index: list[str] | None
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.texts[0])


def has_split(task: Task, split: Split, directory: Path) -> bool:
    """Say whether the file of ``split`` is there below the GLUE root ``directory``."""
    return (directory / task.directory / split.file_name).is_file()


def read_split(task: Task, split: Split, directory: Path, on_bad_row: OnBadRow = "stop") -> Rows:
    """Read ``directory/<task folder>/<split>.tsv``.

    Lines end at a line feed only (a carriage return before it is removed), fields at a tab; a quote is an ordinary
    character, a byte order mark at the start and blank lines at the end are ignored. Texts and labels are stripped of
    white space at both ends, as fairseq's BPE encoder does; empty texts are kept. A regression label stays the string
    of the file, checked to be a number from 0 to ``task.label_scale``. The header must have the official names (in any
    case, or one of the synonyms other distributions use) where texts, label and index are read.

    A malformed row raises :class:`UserError` naming file and line, or with ``on_bad_row="skip"`` is left out and
    counted. Rows with a wrong number of fields are dropped and counted where ``split.drop_malformed`` is set, as
    ``awk 'NF==6'`` in fairseq's ``preprocess_GLUE_tasks.sh`` does for QQP. A missing or empty file and a wrong header
    raise :class:`UserError` either way.
    """
    path = directory / task.directory / split.file_name
    digest = hashlib.sha256()
    try:
        with opened(path) as file:
            fields, lines = _read_layout(task, split, path, lines_of(file, digest))
            collector = _Collector(task, split, path, fields, on_bad_row)
            collector.read(lines)
        return collector.rows(digest.hexdigest())
    except UserError as error:
        needless = "" if split.labelled or not task.train else "; where nothing is to be predicted, remove the file"
        raise DataError(f"{error}{needless}") from None
    except FileNotFoundError:
        raise DataError(_missing(task, split, directory)) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def survey_split(task: Task, split: Split, directory: Path) -> tuple[Rows, list[tuple[int, str]]]:
    """The rows of a split that can be read, and line and fault of each other one.

    Raises:
        DataError: as :func:`read_split` where it is not a single row.
    """
    path = directory / task.directory / split.file_name
    digest = hashlib.sha256()
    try:
        with opened(path) as file:
            fields, lines = _read_layout(task, split, path, lines_of(file, digest))
            survey = _Survey(task, split, path, fields, "skip")
            survey.read(lines)
        return survey.rows(digest.hexdigest()), survey.faults
    except FileNotFoundError:
        raise DataError(_missing(task, split, directory)) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def opened(path: Path) -> BinaryIO:
    """A file to be read from its beginning to its end.

    Raises:
        DataError: it is a device or a pipe, which may have none.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{path} is a device, a pipe or a socket; expected a file")
    return path.open("rb")


def lines_of(file: BinaryIO, digest: _Hash | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield line numbers (from 1) and lines without their ends; blank lines at the end of the file are left out."""
    blank: list[int] = []
    for number, line in enumerate(file, 1):
        if digest:
            digest.update(line)
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line:
            blank.append(number)
            continue
        if blank:
            yield from ((skipped, b"") for skipped in blank)
            blank.clear()
        yield number, line


# What a file that is no text begins with, what it is, and what to do.
_MAGIC = {
    b"\x1f\x8b": "the file is compressed by gzip; unpack it: gunzip",
    b"PK\x03\x04": "the file is a zip archive or a spreadsheet; unpack it, or save the sheet as CSV in UTF-8",
    b"PAR1": "the file is Parquet; name it *.parquet, or say format: parquet",
    b"\x28\xb5\x2f\xfd": "the file is compressed by Zstandard; unpack it: unzstd",
    b"BZh9": "the file is compressed by bzip2; unpack it: bunzip2",
    b"\xfd7zXZ": "the file is compressed by xz; unpack it: unxz",
}


def encoding_fault(line: bytes, fields: int | None = None) -> str | None:
    """Say where the first line gives away that a file is not UTF-8 text with line feeds, and what to do; or None.

    A carriage return within the line is one of its characters if the line has ``fields`` fields nevertheless.
    """
    if fault := binary_fault(line):
        return fault
    if b"\r" in line.removesuffix(b"\r") and line.count(b"\t") + 1 != fields:
        return "lines end in carriage returns alone, expected line feeds; convert the file: tr '\\r' '\\n'"
    return None


def binary_fault(line: bytes) -> str | None:
    """Say where the first line gives away that a file is no text in UTF-8, and what to do; or None."""
    for magic, fault in _MAGIC.items():
        if line.startswith(magic):
            return fault
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or 3 * line.count(b"\0") > len(line):
        return "the file is UTF-16 (or damaged: NUL bytes), expected UTF-8; convert it: iconv -f UTF-16 -t UTF-8"
    return None


def _read_layout(
    task: Task, split: Split, path: Path, lines: Iterator[tuple[int, bytes]]
) -> tuple[int, Iterator[tuple[int, bytes]]]:
    """The number of fields, and the lines behind the header; UserError where line 1 shows another layout."""
    first = next(lines, None)
    if first is None:
        return len(split.columns), lines  # an empty file: said by _Collector.rows
    number, line = first
    if fault := encoding_fault(line, None if split.header else len(split.columns)):
        raise DataError(f"{path}:{number}: {fault}")
    row = line.decode("utf-8", "replace").split("\t")
    if split.header:
        _check_header(task, split, f"{path}:{number}", row)
        return len(row), lines
    _check_without_header(task, split, f"{path}:{number}", row)
    return len(split.columns), itertools.chain([first], lines)


def same_column(found: str, official: str) -> bool:
    """Say whether a header's name is the official one, however it is spelled, or a synonym of it."""
    one, other = (re.sub(r"[\s_\ufeff-]", "", name).casefold() for name in (found, official))
    return one == other or any(one in names and other in names for names in _SYNONYMS)


def _check_header(task: Task, split: Split, place: str, header: list[str]) -> None:
    """Raise UserError unless the columns that are read have the official names."""
    columns = [column for column in (*split.text_columns, split.label_column, split.index_column) if column is not None]
    expected = f"expected the official header: {', '.join(split.columns)}"
    needed = max(columns) + 1 if split.label_column != -1 else max(columns) + 2
    if len(header) < needed:
        found = f"the header has {len(header)} fields, {task.name} {split.name} needs at least {needed}"
        raise DataError(f"{place}: {found}; {expected}")
    wrong = [column for column in columns if not same_column(header[column], split.columns[column])]
    if not wrong:
        return
    # An unlabelled file's first column is a running index, so a number there gives a data row away.
    label = split.label_column
    if header[0].strip().isdigit() if label is None else _label_fault(task, header[label].strip()) is None:
        raise DataError(f"{place}: line 1 looks like data, a header was expected; {expected}")
    found, official = header[wrong[0]].strip(), split.columns[wrong[0]]
    elsewhere = [i + 1 for i, name in enumerate(header) if same_column(name, official)]
    hint = f" ({official!r} is column {elsewhere[0]})" if elsewhere else ""
    column = wrong[0] % len(header) + 1
    raise DataError(
        f"{place}: column {column} is {found[:80]!r}, {task.name} {split.file_name} has {official!r} there{hint}: "
        f"another layout, or another task's file; {expected}"
    )


def _check_without_header(task: Task, split: Split, place: str, row: list[str]) -> None:
    """Raise UserError where the columns of a file without a header have clearly been exchanged."""
    if len(row) != len(split.columns):
        return  # a malformed row as any other
    texts = [row[column] for column in split.text_columns]
    others = [text for text in row if text not in texts]
    if any(" " in text.strip() for text in others) and not any(" " in text.strip() for text in texts):
        raise DataError(
            f"{place}: column {split.text_columns[0] + 1} is {texts[0][:80]!r}, another column holds several words; "
            f"expected the columns of {task.name} {split.file_name}: {', '.join(split.columns)} (without a header)"
        )


def _label_fault(task: Task, label: str) -> str | None:
    """Say what is wrong with a label, or None."""
    if not task.is_regression:
        return None if label in task.labels else f"label {label!r} is not one of {', '.join(task.labels)}"
    if not NUMBER.fullmatch(label):
        return f"label {label!r} is not a number"
    if 0 <= float(label) <= task.label_scale:
        return None
    return f"label {label!r} is not a number from 0 to {task.label_scale:g}"


class _Collector:
    """Gathers well-formed rows and deals with the others."""

    def __init__(self, task: Task, split: Split, path: Path, fields: int, on_bad_row: OnBadRow) -> None:
        self.task = task
        self.split = split
        self.path = path
        self.fields = fields
        self.on_bad_row = on_bad_row
        self.texts: tuple[list[str], ...] = tuple([] for _ in split.text_columns)
        self.labels: list[str] = []
        self.index: list[str] = []
        self.lines = array("Q")
        self.dropped = 0
        self.skipped = 0

    def read(self, lines: Iterator[tuple[int, bytes]]) -> None:
        """Go through all data lines; the well-formed row of a classification task takes the shortest way."""
        columns = [(texts.append, column) for texts, column in zip(self.texts, self.split.text_columns, strict=True)]
        if self.split.index_column is not None:
            columns.append((self.index.append, self.split.index_column))
        label_column, known = self.split.label_column, frozenset(self.task.labels)
        for number, line in lines:
            if line.count(b"\t") + 1 != self.fields:
                self._wrong_fields(number, line)
                continue
            try:
                row = line.decode("utf-8").split("\t")
            except UnicodeDecodeError as error:
                self._bad(number, f"invalid UTF-8 at byte {error.start + 1} of the line")
                continue
            if label_column is not None:
                label = row[label_column].strip()
                if label not in known and (fault := _label_fault(self.task, label)):
                    self._bad(number, fault)
                    continue
                self.labels.append(label)
            for append, column in columns:
                append(row[column].strip())
            self.lines.append(number)

    def rows(self, sha256: str) -> Rows:
        """Return what was read; no row at all is an error."""
        if not self.texts[0]:
            left_out = self.dropped + self.skipped
            found = f"all {left_out} rows are malformed" if left_out else "no rows"
            raise DataError(f"{self.path}: {found}, expected at least one; check that the file is complete")
        labels, index = (self.labels, None) if self.split.labelled else (None, self.index)
        return Rows(self.path, self.texts, labels, self.dropped, self.skipped, sha256, index, self.lines)

    def _wrong_fields(self, number: int, line: bytes) -> None:
        if self.split.drop_malformed:
            self.dropped += 1
        else:
            fields = line.count(b"\t") + 1
            found = f"found {fields} fields" if line else "found a blank line"
            if returns := line.count(b"\r"):
                found += f" and {returns} carriage returns, which end no line"
            self._bad(number, f"{found}, expected {self.fields}")

    def _bad(self, number: int, reason: str) -> None:
        if self.on_bad_row == "skip":
            self.skipped += 1
            return
        if number == 1 and not self.split.header:
            reason += f" ({self.task.name} {self.split.file_name} has no header: remove line 1 if it is one)"
        advice = "fix the row or set data.on_bad_row=skip (preprocess: --on-bad-row skip)"
        if not self.split.labelled:
            advice = "fix the row: every row of this file gets a prediction, so none is skipped"
        raise DataError(f"{self.path}:{number}: {reason}; {advice}")


class _Survey(_Collector):
    """A collector that notes each fault and goes on."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.faults: list[tuple[int, str]] = []

    def _wrong_fields(self, number: int, line: bytes) -> None:
        if self.split.drop_malformed:
            self.faults.append((number, "a wrong number of fields, left out as by fairseq"))
        super()._wrong_fields(number, line)

    def _bad(self, number: int, reason: str) -> None:
        self.faults.append((number, reason))
        super()._bad(number, reason)


def _missing(task: Task, split: Split, directory: Path) -> str:
    """Explain a missing file: the folder that was looked for, or a file with nearly the same name."""
    folder = directory / task.directory
    wanted, parent = (split.file_name, folder) if folder.is_dir() else (task.directory, directory)
    names = {entry.name.casefold(): entry.name for entry in sorted(parent.iterdir())} if parent.is_dir() else {}
    for other in task.splits if folder.is_dir() else ():
        names.pop(other.file_name.casefold(), None)
    near = difflib.get_close_matches(wanted.casefold(), names, n=1, cutoff=0.5)
    hint = f"; found {names[near[0]]!r} there: rename it if that is the one" if near else ""
    if folder.is_dir():
        return f"no file {folder / wanted} for the {split.name} split of {task.name}{hint}"
    advice = "set GLUE_DIR to the folder that holds it"
    return f"no folder {folder} for the {split.name} split of {task.name}{hint}; {advice}"
