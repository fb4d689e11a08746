"""GLUE files to fairseq's binary layout: ``input0/ input1/ label/`` with dict.txt and mmap arrays.

Replaces ``examples/roberta/preprocess_GLUE_tasks.sh``; every file has the bytes that script writes (its
``preprocess.log`` files aside). Training reads the same arrays from a cache keyed by content.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from lightning_glue.config import DataConfig
from lightning_glue.data import mmap_format, reader, sources, tokenizer
from lightning_glue.data.labels import label_ids, label_symbols
from lightning_glue.data.own_rows import split_digest
from lightning_glue.data.reader import OnBadRow, Rows
from lightning_glue.data.rows import read
from lightning_glue.data.tokenizer import SPECIALS, UNK, Tokenizer
from lightning_glue.errors import DataError, UserError
from lightning_glue.tasks import Split, Task
from lightning_glue.utils import digests
from lightning_glue.utils.files import discard, leftovers, locked, new_folder, sweep

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_SOURCES = ("reader.py", "formats.py", "rows.py", "own_rows.py", "dev_part.py", "tokenizer.py", "pretokenizer.py",
            "mmap_format.py", "labels.py", "binarize.py", "../tasks.py")  # fmt: skip


@dataclass(frozen=True)
class SplitInfo:
    """What became of one file: its digest and how many rows were kept, dropped (QQP's rule) and skipped."""

    file: str
    sha256: str
    rows: int
    dropped: int
    skipped: int


@dataclass(frozen=True)
class Prepared:
    """A preprocessed task: the folder in fairseq's layout and where its rows came from, by split name."""

    directory: Path
    splits: dict[str, SplitInfo]

    def index(self, name: str) -> list[str]:
        """The index column of an unlabelled split, row by row as in its file."""
        return json.loads((self.directory.parent / "index.json").read_text(encoding="utf-8"))[name]


def fairseq_names(task: Task) -> dict[str, str]:
    """fairseq's name of each split: train, valid, valid1, test, test1."""
    names = {task.train.name: "train"} if task.train else {}
    for kind, splits in (("valid", task.dev), ("test", task.test)):
        for i, split in enumerate(splits):
            names[split.name] = kind + (str(i) if i else "")
    return names


def _write_labels(task: Task, rows: dict[str, Rows], out: Path) -> None:
    """Write ``label/``: ``<split>.label`` with label / 5 for regression (awk's %.6g), else a dictionary and arrays."""
    names = fairseq_names(task)
    out.mkdir(parents=True)
    labelled = {name: part.labels for name, part in rows.items() if part.labels is not None}
    if task.is_regression:
        for name, labels in labelled.items():
            digits = 9 if task.own else 6  # float32's, and awk's
            scaled = ((float(str(label)) - task.label_offset) / task.label_scale for label in labels)
            (out / f"{names[name]}.label").write_text("".join(f"{value:.{digits}g}\n" for value in scaled))
        return
    if task.own:
        for name, labels in labelled.items():
            _write_own_labels(task, labels, out / names[name])
        return
    symbols, counts = label_symbols(str(label) for label in labelled.get("train", task.labels))
    index = label_ids(symbols)
    (out / "dict.txt").write_text("".join(f"{symbol} {count}\n" for symbol, count in zip(symbols, counts)))
    for name, labels in labelled.items():
        ids = np.full((len(labels), 2), tokenizer.EOS, dtype=np.int32)
        ids[:, 0] = [index.get(str(label), UNK) for label in labels]
        mmap_format.write(out / names[name], ids.ravel(), np.full(len(labels), 2), len(SPECIALS) + len(symbols))


def _write_own_labels(task: Task, labels: list[str] | list[tuple[str, ...]], prefix: Path) -> None:
    """Ids of each example's labels, in the order of ``Task.labels``: fairseq has no dictionary for any name."""
    index = {label: i for i, label in enumerate(task.labels)}
    each = [label if isinstance(label, tuple) else (label,) for label in labels]
    ids = [index[name] for names in each for name in names]
    lengths = np.array([len(names) for names in each], dtype=np.int64)
    mmap_format.write(prefix, np.array(ids, dtype=np.int64), lengths, len(task.labels))


def binarize(
    task: Task,
    rows: dict[str, Rows],
    encoder: Tokenizer,
    out: Path,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write ``rows`` (by split name) into the new folder ``out`` in the layout of ``preprocess_GLUE_tasks.sh``."""
    names = fairseq_names(task)
    for column in range(task.num_texts):
        folder = out / f"input{column}"
        folder.mkdir(parents=True)
        (folder / "dict.txt").write_text(encoder.dictionary_text, encoding="utf-8")
        for name, part in rows.items():
            ids, lengths = encoder.encode(part.texts[column], progress)
            mmap_format.write(folder / names[name], ids, lengths, encoder.dictionary_size)
    if task.train:
        _write_labels(task, rows, out / "label")


class UnfitTestFile(DataError):
    """A file whose rows are to be predicted, of a task that can be trained without it."""


def _present(task: Task, root: Path) -> list[Split]:
    """The splits to read: all labelled ones, and the test files that are there."""
    return [split for split in task.splits if split.labelled or reader.has_split(task, split, root)] or [*task.test]


def _read_rows(
    task: Task, root: Path, on_bad_row: OnBadRow, splits: Iterable[Split], raw: dict[str, str] | None = None
) -> dict[str, Rows]:
    """Rows by split name. A malformed test row always stops: predictions are submitted by row number.

    Args:
        raw: digests that the files must have, by split name.

    Raises:
        UnfitTestFile: it is a test file that cannot be read.
        UserError: another one cannot.
    """
    rows: dict[str, Rows] = {}
    for split in splits:
        try:
            on_bad = on_bad_row if split.labelled else "stop"
            rows[split.name] = read(task, split, root, on_bad)
        except DataError as error:
            raise error if split.labelled or not task.train else UnfitTestFile(str(error)) from None
    for name, part in rows.items():
        if not task.own:
            digests.check(Path(part.path), part.sha256, root, root / task.directory)
        if raw and raw[name] != part.sha256:
            raise DataError(f"{part.path} was written to while it was read; run again")
    return rows


def _binarize_with_progress(task: Task, rows: dict[str, Rows], encoder: Tokenizer, out: Path) -> None:
    from lightning_glue.utils.console import progress_bar

    total = sum(len(part) for part in rows.values()) * task.num_texts
    with progress_bar(f"tokenize {task.name}", total, "sentences") as advance:
        binarize(task, rows, encoder, out, advance)


def _raw_digests(task: Task, root: Path, splits: Iterable[Split]) -> dict[str, str]:
    """sha256 of the raw files that are there, by split name.

    Raises:
        UserError: a file cannot be read, or one of the cache is not as it was put there.
    """
    found: dict[str, str] = {}
    for split in splits:
        path = root / task.directory / split.file_name
        try:
            digest = digests.known_sha256(path) if reader.has_split(task, split, root) else None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        if not task.own:
            digests.check(path, digest, root, root / task.directory)
        if digest:
            found[split.name] = digest
    return found


def _cache_key(task: Task, raw: dict[str, str], encoder: Tokenizer, on_bad_row: OnBadRow) -> str:
    """sha256 over the raw files, the tokenizer and the code that turns one into the other."""
    digest = hashlib.sha256(f"{_what_is_read(task)} {on_bad_row} {encoder.digest}".encode())
    for source in _SOURCES:
        digest.update((Path(__file__).parent / source).read_bytes())
    for name, sha256 in raw.items():
        digest.update(name.encode() + bytes.fromhex(sha256))
    return digest.hexdigest()


def _what_is_read(task: Task) -> Task:
    """The task without what changes nothing of the arrays: where files of one's own lie, metrics, weights."""

    def bare(split: Split) -> Split:
        return replace(split, path="")

    dev, test = (tuple(map(bare, splits)) for splits in (task.dev, task.test))
    return replace(
        task, train=task.train and bare(task.train), dev=dev, test=test, metrics=(), class_weights=(), description=""
    )


def _digest(task: Task, name: str, part: Rows) -> str:
    return split_digest(task, task.split(name), part.sha256)


def _fill(entry: Path, task: Task, rows: dict[str, Rows], encoder: Tokenizer) -> None:
    infos = {
        name: asdict(SplitInfo(str(part.path), _digest(task, name, part), len(part), part.dropped, part.skipped))
        for name, part in rows.items()
    }
    with new_folder(entry, recorded=True) as folder:
        _binarize_with_progress(task, rows, encoder, folder / "bin")
        index = {name: part.index for name, part in rows.items() if part.index is not None}
        (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
        (folder / _MANIFEST).write_text(json.dumps(infos, indent=1))


def prepare(
    task: Task,
    root: Path,
    encoder: Tokenizer,
    cache: Path,
    on_bad_row: OnBadRow = "stop",
    *,
    wanted: tuple[Split, ...] | None = None,
    predicts: bool = True,
) -> Prepared:
    """Return the preprocessed task from ``cache``, made first if its content is new. Safe under concurrent calls.

    An entry of which anything is not as it was made is made again, with a warning.

    Args:
        wanted: the splits to have, for which no other files are needed; None: all that are there.
        predicts: whether the test files are wanted; if not, one that cannot be read is left out with a warning.

    Raises:
        UserError: a labelled file that is wanted is missing, or one cannot be read.
    """
    if wanted is not None:
        found = _already_there(task, root, encoder, cache, on_bad_row) or _prepare(
            task, root, encoder, cache, on_bad_row, wanted
        )
        names = {split.name for split in wanted}
        return Prepared(found.directory, {name: info for name, info in found.splits.items() if name in names})
    try:
        return _prepare(task, root, encoder, cache, on_bad_row, task.splits)
    except UnfitTestFile as error:
        if predicts:
            raise
        log.warning("left out: %s", error)
        return _prepare(task, root, encoder, cache, on_bad_row, ((task.train,) if task.train else ()) + task.dev)


def _entry(cache: Path, task: Task, raw: dict[str, str], encoder: Tokenizer, on_bad_row: OnBadRow) -> Path:
    return cache / "arrays" / f"{task.name}-{_cache_key(task, raw, encoder, on_bad_row)[:24]}"


def _read_entry(entry: Path) -> Prepared:
    splits = {name: SplitInfo(**info) for name, info in json.loads((entry / _MANIFEST).read_text()).items()}
    return Prepared(entry / "bin", splits)


def _already_there(task: Task, root: Path, encoder: Tokenizer, cache: Path, on_bad_row: OnBadRow) -> Prepared | None:
    """The entry of all the files at ``root``, as a training leaves it; None where there is none."""
    try:
        entry = _entry(cache, task, _raw_digests(task, root, task.splits), encoder, on_bad_row)
        return None if digests.fault(entry) else _read_entry(entry)
    except (UserError, OSError):
        return None


def _prepare(
    task: Task, root: Path, encoder: Tokenizer, cache: Path, on_bad_row: OnBadRow, splits: tuple[Split, ...]
) -> Prepared:
    for split in splits:
        if (split.labelled or not task.train) and not reader.has_split(task, split, root):
            _read_rows(task, root, on_bad_row, [split])  # raises the error that names the file
    raw = _raw_digests(task, root, splits)
    entry = _entry(cache, task, raw, encoder, on_bad_row)
    if digests.fault(entry) or leftovers(entry):
        with locked(entry):
            sweep(entry)
            if fault := digests.fault(entry):
                present = [split for split in splits if split.name in raw]
                rows = _read_rows(task, root, on_bad_row, present, raw)
                if os.path.lexists(entry):
                    log.warning("cache: %s %s; made again from the raw files", entry, fault)
                    discard(entry)
                _fill(entry, task, rows, encoder)
    return _read_entry(entry)


def prepare_configured(task: Task, files: DataConfig, encoder: Tokenizer, *, predicts: bool = True) -> Prepared:
    """:func:`prepare` for the files that a configuration names, in the user's cache."""
    root = sources.glue_directory(task, files.source, files.glue_dir)
    return prepare(task, root, encoder, sources.cache_dir(), files.on_bad_row, predicts=predicts)


def write_layout(task: Task, root: Path, encoder: Tokenizer, out: Path, on_bad_row: OnBadRow) -> dict[str, Rows]:
    """Write the new folder ``out`` as ``preprocess_GLUE_tasks.sh`` does; the rows in it, by split name."""
    rows = _read_rows(task, root, on_bad_row, _present(task, root))
    with new_folder(out) as folder:
        _binarize_with_progress(task, rows, encoder, folder)
    return rows
