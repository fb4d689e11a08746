"""What the leaderboard would refuse in a submission, or score wrongly: each fault, by file and line."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lightning_glue.errors import DataError, UserError
from lightning_glue.pipeline.benchmark_folder import BenchmarkFolder
from lightning_glue.pipeline.leaderboard import DECIMALS, FILES, HEADER, LeaderboardFile
from lightning_glue.tasks import Task
from lightning_glue.utils.redact import first_line

_SPARE = 100  # bytes read for each row besides its index; a label takes 15 at most
_MOST_ENTRIES = 1000  # of a zip whose names are looked at
_SHOWN = 60  # characters of what was found
_BOM = "\ufeff"
_SCORE = re.compile(rf"[0-9]+\.[0-9]{{{DECIMALS}}}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Fault:
    """Attributes: line: from 1; None where the fault is of the file as a whole, or of the zip."""

    file: str
    line: int | None
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.text}" if self.line is None else f"{self.file}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Expected:
    """The rows a file is to have.

    Attributes:
        index: of every row, in order.
        note: what they were taken from, where that is not the official number; else empty.
    """

    index: list[str]
    note: str = ""


@dataclass(frozen=True)
class Checked:
    """Attributes: rows: of each file that was read. notes: what the rows were compared with."""

    faults: list[Fault]
    rows: dict[str, int]
    notes: list[str]


def check_submission(path: Path, expected: Mapping[str, Expected] | None = None, *, partial: bool = False) -> Checked:
    """Every fault of a submission.

    Args:
        expected: rows by file name; of those not in it the official number, counted from 0, is expected.
        partial: files may be missing; then they are no fault.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    faults, rows, notes = list[Fault](), dict[str, int](), list[str]()
    try:
        with zipfile.ZipFile(path) as archive:
            found, faults = _entries(archive, path.name)
            for name, file in FILES.items():
                rule = (expected or {}).get(name) or official(file)
                if name in found:
                    more, rows[name] = check_file(file, _read(archive, found[name], rule), rule)
                    faults += more
                    notes += [f"{name}: {rule.note}"] if rule.note else []
                elif not partial:
                    faults.append(Fault(name, None, f"is missing; expected {len(FILES)} files"))
    except zipfile.BadZipFile as error:
        faults.append(Fault(path.name, None, f"is no zip file, or damaged ({first_line(error)})"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None
    return Checked(faults, rows, notes)


def official(file: LeaderboardFile) -> Expected:
    """The official test file's index column: its rows counted from 0."""
    return Expected([str(number) for number in range(file.rows)])


def _entries(archive: zipfile.ZipFile, name: str) -> tuple[dict[str, zipfile.ZipInfo], list[Fault]]:
    """The leaderboard's files in a zip, and what is wrong with the names in it."""
    found, faults = dict[str, zipfile.ZipInfo](), list[Fault]()
    entries = archive.infolist()
    if len(entries) > _MOST_ENTRIES:
        faults.append(Fault(name, None, f"holds {len(entries)} files, expected {len(FILES)}"))
    for entry in entries[:_MOST_ENTRIES]:
        said, leaf = _shown(entry.filename), PurePosixPath(entry.filename).name
        if entry.filename in FILES:
            if entry.filename in found:
                faults.append(Fault(said, None, "is in the zip twice"))
            found.setdefault(entry.filename, entry)
        elif entry.is_dir():
            faults.append(Fault(said, None, "is a folder; expected the files themselves at the top of the zip"))
        elif leaf in FILES:
            faults.append(Fault(said, None, f"lies in a folder; expected {leaf} at the top of the zip"))
        else:
            near = next((right for right in FILES if right.casefold() == leaf.casefold()), None)
            advice = f"did you mean {near}?" if near else "take it out"
            faults.append(Fault(said, None, f"is no file of the leaderboard; {advice}"))
    return found, faults


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, expected: Expected) -> bytes | str:
    """A file's bytes, no more than a submission of so many rows can have; or what is wrong with it."""
    rows = len(expected.index)
    limit = sum(len(index.encode()) for index in expected.index) + _SPARE * (rows + 100)
    try:
        with archive.open(entry) as file:
            data = file.read(limit + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, struct.error, ValueError,
            OSError) as error:  # fmt: skip
        return f"cannot be read from the zip ({first_line(error)})"
    if len(data) > limit:
        return f"has more than {limit} bytes, far more than {rows} rows take; nothing of it was looked at"
    return data


def check_file(file: LeaderboardFile, data: bytes | str, expected: Expected) -> tuple[list[Fault], int]:
    """The faults of one file, and how many rows it has.

    Args:
        data: its bytes, or why there are none.
    """
    if isinstance(data, str):
        return [Fault(file.name, None, data)], 0
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    faults = [Fault(file.name, number, text) for number, text in _line_faults(file.task, lines, expected)]
    faults += [Fault(file.name, line, text) for line, text in _missing(lines, expected)]
    return sorted(faults, key=lambda fault: fault.line or 0), max(0, len(lines) - 1)


def _line_faults(task: Task, lines: list[bytes], expected: Expected) -> Iterator[tuple[int, str]]:
    header = "\t".join(HEADER)
    if not lines:
        yield 1, f"the file is empty; expected the header {header!r}"
        return
    first = lines[0].removesuffix(b"\r").decode("utf-8", "replace")
    if first.startswith(_BOM):
        yield 1, "begins with a byte order mark; write the file as UTF-8 without it"
    elif first != header:
        yield 1, f"the header is {_shown(first)!r}; expected {header!r}"
    known, seen = set(expected.index), dict[str, int]()
    for number, line in enumerate(lines[1:], 2):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError:
            yield number, f"is not UTF-8: {_shown(line.decode('utf-8', 'replace'))!r}"
            seen.setdefault(_index_of(line), number)
            continue
        yield from ((number, fault) for fault in _row_faults(task, text, known, seen))
        seen.setdefault(text.partition("\t")[0], number)


def _row_faults(task: Task, text: str, known: set[str], seen: Mapping[str, int]) -> Iterator[str]:
    """What is wrong with a row: ``index<TAB>prediction``."""
    if not text:
        yield "is empty; expected an index and a prediction"
        return
    index, *predictions = text.split("\t")
    if len(predictions) != 1:
        yield f"has {len(predictions) + 1} fields, expected an index and a prediction with a tab between them"
    if index in seen:
        yield f"index {_shown(index)!r} stands in line {seen[index]} already"
    elif index not in known:
        yield f"index {_shown(index)!r} is none of the test file"
    if len(predictions) == 1 and (fault := _prediction_fault(task, predictions[0])):
        yield fault


def _prediction_fault(task: Task, text: str) -> str:
    if not task.is_regression:
        return "" if text in task.labels else f"{_shown(text)!r} is no label; expected {' or '.join(task.labels)}"
    if not _NUMBER.fullmatch(text):
        return f"{_shown(text)!r} is no number; expected a score from 0 to {task.label_scale:g}"
    if not 0 <= float(text) <= task.label_scale:
        return f"the score {_shown(text)} is not from 0 to {task.label_scale:g}"
    return "" if _SCORE.fullmatch(text) else f"the score {_shown(text)} has not {DECIMALS} decimals"


def _missing(lines: list[bytes], expected: Expected) -> Iterator[tuple[int, str]]:
    """Rows that are not there, a run of them at a time, at the line of the first."""
    found = {_index_of(line) for line in lines[1:]}
    gap: list[int] = []
    total = f"{len(expected.index)} rows are expected, there are {max(0, len(lines) - 1)}"
    for place, index in enumerate([*expected.index, None]):
        if index is not None and index not in found:
            gap.append(place)
        elif gap:
            first, last = (_shown(expected.index[one]) for one in (gap[0], gap[-1]))
            what = f"index {first!r} is" if len(gap) == 1 else f"indices {first!r} to {last!r}, {len(gap)} rows, are"
            yield gap[0] + 2, f"{what} missing here; {total}"
            gap = []


def _index_of(line: bytes) -> str:
    return line.removesuffix(b"\r").partition(b"\t")[0].decode("utf-8", "replace")


def _shown(text: str) -> str:
    """What was found, short and printable."""
    plain = "".join(one if one.isprintable() else "?" for one in text[: _SHOWN + 1])
    return plain if len(plain) <= _SHOWN else plain[:_SHOWN] + "..."


def rows_of_files(glue_dir: str | None) -> dict[str, Expected]:
    """The index columns of the test files below a GLUE folder, where they have another number of rows than the official
    ones; nothing of a file that cannot be read, for it was nobody's to predict."""
    from lightning_glue.data import reader

    found: dict[str, Expected] = {}
    root = Path(glue_dir).expanduser() if glue_dir else None
    for name, file in FILES.items():
        if root is None or not reader.has_split(file.task, file.split, root):
            continue
        try:
            index = reader.read_split(file.task, file.split, root, "skip").index
        except DataError:
            continue
        path = root / file.task.directory / file.split.file_name
        if index is not None and len(index) != file.rows:
            found[name] = Expected(index, f"compared with the {len(index)} rows of {path}; {_official(file)}")
    return found


def rows_of_benchmark(benchmark: BenchmarkFolder) -> dict[str, Expected]:
    """The rows that a benchmark's models predicted."""
    from lightning_glue.pipeline.outputs import read_outputs

    found: dict[str, Expected] = {}
    for name, file in FILES.items():
        split = file.split.name
        for seed in benchmark.seeds(file.model_task):
            folder = benchmark.outputs(file.task.name, f"seed-{seed}")
            if (folder / f"{split}.npz").is_file():
                index = read_outputs(folder, [split])[split].index or []
                note = f"compared with the {len(index)} rows that were predicted; {_official(file)}"
                found[name] = Expected(index, note if len(index) != file.rows else "")
                break
    return found


def _official(file: LeaderboardFile) -> str:
    return f"the leaderboard wants {file.rows}"
