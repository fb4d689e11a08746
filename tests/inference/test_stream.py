"""A stream of rows predicted: the order, bad rows, windows, time, what comes out; and answers without neighbours."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scorers import make_scorer, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_glue.data.batching import EvalSampler
from lightning_glue.data.text_stream import TextRow
from lightning_glue.inference.predict import autocast
from lightning_glue.inference.scorer import Scorer, resolve_precision
from lightning_glue.inference.stream import Writer, predict_rows
from lightning_glue.model.frozen import _Linear
from lightning_glue.model.roberta import logits
from lightning_glue.utils.processor import cpu_has_bf16

PRECISIONS = ["32-true", *(["bf16-mixed"] if cpu_has_bf16() else [])]


@pytest.fixture(scope="module")
def scorer(bpe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return make_scorer("SST-2", bpe_dir, tmp_path_factory.mktemp("sst"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_frozen_forward_is_that_of_training(scorer: Scorer, precision: str) -> None:
    scorer = Scorer(scorer.model, precision)
    assert scorer.frozen
    rows = scorer.encode([texts(200)])
    tolerance = 1e-5 if precision == "32-true" else 2e-2
    for batch in EvalSampler(rows.lengths, 700):
        part = rows[batch]
        with torch.no_grad(), autocast(precision, torch.device("cpu")):
            expected = logits(scorer.model.fine_tuned.model, part)
        found = scorer._forward(part)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 299), min_size=1, max_size=30))
def test_a_row_has_the_same_answer_to_the_bit_in_any_company(scorer: Scorer, precision: str, chosen: list[int]) -> None:
    scorer = Scorer(scorer.model, precision)
    everything = texts(300, seed=1, longest=120)
    alone = scorer.outputs(scorer.encode([[everything[chosen[0]]]]))
    together = scorer.outputs(scorer.encode([[everything[i] for i in chosen]]))
    assert np.array_equal(together[0], alone[0])


@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if cpu_has_bf16() else [])])
@pytest.mark.parametrize("inputs, outputs", [(384, 1536), (1536, 384), (768, 3072), (3072, 768), (768, 768), (1024, 2)])
def test_a_row_of_a_product_is_the_same_to_the_bit_beside_any_number(
    inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = _Linear.of(dtype, torch.nn.Linear(inputs, outputs))
    x = torch.randn(70, inputs)
    together = linear(x)
    for count in (1, 2, 3, 5, 16, 33):
        assert torch.equal(linear(x[:count]), together[:count])
    assert torch.equal(torch.cat([linear(row[None]) for row in x]), together)


def test_batches_of_several_threads_are_those_of_one_to_the_bit(scorer: Scorer) -> None:
    rows = scorer.encode([texts(300, seed=1, longest=120)])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = Scorer(scorer.model)
        torch.set_num_threads(1)
        advanced: list[int] = []
        assert np.array_equal(several.outputs(rows, advanced.append), Scorer(scorer.model).outputs(rows))
        assert sum(advanced) == 300
        assert len({thread.name for thread in threading.enumerate() if thread.name.startswith("frozen")}) == 3
        several.outputs(several.encode([["film"]]))
        assert torch.get_num_threads() == 3  # one row has them all
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads, budget, parts", [(2, 200, 1), (2, 700, 2), (2, 4000, 2), (2, 6000, 4), (1, 4000, 2)])
def test_each_core_gets_as_many_parts_as_its_caches_hold(scorer: Scorer, threads: int, budget: int, parts: int) -> None:
    rows = scorer.encode([["film " * 20] * 500])
    batch = rows[next(iter(EvalSampler(rows.lengths, budget)))]
    frozen = Scorer(scorer.model)._forward
    frozen._threads = threads  # type: ignore[attr-defined]
    found = frozen._parts(batch)  # type: ignore[attr-defined]
    assert len(found) == parts
    assert max(len(part["tokens"]) for part in found) <= 2048 + rows.lengths.max()


@pytest.mark.parametrize("window", [1, 7, 4096])
def test_rows_keep_their_order_and_bad_ones_their_places(scorer: Scorer, window: int) -> None:
    given_texts = texts(60, seed=2)
    rows = [TextRow(i, (), (i,), "broken") if i % 9 == 4 else TextRow(i, (text,), (i,))
            for i, text in enumerate(given_texts)]  # fmt: skip
    said: list[tuple[int, list[float]]] = []
    advanced: list[int] = []
    counts = predict_rows(scorer, rows, lambda row, _, shares: said.append((row.line, [*shares])), lambda: None,
                          advanced.append, window=window)  # fmt: skip
    expected = scorer.model.predict(given_texts).probabilities
    assert [line for line, _ in said] == list(range(60))
    assert [line for line, shares in said if not shares] == list(range(4, 60, 9))
    assert all(shares == pytest.approx(expected[line], abs=1e-5) for line, shares in said if shares)
    assert len({round(row[0], 4) for row in expected}) > 30
    assert (counts.rows, counts.bad, sum(advanced)) == (60, 7, 60)


def test_an_endless_stream_is_answered_before_it_ends_and_never_read_far_ahead(scorer: Scorer) -> None:
    answered, read = threading.Semaphore(0), []

    def rows() -> Iterator[TextRow]:
        yield TextRow(1, ("a fine film",))
        assert answered.acquire(timeout=60)  # the first is answered although nothing follows it
        for line in range(2, 10**6):
            read.append(line)
            yield TextRow(line, ("film",))

    class Enough(Exception):
        pass

    def write(row: TextRow, *_: object) -> None:
        answered.release()
        if row.line == 50:
            raise Enough

    with pytest.raises(Enough):
        predict_rows(scorer, rows(), write, lambda: None, window=10)
    assert len(read) < 150


def test_what_reading_raises_comes_behind_the_rows_before_it(scorer: Scorer) -> None:
    def rows() -> Iterator[TextRow]:
        yield from (TextRow(i, ("film",)) for i in range(5))
        raise OSError("gone")

    said: list[int] = []
    with pytest.raises(OSError, match="gone"):
        predict_rows(scorer, rows(), lambda row, *_: said.append(row.line), lambda: None, window=2)
    assert said == [0, 1, 2, 3, 4]


def test_tables_and_json(scorer: Scorer) -> None:
    task = scorer.model.task
    rows = [(TextRow(2, ("x",), ("i\td",)), "1", [0.25, 0.75]), (TextRow(3, (), (), "bad"), None, ())]
    table, lines = io.StringIO(), io.StringIO()
    for file, as_json in ((table, False), (lines, True)):
        writer = Writer(file, task, ["id"], as_json=as_json)
        for row in rows:
            writer.write(*row)
    assert table.getvalue() == ("id\tlabel\tprobability_0\tprobability_1\terror\ni d\t1\t0.25\t0.75\t\n\t\t\t\tbad\n")
    assert [json.loads(line) for line in lines.getvalue().splitlines()] == [
        {"id": "i\td", "label": "1", "probabilities": {"0": 0.25, "1": 0.75}},
        {"id": None, "label": None, "probabilities": None, "error": "bad"},
    ]


def test_scores_of_a_regression(bpe_dir: Path, tmp_path: Path) -> None:
    scorer = make_scorer("STS-B", bpe_dir, tmp_path)
    firsts, seconds = texts(5, 3), texts(5, 4)
    said: list[float] = []
    pairs = (TextRow(i, pair) for i, pair in enumerate(zip(firsts, seconds)))
    predict_rows(scorer, pairs, lambda row, score, shares: said.append(score), lambda: None)
    assert said == pytest.approx(scorer.model.predict(firsts, seconds).scores, abs=1e-4)
    out = io.StringIO()
    Writer(out, scorer.model.task, (), as_json=False).write(TextRow(1, ("a", "b")), 2.5, ())
    assert out.getvalue() == "score\terror\n2.5\t\n"


@pytest.mark.parametrize(
    ("asked", "trained", "native", "expected"),
    [
        ("auto", "bf16-mixed", False, "32-true"), ("auto", "bf16-mixed", True, "bf16-mixed"),
        ("auto", None, True, "32-true"),
        ("auto", "64-true", True, "64-true"), ("bf16-mixed", "32-true", False, "bf16-mixed"),
    ],
)  # fmt: skip
def test_precision(
    asked: str, trained: str | None, native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_glue.inference.scorer.cpu_has_bf16", lambda: native)
    assert resolve_precision(asked, trained, torch.device("cpu")) == expected
