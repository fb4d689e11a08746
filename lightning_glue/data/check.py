"""What is to be known of a task's files before a training: rows, classes, lengths, and what looks wrong in them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from lightning_glue.data import reader
from lightning_glue.data.dev_part import bins, chosen_rows, row_digest
from lightning_glue.data.formats import BadRow, place
from lightning_glue.data.own_rows import Label, read_examples
from lightning_glue.data.tokenizer import Tokenizer
from lightning_glue.errors import DataError
from lightning_glue.tasks import Split, Task

_KEPT = 1000  # findings of a kind
_PART = 4096  # rows that are in memory with their texts
_MISSING = {"nan", "na", "n/a", "null", "none", "nil", "?", "-"}
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
    """One split. Of its texts digests are kept, so that memory does not grow with them.

    Attributes:
        lines: in the file, of each row that can be read.
        digests: of the texts of each.
        tokens: length of each example as the model sees it, before it is cut.
    """

    split: Split
    file: str
    labels: list[Label] | None = None
    lines: array[int] = field(default_factory=lambda: array("Q"))
    digests: list[bytes] = field(default_factory=list)
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int) -> str:
        """File and line of a row."""
        return place(self.file, self.split.format, self.lines[row])


@dataclass
class Report:
    """What came of a check.

    Attributes:
        splits: in the task's order.
        findings: in the order of the splits; of each kind the first 1000.
        counts: of all findings, by severity and kind.
    """

    splits: list[Checked] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def faulty(self) -> bool:
        return any(severity == "fault" for severity, _ in self.counts)

    def count(self, split: Checked, kind: str) -> int:
        """Findings of a kind in a split."""
        return sum(self.counts[severity, f"{split.split.name} {kind}"] for severity in ("fault", "warning"))

    def add(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.counts[finding.severity, finding.kind] += 1
            if self.counts[finding.severity, finding.kind] <= _KEPT:
                self.findings.append(finding)


def check(task: Task, root: Path, encoder: Tokenizer, max_tokens: int, *, predicts: bool = True) -> Report:
    """Read every split of a task and look for what is wrong.

    Args:
        root: the GLUE root of a built-in task.
        max_tokens: the length that a training cuts examples to.
        predicts: whether test files that are there are looked at.
    """
    report = Report()
    of_dev = _rows_of_dev(task)
    for split in task.splits:
        if split.labelled or (predicts and reader.has_split(task, split, root)):
            one = _read(task, split, root, encoder, max_tokens, of_dev, report)
            report.add(_of_labels(task, one))
            report.splits.append(one)
    train = next((one for one in report.splits if one.split.name == "train"), None)
    if train:
        known = {digest: row for row, digest in reversed([*enumerate(train.digests)])}
        for other in report.splits:
            report.add(_leaks(train, known, other) if other is not train else [])
    return report


Row = tuple[int, Sequence[str], Label | None]  # line, texts, label


def _read(
    task: Task, split: Split, root: Path, encoder: Tokenizer, max_tokens: int, of_dev: Sequence[bool], report: Report
) -> Checked:
    """The rows that can be read; what hinders reading one, or all, is a finding."""
    found = Checked(split, split.path or str(root / task.directory / split.file_name), [] if split.labelled else None)

    def fault(number: int, reason: str) -> None:
        dropped = split.drop_malformed and reason.startswith("a wrong number of fields")
        where = place(found.file, split.format, number)
        report.add([Finding("warning" if dropped else "fault", f"{split.name} fault", where, reason)])

    try:
        rows = _own_rows(task, split, of_dev, fault) if task.own else _built_in_rows(task, split, root, fault)
        while part := list(islice(rows, _PART)):
            _take(found, part, encoder)
            report.add(_of_texts(found, part, max_tokens))
        if not len(found):
            raise DataError(f"{found.file}: no row of {split.name} can be read")
    except DataError as error:
        report.add([Finding("fault", f"{split.name} fault", "", str(error))])
    return found


def _built_in_rows(task: Task, split: Split, root: Path, fault: Callable[[int, str], None]) -> Iterator[Row]:
    rows, faults = reader.survey_split(task, split, root)
    for number, reason in faults:
        fault(number, reason)
    yield from zip(rows.lines, zip(*rows.texts), rows.labels or repeat(None))


def _own_rows(task: Task, split: Split, of_dev: Sequence[bool], fault: Callable[[int, str], None]) -> Iterator[Row]:
    kept = iter(of_dev)
    for number, example in read_examples(task, split):
        if isinstance(example, BadRow):
            if split.part != "dev":  # of the same file as train
                fault(number, example.reason)
        elif not split.part or next(kept, False) == (split.part == "dev"):
            yield number, example[0], example[1]


def _rows_of_dev(task: Task) -> list[bool]:
    """Of a training file that is split, which of the rows that can be read are of the dev set; else empty."""
    if not task.own or not task.own.dev_share or not task.train:
        return []
    digests: list[bytes] = []
    labels: list[Any] = []
    try:
        for _, example in read_examples(task, task.train):
            if not isinstance(example, BadRow):
                digests.append(row_digest(task.own.dev_seed, example[0]))
                labels.append(example[1])
    except DataError:  # said when the split is read
        return []
    return chosen_rows(digests, bins([*map(float, labels)]) if task.is_regression else labels, task.own.dev_share)


def _take(one: Checked, part: list[Row], encoder: Tokenizer) -> None:
    """Keep of some rows what is compared later."""
    for number, texts, label in part:
        one.lines.append(number)
        one.digests.append(hashlib.blake2b("\0".join(texts).encode(), digest_size=16).digest())
        if one.labels is not None:
            one.labels.append(label or "" if not isinstance(label, tuple) else label)
    encoded = [encoder.encode(list(column)) for column in zip(*(texts for _, texts, _ in part))]
    lengths = np.sum([lengths for _, lengths in encoded], axis=0) + 1 + (len(encoded) == 2)
    one.tokens = np.concatenate([one.tokens, lengths])


def _of_texts(one: Checked, part: list[Row], max_tokens: int) -> Iterator[Finding]:
    """Empty texts, texts that were misread, and examples that are cut, among the rows that were read last."""
    name, begin = one.split.name, len(one) - len(part)
    for row, (_, texts, _) in enumerate(part, begin):
        for text in texts:
            if not text:
                yield Finding("warning", f"{name} empty", one.place(row), "an empty text")
            elif misread := _MISREAD.search(text):
                said = f"a text with {misread[0]!r}: was it decoded wrongly once? {text[:60]!r}"
                yield Finding("warning", f"{name} misread", one.place(row), said)
    for row in (np.flatnonzero(one.tokens[begin:] > max_tokens) + begin).tolist():
        said = f"{one.tokens[row]} tokens, cut to {max_tokens}"
        yield Finding("warning", f"{name} cut", one.place(row), said)


def _of_labels(task: Task, one: Checked) -> Iterator[Finding]:
    """Examples that stand there again, with the same label or with another one; labels without an example."""
    name = one.split.name
    first: dict[bytes, int] = {}
    for row, digest in enumerate(one.digests):
        before = first.setdefault(digest, row)
        if before == row:
            continue
        if one.labels is None or one.labels[row] == one.labels[before]:
            yield Finding("warning", f"{name} duplicate", one.place(row), f"the same as {one.place(before)}")
        else:
            said = f"label {_words(one.labels[row])}, but {_words(one.labels[before])} in {one.place(before)}"
            yield Finding("warning", f"{name} conflict", one.place(row), f"{said}, of the same text")
    if one.labels is not None and len(one):
        counts = class_counts(one.labels)
        for label in task.labels:
            if not counts[label]:
                yield Finding("warning", f"{name} class", one.file, f"no row of {name} has the label {label!r}")
    if name == "train":
        yield from _alike(task, one)


def _alike(task: Task, train: Checked) -> Iterator[Finding]:
    """Labels that look the same to a reader, or that stand for a missing value."""
    looks: dict[str, str] = {}
    for label in task.labels:
        visible = "".join(sign for sign in unicodedata.normalize("NFKC", label) if unicodedata.category(sign) != "Cf")
        before = looks.setdefault(" ".join(visible.casefold().split()), label)
        if before != label:
            said = f"labels {before!a} and {label!a} look alike: are they two classes?"
            yield Finding("warning", "train labels", train.file, said)
        if label.casefold() in _MISSING:
            said = f"the label {label!r} is a class here: does it stand for a missing value?"
            yield Finding("warning", "train labels", train.file, said)


def _leaks(train: Checked, known: Mapping[bytes, int], other: Checked) -> Iterator[Finding]:
    """Examples of a split that the training set has as well.

    Args:
        known: the first row of each digest in it.
    """
    for row, digest in enumerate(other.digests):
        if (where := known.get(digest)) is not None:
            yield Finding(
                "warning", f"{other.split.name} leak", other.place(row), f"in train too: {train.place(where)}"
            )


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
