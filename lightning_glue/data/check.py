"""What is to be known of a task's files before a training: rows, classes, lengths, and what looks wrong in them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_glue.data import reader
from lightning_glue.data.dev_part import bins, dev_rows
from lightning_glue.data.formats import BadRow, place
from lightning_glue.data.own_rows import Label, read_examples
from lightning_glue.data.tokenizer import Tokenizer
from lightning_glue.errors import DataError
from lightning_glue.tasks import Split, Task

# What a text has that was decoded wrongly once: replacement characters, UTF-8 read as Latin-1, control characters.
_MISREAD = re.compile("�|Ã[\x80-\xbf¡-¿©¨ª]|â€|Â[\x80-\xbf\xa0]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Finding:
    """Something to look at. A ``fault`` stops a training, a ``warning`` does not.

    Attributes:
        place: file and line.
    """

    severity: str
    kind: str
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.place}: {self.text}" if self.place else f"{self.severity}: {self.text}"


@dataclass
class Checked:
    """One split.

    Attributes:
        places: file and line of each row that can be read.
        tokens: length of each example as the model sees it, before it is cut.
    """

    split: Split
    file: str
    texts: tuple[list[str], ...] = ()
    labels: list[Label] | None = None
    places: list[str] = field(default_factory=list)
    faults: int = 0
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.places)

    def example(self, row: int) -> tuple[str, ...]:
        return tuple(column[row] for column in self.texts)


@dataclass
class Report:
    """What came of a check, in the order of the splits."""

    splits: list[Checked]
    findings: list[Finding]
    max_tokens: int

    @property
    def faulty(self) -> bool:
        return any(finding.severity == "fault" for finding in self.findings)

    def count(self, split: Checked, kind: str) -> int:
        """Findings of a kind in a split."""
        return sum(finding.kind == f"{split.split.name} {kind}" for finding in self.findings)


def check(task: Task, root: Path, encoder: Tokenizer, max_tokens: int, *, predicts: bool = True) -> Report:
    """Read every split of a task and look for what is wrong.

    Args:
        root: the GLUE root of a built-in task.
        max_tokens: the length that a training cuts examples to.
        predicts: whether test files that are there are looked at.
    """
    findings: list[Finding] = []
    splits = [
        _read(task, split, root, findings)
        for split in task.splits
        if split.labelled or (predicts and reader.has_split(task, split, root))
    ]
    for one in splits:
        if len(one):
            parts = [encoder.encode(column) for column in one.texts]
            one.tokens = np.sum([lengths for _, lengths in parts], axis=0) + 1 + (len(parts) == 2)
        findings += _of_texts(one, max_tokens)
        findings += _of_labels(task, one)
    train = next((one for one in splits if one.split.name == "train"), None)
    if train:
        for other in splits:
            findings += _leaks(train, other) if other is not train else []
    return Report(splits, findings, max_tokens)


def _read(task: Task, split: Split, root: Path, findings: list[Finding]) -> Checked:
    """The rows that can be read; what hinders reading one, or all, is a finding."""
    path = str(root / task.directory / split.file_name)
    found = Checked(split, path, tuple([] for _ in range(task.num_texts)))
    try:
        faults = _read_own(task, split, found) if task.own else _read_built_in(task, split, root, found)
        for number, reason in faults:
            dropped = split.drop_malformed and reason.startswith("a wrong number of fields")
            severity = "warning" if dropped else "fault"
            where = place(path, split.format, number)
            findings.append(Finding(severity, f"{split.name} fault", where, reason))
    except DataError as error:
        findings.append(Finding("fault", f"{split.name} fault", "", str(error)))
    found.faults = sum(finding.kind == f"{split.name} fault" for finding in findings)
    return found


def _read_built_in(task: Task, split: Split, root: Path, found: Checked) -> list[tuple[int, str]]:
    rows, lines, faults = reader.survey_split(task, split, root)
    found.texts, found.labels = rows.texts, list(rows.labels) if rows.labels is not None else None
    found.places = [f"{found.file}:{line}" for line in lines]
    return faults


def _read_own(task: Task, split: Split, found: Checked) -> list[tuple[int, str]]:
    faults: list[tuple[int, str]] = []
    labels: list[Any] = []
    for number, example in read_examples(task, split):
        if isinstance(example, BadRow):
            faults.append((number, example.reason))
            continue
        for column, text in zip(found.texts, example[0]):
            column.append(text)
        labels.append(example[1])
        found.places.append(place(split.path, split.format, number))
    found.labels = labels if split.labelled else None
    if split.part:
        _keep_part(task, found)
        faults = faults if split.part == "train" else []  # of the same file
    if not found.places:
        raise DataError(f"{split.path}: no row of {split.name} can be read")
    return faults


def _keep_part(task: Task, found: Checked) -> None:
    """Leave the rows of a shared file that are the split's."""
    assert task.own and task.own.dev_share and found.labels is not None
    labels: Any = found.labels
    strata: Any = bins([float(str(label)) for label in labels]) if task.is_regression else labels
    of_dev = dev_rows(found.texts, strata, task.own.dev_share, task.own.dev_seed)
    rows = [row for row, dev in enumerate(of_dev) if dev == (found.split.part == "dev")]
    found.texts = tuple([column[row] for row in rows] for column in found.texts)
    found.labels, found.places = [labels[row] for row in rows], [found.places[row] for row in rows]


