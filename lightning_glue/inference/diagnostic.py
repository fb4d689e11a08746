"""GLUE's diagnostic set with its labels and phenomena, ``diagnostic/diagnostic-full.tsv`` (Wang et al. 2019, A.2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_glue.errors import DataError
from lightning_glue.tasks import get_task

FILE = "diagnostic-full.tsv"
PHENOMENA = ("Lexical Semantics", "Predicate-Argument Structure", "Logic", "Knowledge")


@dataclass(frozen=True)
class Diagnostic:
    """Attributes: texts: premises and hypotheses. labels: positions in ``Task.labels``. phenomena: rows by name."""

    texts: tuple[list[str], list[str]]
    labels: list[int]
    phenomena: dict[str, list[int]]


def read_diagnostic(root: Path) -> Diagnostic | None:
    """The file below the GLUE root; None where there is none.

    Raises:
        DataError: it is another file; names the line.
    """
    path = root / get_task("AX").directory / FILE
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    header = lines[0].rstrip("\r").split("\t")
    if missing := [name for name in (*PHENOMENA, "Premise", "Hypothesis", "Label") if name not in header]:
        raise DataError(f"{path}:1: no column {missing[0]!r}; expected that of the official {FILE}")
    known, labels = get_task("AX").labels, list[int]()
    texts: tuple[list[str], list[str]] = ([], [])
    phenomena: dict[str, list[int]] = {}
    for number, line in enumerate(lines[1:], 2):
        fields = dict(zip(header, line.rstrip("\r").split("\t")))
        if len(fields) < len(header) or fields["Label"].strip() not in known:
            raise DataError(f"{path}:{number}: found {line[:80]!r}; expected {len(header)} fields and a label of AX")
        for name in PHENOMENA:
            for part in filter(None, map(str.strip, fields[name].split(";"))):
                for key in dict.fromkeys((name, f"{name}: {part}")):
                    rows = phenomena.setdefault(key, [])
                    if not rows or rows[-1] != len(labels):
                        rows.append(len(labels))
        for column, name in zip(texts, ("Premise", "Hypothesis")):
            column.append(fields[name].strip())
        labels.append(known.index(fields["Label"].strip()))
    return Diagnostic(texts, labels, phenomena)
