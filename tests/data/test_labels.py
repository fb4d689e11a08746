"""The label dictionary against fairseq's own, and the two orders of a task's labels."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from fairseq.tasks import FairseqTask
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_glue.data.labels import LabelOrder, label_ids, label_symbols, read_label_symbols
from lightning_glue.errors import UserError
from lightning_glue.tasks import TASKS, Task

CLASSIFICATION = [task for task in TASKS.values() if not task.is_regression]


@st.composite
def orders(draw: st.DrawFn) -> LabelOrder:
    """Of any task: some of its labels in any order."""
    task = draw(st.sampled_from(CLASSIFICATION))
    symbols = draw(st.permutations(task.labels))
    return LabelOrder(task, tuple(symbols[: draw(st.integers(0, len(symbols)))]))


@given(orders())
def test_there_and_back_is_the_identity(order: LabelOrder) -> None:
    ours = torch.arange(order.task.num_outputs)
    assert torch.equal(ours[order.to_fairseq][order.from_fairseq], ours)
    assert torch.equal(ours[order.from_fairseq][order.to_fairseq], ours)
    assert [order.task.labels[i] for i in order.to_fairseq] == order.labels
    assert [order.labels[i] for i in order.from_fairseq] == list(order.task.labels)
    assert order.labels[: len(order.symbols)] == list(order.symbols)


@given(st.lists(st.sampled_from(["entailment", "neutral", "contradiction", "0", "1", "not_entailment"]), max_size=40))
@settings(max_examples=50, deadline=None)
def test_the_dictionary_is_that_of_fairseq_preprocess(labels: list[str]) -> None:
    symbols, counts = label_symbols(labels)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "labels"
        path.write_text("".join(f"{label}\n" for label in labels))
        theirs = FairseqTask.build_dictionary([str(path)], workers=1, padding_factor=8)
        (Path(folder) / "label").mkdir()
        theirs.save(str(Path(folder) / "label" / "dict.txt"))
        read = read_label_symbols(Path(folder))
    assert symbols == theirs.symbols[theirs.nspecial :]
    assert counts == theirs.count[theirs.nspecial :]
    assert label_ids(symbols) == {symbol: theirs.index(symbol) for symbol in symbols}
    assert set(read) == set(labels)
    assert read == symbols[: len(read)]


def test_the_dictionary_is_by_frequency_and_ties_by_name() -> None:
    symbols, counts = label_symbols(["b", "a", "c", "c", "b", "a", "c"])
    assert symbols == ["c", "a", "b", "madeupword0000"]
    assert counts == [3, 2, 2, 0]


def test_labels_unseen_in_training_come_last() -> None:
    order = LabelOrder(TASKS["MNLI"], ("entailment",))
    assert order.labels == ["entailment", "contradiction", "neutral"]


@pytest.mark.parametrize(
    ("task", "symbols", "message"),
    [
        (TASKS["RTE"], ("entailment", "neutral"), "'neutral' is no label of RTE; expected entailment, not_entailment"),
        (TASKS["RTE"], ("entailment", "entailment"), "'entailment' is there twice"),
        (TASKS["STS-B"], ("1",), "'1' is no label of STS-B; expected none"),
    ],
)
def test_symbols_that_are_no_order_of_the_labels_are_refused(
    task: Task, symbols: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        LabelOrder(task, symbols)


def test_regression_has_no_order() -> None:
    order = LabelOrder(TASKS["STS-B"], ())
    assert order.labels == order.to_fairseq == order.from_fairseq == []
