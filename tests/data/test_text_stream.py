"""Rows of texts from streams: formats, columns, bad rows."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_glue.data.text_stream import Layout, TextRow, check_layout, format_of, read_rows
from lightning_glue.errors import DataError
from lightning_glue.tasks import TASKS

SST2, RTE, QNLI = TASKS["SST-2"], TASKS["RTE"], TASKS["QNLI"]


def rows(content: bytes, layout: Layout) -> list[TextRow]:
    return list(read_rows(io.BytesIO(content), "f", layout))


@pytest.mark.parametrize(
    ("name", "expected"), [("a.tsv", "tsv"), ("b.CSV", "csv"), ("c.ndjson", "jsonl"), ("-", "lines"), ("x.y", "lines")]
)
def test_the_suffix_tells_the_format(name: str, expected: str) -> None:
    assert format_of(name) == expected


@pytest.mark.parametrize(
    ("task", "header", "texts"),
    [
        (SST2, "id\ttext", ("b",)),
        (SST2, "sentence\tlabel", ("a",)),
        (RTE, "sentence2\tsentence1", ("b", "a")),
        (RTE, "Premise\thypothesis", ("a", "b")),
        (QNLI, "question\tsentence", ("a", "b")),
        (TASKS["MRPC"], "#1 String\t#2 String", ("a", "b")),
    ],
)
def test_columns_by_their_usual_names(task: object, header: str, texts: tuple[str, ...]) -> None:
    assert rows(f"\ufeff{header}\r\na\tb\r\n".encode(), Layout(task, "tsv"))[0].texts == texts


def test_columns_that_are_named_and_kept() -> None:
    layout = Layout(SST2, "tsv", text="y", keep=("x",))
    assert rows(b"x\ty\n1\ta\n2\n3\tc", layout) == [
        TextRow(2, ("a",), ("1",)),
        TextRow(3, (), (None,), "found 1 fields, expected 2"),
        TextRow(4, ("c",), ("3",)),
    ]


@pytest.mark.parametrize(
    ("content", "layout", "message"),
    [
        (b"a\tb\n", Layout(SST2, "tsv"), "f:1: no column 'text' for --text; found 'a', 'b'"),
        (b"text\tb\n", Layout(RTE, "tsv"), "f:1: no column 'text_pair' for --pair"),
        (b"text\n", Layout(SST2, "tsv", keep=("txt",)), "no column 'txt' to --keep; did you mean 'text'"),
        (b"", Layout(SST2, "csv"), "f: no rows, expected a header"),
        ("text\na\n".encode("utf-16"), Layout(SST2, "tsv"), "UTF-16"),
        (b"text\ra\r", Layout(SST2, "csv"), "carriage returns alone"),
        (b'{"a": 1}\n', Layout(SST2, "jsonl"), "f:1: no column 'text'"),
    ],
)
def test_what_is_no_such_file(content: bytes, layout: Layout, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        rows(content, layout)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(RTE, "lines"), "RTE takes pairs"),
        (Layout(SST2, "lines", keep=("id",)), "no columns"),
        (Layout(SST2, "tsv", pair="b"), "takes one text"),
        (Layout(SST2, "xlsx"), "format 'xlsx'"),
    ],
)
def test_layouts_that_cannot_be(layout: Layout, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_layout(layout)


def test_bad_rows_keep_their_places() -> None:
    long = b"x" * (1 << 20) + b"y"
    content = b"text\tn\n" + b"\n".join([b"a\t1", b"\xff\t2", b"", long, b"b\t5", b"", b""])
    found = rows(content, Layout(SST2, "tsv", keep=("n",)))
    assert [(row.line, row.texts, row.kept) for row in found] == [
        (2, ("a",), ("1",)), (3, (), (None,)), (4, (), (None,)), (5, (), (None,)), (6, ("b",), ("5",)),
    ]  # fmt: skip
    faults = [row.fault for row in found]
    assert faults[1] == "invalid UTF-8 at byte 1 of the line"
    assert "blank line" in faults[2]
    assert "longer than" in faults[3]


def test_json_lines() -> None:
    lines = ['{"text": "a", "id": 7}', '{"text": 5}', "[1]", "{", '{"id": 1}', '{"text": "\\ud83d"}', '{"text": "ü"}']
    found = rows("\n".join(lines).encode(), Layout(SST2, "jsonl", keep=("id",)))
    assert [row.texts for row in found] == [("a",), (), (), (), (), (), ("ü",)]
    assert [row.kept for row in found][:2] == [(7,), (None,)]
    assert found[1].fault == "'text' is '5', expected a text"
    assert found[4].fault == "no key 'text'"
    assert "half a character" in found[5].fault
    assert all(row.fault for row in found[1:6])


def test_a_csv_record_may_have_several_lines_and_a_broken_one_is_one_bad_row() -> None:
    found = rows(b'text,n\n"a ""b""\nc",1\n"x" y,2\nz,3\n', Layout(SST2, "csv", keep=("n",)))
    assert [(row.line, row.texts) for row in found] == [(2, ('a "b"\nc',)), (4, ()), (5, ("z",))]
    assert "no record of a CSV file" in found[1].fault


def test_each_plain_line_is_a_row_also_a_blank_one() -> None:
    assert [row.texts for row in rows(b"a\n\n\tb \n\n", Layout(SST2, "lines"))] == [("a",), ("",), ("\tb ",), ("",)]


TEXTS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\r\n\0"), min_size=1, max_size=20)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8))
def test_what_was_written_is_read(pairs: list[tuple[str, str]]) -> None:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([("text", "text_pair"), *pairs])
    as_json = "\n".join(json.dumps({"text": a, "text_pair": b}) for a, b in pairs)
    for content, form in ((out.getvalue(), "csv"), (as_json, "jsonl")):
        assert [row.texts for row in rows(content.encode(), Layout(RTE, form))] == pairs
