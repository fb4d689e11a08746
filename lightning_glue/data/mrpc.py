"""MRPC from its raw Microsoft form: the files train.tsv, dev.tsv and test.tsv that GLUE's download script makes of it.

Source: download_glue_data.py of the GLUE authors
(https://gist.github.com/W4ngatang/60c2bdb54d156a41194446737ce03e2e), function ``format_mrpc``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from lightning_glue.data.reader import encoding_fault, opened, same_column
from lightning_glue.errors import DataError
from lightning_glue.tasks import TASKS
from lightning_glue.utils.files import new_folder

log = logging.getLogger(__name__)

RAW_TRAIN = "msr_paraphrase_train.txt"
RAW_TEST = "msr_paraphrase_test.txt"
DEV_IDS = "dev_ids.tsv"
TEST_HEADER = "index\t#1 ID\t#2 ID\t#1 String\t#2 String"

_COLUMNS = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")


def is_raw(folder: Path) -> bool:
    """Say whether ``folder`` holds the raw form: an msr_paraphrase file and no train.tsv."""
    raw = any((folder / name).is_file() for name in (RAW_TRAIN, RAW_TEST))
    return raw and not (folder / "train.tsv").exists()


def convert(folder: Path, out: Path, dev_ids: Path | None = None) -> None:
    """Write ``out`` with train.tsv, dev.tsv and test.tsv from the raw files in ``folder``.

    The dev rows are the train rows whose pair of ids stands in ``dev_ids`` (default: ``folder/dev_ids.tsv``); test rows
    get a running index in place of the label. ``out`` must be new and appears complete or not at all. Raises
    :class:`UserError` for a missing file, a malformed row, or ids of which none is in the train file.
    """
    dev_ids = dev_ids or folder / DEV_IDS
    held_out = {(first, second) for _, (first, second) in _fields(dev_ids, 2)}
    header, *rows = _rows(folder / RAW_TRAIN)
    train = ["\t".join(header)]
    dev = ["\t".join(header)]
    for number, row in enumerate(rows, 2):
        if row[0] not in TASKS["MRPC"].labels:
            raise DataError(f"{folder / RAW_TRAIN}:{number}: label {row[0]!r} is not one of 0, 1; get the file again")
        (dev if (row[1], row[2]) in held_out else train).append("\t".join(row))
    if len(dev) == 1 or len(train) == 1:
        raise DataError(
            f"{dev_ids} selects {len(dev) - 1} of the {len(rows)} rows of {folder / RAW_TRAIN} for dev, expected some "
            "of them; get mrpc_dev_ids.tsv from the GLUE site"
        )
    missing = [pair for pair in held_out - {(row[1], row[2]) for row in rows} if pair[0].isdigit()]  # no header
    if missing:
        log.warning("%s: not in %s are %d of its pairs, such as %s", dev_ids, RAW_TRAIN, len(missing), max(missing))
    _, *rows = _rows(folder / RAW_TEST)
    test = [TEST_HEADER, *("\t".join((str(index), *row[1:])) for index, row in enumerate(rows))]
    with new_folder(out, recorded=True) as target:
        for name, lines in (("train", train), ("dev", dev), ("test", test)):
            (target / f"{name}.tsv").write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))


def _rows(path: Path) -> list[list[str]]:
    """Header and rows of a msr_paraphrase file. Without its header the first row would be lost, unseen."""
    rows = [row for _, row in _fields(path, len(_COLUMNS))]
    for found, official in zip(rows[0], _COLUMNS, strict=True):
        if not same_column(found, official):
            expected = ", ".join(_COLUMNS)
            raise DataError(f"{path}:1: found {found[:80]!r}, expected the header {expected}; get the file again")
    if len(rows) == 1:
        raise DataError(f"{path}: no rows behind the header; get the file again")
    return rows


def _fields(path: Path, expected: int) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and fields of every line, stripped as the download script does; never an empty file."""
    try:
        with opened(path) as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        raise DataError(f"no file {path}; MRPC's raw form needs {RAW_TRAIN}, {RAW_TEST} and {DEV_IDS}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DataError(f"{path}: no rows, expected {expected} tab-separated fields a line; get the file again")
    if fault := encoding_fault(lines[0], expected):
        raise DataError(f"{path}:1: {fault}")
    for number, line in enumerate(lines, 1):
        try:
            row = line.decode("utf-8").strip().split("\t")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: invalid UTF-8 at byte {error.start + 1}; get the file again") from None
        if len(row) != expected:
            raise DataError(f"{path}:{number}: found {len(row)} fields, expected {expected}; get the file again")
        yield number, row
