"""A stream of rows in, a line for each out, in their order: reading, encoding and computing at the same time.

At most four windows of rows are in memory, with what is read and encoded ahead. Within a window similar lengths meet.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import torch

from lightning_glue.data.datamodule import TokenizedSplit
from lightning_glue.data.text_stream import TextRow
from lightning_glue.inference.scorer import Scorer
from lightning_glue.tasks import Task

WINDOW_ROWS = 4096
_WINDOW_CHARACTERS = 1 << 24
_FLUSH_SECONDS = 0.5  # a row waits no longer for others to come
_END = None

Item = TypeVar("Item")


@dataclass
class Counts:
    """Attributes: rows: read. bad: of these without a prediction. truncated: cut to the model's length."""

    rows: int = 0
    bad: int = 0
    truncated: int = 0


@dataclass(frozen=True)
class _Window:
    rows: list[TextRow]
    good: list[int]
    tokens: TokenizedSplit


class _Gathering:
    """Rows from a thread that reads, taken by another a window at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows: list[TextRow] = []
        self._characters = 0
        self._since = 0.0
        self._ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def _full(self) -> bool:
        return len(self._rows) >= self.size or self._characters >= _WINDOW_CHARACTERS

    def fill(self, rows: Iterable[TextRow]) -> None:
        """Take every row; waits while a window is full."""
        try:
            for row in rows:
                with self._changed:
                    if self._ended:
                        return
                    if not self._rows:
                        self._since = time.monotonic()
                    self._rows.append(row)
                    self._characters += sum(map(len, row.texts))
                    if len(self._rows) == 1 or self._full():
                        self._changed.notify_all()
                    self._changed.wait_for(lambda: self._ended or not self._full())
        except BaseException as error:
            self._error = error
        self.end()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def windows(self) -> Iterator[list[TextRow]]:
        """Windows of rows; one is handed over when it is full, or its first row has waited long enough.

        Raises: whatever reading raised, behind the rows before it.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._ended)
                left = self._since + _FLUSH_SECONDS - time.monotonic()
                self._changed.wait_for(lambda: self._full() or self._ended, max(0.0, left))
                rows, self._rows, self._characters = self._rows, [], 0
                ended = self._ended
                self._changed.notify_all()
            if rows:
                yield rows
            if ended and not rows:
                break
        if self._error:
            raise self._error


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same, the next one made in a thread meanwhile."""
    made: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=1)
    left = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        while not left.is_set():
            try:
                return made.put((item, error), timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item, None)
                if left.is_set():
                    return
            put(_END, None)
        except BaseException as error:
            put(_END, error)

    threading.Thread(target=work, name="encode", daemon=True).start()
    try:
        while True:
            item, error = made.get()
            if error:
                raise error
            if item is None:
                return
            yield item
    finally:
        left.set()


def predict_rows(
    scorer: Scorer,
    rows: Iterable[TextRow],
    write: Callable[[TextRow, Any, Sequence[float]], None],
    flush: Callable[[], None],
    advance: Callable[[int], None] = lambda count: None,
    *,
    window: int = WINDOW_ROWS,
) -> Counts:
    """Predict every row and have it written, in their order.

    Args:
        rows: read in a thread.
        write: called with each row, its label (its score for regression; None for a bad row) and its probabilities.
        flush: called behind each window.
        advance: called with numbers of rows done.
        window: rows among which similar lengths meet.

    Raises: what reading, predicting or writing raises, behind the rows before it.
    """
    counts, gathering = Counts(), _Gathering(window)
    threading.Thread(target=gathering.fill, args=(rows,), name="read", daemon=True).start()

    def encoded() -> Iterator[_Window]:
        for found in gathering.windows():
            good = [i for i, row in enumerate(found) if not row.fault]
            columns = [list(column) for column in zip(*(found[i].texts for i in good))]
            columns = columns or [[] for _ in range(scorer.model.task.num_texts)]
            yield _Window(found, good, scorer.encode(columns))

    try:
        for one in _ahead(encoded()):
            answer = scorer.model.answered(torch.from_numpy(scorer.outputs(one.tokens, advance)))
            said = list(answer.scores.tolist() if scorer.model.task.is_regression else answer.labels)
            shares = answer.probabilities.tolist()
            of_good = iter(range(len(one.good)))
            for row in one.rows:
                place = None if row.fault else next(of_good)
                write(row, None if place is None else said[place], () if place is None else shares[place])
            flush()
            bad = len(one.rows) - len(one.good)
            advance(bad)
            counts.rows, counts.bad = counts.rows + len(one.rows), counts.bad + bad
            counts.truncated += one.tokens.truncated
    finally:
        gathering.end()
    return counts


class Writer:
    """Lines of TSV or JSON, one for each row: what was kept, then label and probabilities, or the score.

    A bad row's line has them empty (``null``) and ``error`` says why. In TSV a tab or a line end within a value
    becomes a blank.
    """

    def __init__(self, file: IO[str], task: Task, keep: Sequence[str], *, as_json: bool) -> None:
        self.file, self.task, self.keep, self.as_json = file, task, list(keep), as_json
        said = ["score"] if task.is_regression else ["label", *(f"probability_{label}" for label in task.labels)]
        self.columns = [*self.keep, *said, "error"]
        self._begun = as_json

    def begin(self) -> None:
        """Write the header of a table, once."""
        if not self._begun:
            self._begun = True
            self._table(self.columns)

    def _table(self, cells: Sequence[str]) -> None:
        self.file.write("\t".join(cell.translate(_BLANKS) for cell in cells) + "\n")

    def write(self, row: TextRow, said: Any, probabilities: Sequence[float]) -> None:
        """Args: said: label, labels or score; None: of a bad row."""
        self.begin()
        if self.as_json:
            self.file.write(json.dumps(self._record(row, said, probabilities), ensure_ascii=False) + "\n")
            return
        kept = ["" if value is None else str(value) for value in row.kept] or [""] * len(self.keep)
        if said is None:
            self._table([*kept, *[""] * (len(self.columns) - len(kept) - 1), row.fault])
        elif self.task.is_regression:
            self._table([*kept, f"{said:.6g}", ""])
        else:
            label = said if isinstance(said, str) else ",".join(said)
            self._table([*kept, label, *(f"{share:.6g}" for share in probabilities), ""])

    def _record(self, row: TextRow, said: Any, probabilities: Sequence[float]) -> dict[str, Any]:
        record = dict(zip(self.keep, row.kept or (None,) * len(self.keep)))
        record["score" if self.task.is_regression else "label"] = said
        if not self.task.is_regression:
            shares = {label: round(share, 7) for label, share in zip(self.task.labels, probabilities)}
            record["probabilities"] = shares or None
        return record | ({"error": row.fault} if row.fault else {})


_BLANKS = str.maketrans("\t\n\r", "   ")