def _of_texts(one: Checked, max_tokens: int) -> Iterator[Finding]:
    """Empty texts, texts that were misread, and examples that are cut."""
    name = one.split.name
    for column in one.texts:
        for row, text in enumerate(column):
            if not text:
                yield Finding("warning", f"{name} empty", one.places[row], "an empty text")
            elif misread := _MISREAD.search(text):
                said = f"a text with {misread[0]!r}: was it decoded wrongly once? {text[:60]!r}"
                yield Finding("warning", f"{name} misread", one.places[row], said)
    for row in np.flatnonzero(one.tokens > max_tokens).tolist():
        said = f"{one.tokens[row]} tokens, cut to {max_tokens}"
        yield Finding("warning", f"{name} cut", one.places[row], said)


def _of_labels(task: Task, one: Checked) -> Iterator[Finding]:
    """Examples that stand there again, with the same label or with another one; labels without an example."""
    name = one.split.name
    first: dict[tuple[str, ...], int] = {}
    for row in range(len(one)):
        before = first.setdefault(one.example(row), row)
        if before == row:
            continue
        if one.labels is None or one.labels[row] == one.labels[before]:
            yield Finding("warning", f"{name} duplicate", one.places[row], f"the same as {one.places[before]}")
        else:
            said = f"label {_words(one.labels[row])}, but {_words(one.labels[before])} in {one.places[before]}"
            yield Finding("warning", f"{name} conflict", one.places[row], f"{said}, of the same text")
    if one.labels is not None and len(one):
        counts = class_counts(one.labels)
        for label in task.labels:
            if not counts[label]:
                yield Finding("warning", f"{name} class", one.file, f"no row of {name} has the label {label!r}")


def _leaks(train: Checked, other: Checked) -> Iterator[Finding]:
    """Examples of a split that the training set has as well."""
    known = {train.example(row): train.places[row] for row in reversed(range(len(train)))}
    for row in range(len(other)):
        if where := known.get(other.example(row)):
            yield Finding("warning", f"{other.split.name} leak", other.places[row], f"in train too: {where}")


def class_counts(labels: Sequence[Label]) -> Counter[str]:
    return Counter(one for label in labels for one in (label if isinstance(label, tuple) else (label,)))


def _words(label: Label) -> str:
    return repr(label) if isinstance(label, str) else repr(", ".join(label))


KINDS = ("fault", "empty", "misread", "duplicate", "conflict", "leak", "cut")
_HEADS = ("faults", "empty", "misread", "duplicates", "conflicts", "in train", "cut")


def tables(task: Task, report: Report) -> list[list[list[str]]]:
    """Rows and lengths by split, and labels by split, each with its head."""
    head = ["split", "rows", *_HEADS, "tokens", "95 %", "longest"]
    rows = [[one.split.name, str(len(one)), *(str(report.count(one, kind)) for kind in KINDS), *_lengths(one)]
            for one in report.splits]  # fmt: skip
    labelled = [one for one in report.splits if one.labels is not None]
    return [[head, *rows], [["label", *(one.split.name for one in labelled)], *_label_rows(task, labelled)]]


def _lengths(one: Checked) -> list[str]:
    if not len(one):
        return ["-"] * 3
    return [f"{number:.0f}" for number in (np.median(one.tokens), np.quantile(one.tokens, 0.95), one.tokens.max())]


def _label_rows(task: Task, splits: list[Checked]) -> list[list[str]]:
    if task.is_regression:
        numbers = [np.array([float(str(label)) for label in one.labels or ()]) for one in splits]
        names: dict[str, Callable[[np.ndarray], Any]] = {"lowest": np.min, "mean": np.mean, "highest": np.max}
        return [
            [name, *(f"{function(part):.4g}" if len(part) else "-" for part in numbers)]
            for name, function in names.items()
        ]
    counts = [class_counts(one.labels or []) for one in splits]
    return [
        [label, *(f"{part[label]} ({part[label] / max(len(one), 1):.1%})" for part, one in zip(counts, splits))]
        for label in task.labels
    ]


def grouped(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings by severity and kind, faults first."""
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.severity, finding.kind].append(finding)
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0][0] != "fault")]
