"""Read one split of a GLUE task, row by row, exactly as the official files are laid out."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from lightning_glue.errors import UserError
from lightning_glue.tasks import Split, Task

if TYPE_CHECKING:
    from hashlib import _Hash

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Rows:
    """The rows of one split.

    ``texts`` holds one list per text column and ``labels`` the label strings (``None`` for unlabelled splits); all
    lists have ``len(rows)`` entries in the order of the file. ``dropped`` counts the rows that ``Split.drop_malformed``
    left out, ``skipped`` those that ``on_bad_row="skip"`` left out. ``sha256`` is the hex digest of the file's bytes.
    """

    path: Path
    texts: tuple[list[str], ...]
    labels: list[str] | None
    dropped: int
    skipped: int
    sha256: str

    def __len__(self) -> int:
        return len(self.texts[0])


def has_split(task: Task, split: Split, directory: Path) -> bool:
    """Say whether the file of ``split`` is there below the GLUE root ``directory``."""
    return (directory / task.directory / split.file_name).is_file()


def read_split(task: Task, split: Split, directory: Path, on_bad_row: Literal["stop", "skip"] = "stop") -> Rows:
    """Read ``directory/<task folder>/<split>.tsv``.

    Lines end at a line feed only (a carriage return before it is removed), fields at a tab; a quote is an ordinary
    character, a byte order mark at the start and blank lines at the end are ignored. Texts and labels are stripped of
    white space at both ends, as fairseq's BPE encoder does; empty texts are kept. A regression label stays the string
    of the file, checked to be a number from 0 to ``task.label_scale``.

    A malformed row raises :class:`UserError` naming file and line, or with ``on_bad_row="skip"`` is left out and
    counted. Rows with a wrong number of fields are dropped and counted where ``split.drop_malformed`` is set, as
    ``awk 'NF==6'`` in fairseq's ``preprocess_GLUE_tasks.sh`` does for QQP. A missing or empty file and a wrong header
    raise :class:`UserError` either way.
    """
    path = directory / task.directory / split.file_name
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            lines = _lines(file, digest)
            fields = _read_header(task, split, path, lines) if split.header else split.fields
            collector = _Collector(task, split, path, fields, on_bad_row)
            collector.read(lines)
    except FileNotFoundError:
        raise UserError(_missing(task, split, directory)) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return collector.rows(digest.hexdigest())


def _lines(file: BinaryIO, digest: _Hash) -> Iterator[tuple[int, bytes]]:
    """Yield line numbers (from 1) and lines without their ends; blank lines at the end of the file are left out."""
    blank: list[int] = []
    for number, line in enumerate(file, 1):
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


def _read_header(task: Task, split: Split, path: Path, lines: Iterator[tuple[int, bytes]]) -> int:
    """Consume the header and return its number of fields."""
    first = next(lines, None)
    if first is None:
        return 0  # an empty file: said by _Collector.rows
    number, line = first
    header = line.decode("utf-8", "replace").split("\t")
    last_text = max(split.text_columns)
    label = split.label_column
    needed = (last_text if label is None else last_text + 1 if label < 0 else max(last_text, label)) + 1
    if len(header) < needed:
        raise UserError(
            f"{path}:{number}: the header has {len(header)} fields, {task.name} {split.name} needs at least {needed}; "
            "expected the official GLUE layout"
        )
    # An unlabelled file's first column is a running index, so a number there gives a data row away.
    if header[0].strip().isdigit() if label is None else _label_fault(task, header[label].strip()) is None:
        raise UserError(f"{path}:{number}: line 1 looks like data, a header was expected; put the header line back")
    return len(header)


def _label_fault(task: Task, label: str) -> str | None:
    """Say what is wrong with a label, or None."""
    if not task.is_regression:
        return None if label in task.labels else f"label {label!r} is not one of {', '.join(task.labels)}"
    try:
        value = float(label)
    except ValueError:
        return f"label {label!r} is not a number"
    if math.isfinite(value) and 0 <= value <= task.label_scale:
        return None
    return f"label {label!r} is not a number from 0 to {task.label_scale:g}"


class _Collector:
    """Gathers well-formed rows and deals with the others."""

    def __init__(self, task: Task, split: Split, path: Path, fields: int | None, on_bad_row: str) -> None:
        self.task = task
        self.split = split
        self.path = path
        self.fields = fields
        self.on_bad_row = on_bad_row
        self.texts: tuple[list[str], ...] = tuple([] for _ in split.text_columns)
        self.labels: list[str] = []
        self.dropped = 0
        self.skipped = 0

    def read(self, lines: Iterator[tuple[int, bytes]]) -> None:
        """Go through all data lines; the well-formed row of a classification task takes the shortest way."""
        columns = tuple(zip((texts.append for texts in self.texts), self.split.text_columns, strict=True))
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

    def rows(self, sha256: str) -> Rows:
        """Return what was read; no row at all is an error."""
        if not self.texts[0]:
            left_out = self.dropped + self.skipped
            found = f"all {left_out} rows are malformed" if left_out else "no rows"
            raise UserError(f"{self.path}: {found}, expected at least one; check that the file is complete")
        labels = self.labels if self.split.labelled else None
        return Rows(self.path, self.texts, labels, self.dropped, self.skipped, sha256)

    def _wrong_fields(self, number: int, line: bytes) -> None:
        if self.split.drop_malformed:
            self.dropped += 1
        else:
            fields = line.count(b"\t") + 1
            found = f"found {fields} fields" if line else "found a blank line"
            self._bad(number, f"{found}, expected {self.fields}")

    def _bad(self, number: int, reason: str) -> None:
        if self.on_bad_row == "skip":
            self.skipped += 1
            return
        if number == 1 and not self.split.header:
            reason += f" ({self.task.name} {self.split.file_name} has no header: remove line 1 if it is one)"
        advice = "fix the row or set data.on_bad_row=skip (preprocess: --on-bad-row skip)"
        if not self.split.labelled:
            advice = "fix the row: predictions go by row number, so none is skipped here"
        raise UserError(f"{self.path}:{number}: {reason}; {advice}")


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
