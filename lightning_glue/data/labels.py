"""Labels in two orders: ours, that of ``Task.labels``, and fairseq's, by frequency in the training file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning_glue.data import tokenizer
from lightning_glue.data.tokenizer import SPECIALS
from lightning_glue.errors import DataError
from lightning_glue.tasks import Task

_PADDING_FACTOR = 8  # fairseq-preprocess --padding-factor
_PADDING_WORD = "madeupword"


def label_symbols(labels: Iterable[str]) -> tuple[list[str], list[int]]:
    """The label dictionary ``fairseq-preprocess`` builds: by falling frequency, ties by name, padded to 8.

    Returns:
        Symbols and how often each occurs.
    """
    ranked = Counter(dict(sorted(Counter(labels).items()))).most_common()
    symbols, counts = [label for label, _ in ranked], [count for _, count in ranked]
    padding = -(len(SPECIALS) + len(symbols)) % _PADDING_FACTOR
    return symbols + [f"{_PADDING_WORD}{i:04d}" for i in range(padding)], counts + [0] * padding


def label_ids(symbols: list[str]) -> dict[str, int]:
    """fairseq's id of each symbol of a dictionary; its special symbols come first."""
    return {symbol: i for i, symbol in enumerate(symbols, len(SPECIALS))}


def read_label_symbols(directory: Path) -> list[str]:
    """Symbols of ``label/dict.txt`` in fairseq's order, padding words left out: the map from its ids to labels."""
    symbols, _ = tokenizer.read_dictionary(directory / "label" / "dict.txt")
    return [symbol for symbol in symbols if not symbol.startswith(_PADDING_WORD)]


def fairseq_symbols(task: Task, directory: Path) -> list[str]:
    """Labels in the order that an export gives them; of data of one's own, and of a regression, there is no other."""
    return list(task.labels) if task.own or task.is_regression else read_label_symbols(directory)


@dataclass(frozen=True)
class LabelOrder:
    """A task's labels in fairseq's order, and the permutations to it and back.

    Both are index lists: ``ours[order.to_fairseq]`` is in fairseq's order, ``theirs[order.from_fairseq]`` in ours.
    Without labels, for regression, they are empty.

    Attributes:
        symbols: labels in fairseq's order; those that training never saw may be missing.

    Raises:
        UserError: a symbol is no label of the task, or stands there twice.
    """

    task: Task
    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        for i, symbol in enumerate(self.symbols):
            if symbol not in self.task.labels or symbol in self.symbols[:i]:
                wrong = "there twice" if symbol in self.task.labels else f"no label of {self.task.name}"
                raise DataError(f"{symbol!r} is {wrong}; expected {', '.join(self.task.labels) or 'none'}")

    @property
    def labels(self) -> list[str]:
        """All labels in fairseq's order, those that never occur in training last."""
        return [*self.symbols, *(label for label in self.task.labels if label not in self.symbols)]

    @property
    def to_fairseq(self) -> list[int]:
        return [self.task.labels.index(label) for label in self.labels]

    @property
    def from_fairseq(self) -> list[int]:
        labels = self.labels
        return [labels.index(label) for label in self.task.labels]
