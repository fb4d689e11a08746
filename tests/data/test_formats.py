"""Files of one's own: what was written is read, by whatever writes such files; faults are named with their place."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_glue.data.formats import BadRow, dialect_of, read_rows
from lightning_glue.errors import DataError

NAMES = ["text", "label"]
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r\0"), min_size=1, max_size=12)
COMMON = {"max_examples": 60, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def read(path: Path, kind: str, content: bytes, columns: list = NAMES, *, header: bool = True, quoted: bool = False):
    path.write_bytes(content)
    dialect = dialect_of(kind, ",", quoted=quoted, header=header)
    return list(read_rows(path, kind, columns, dialect))


def values(rows: list) -> list[list]:
    assert not [row for _, row in rows if isinstance(row, BadRow)]
    return [row for _, row in rows]


@settings(**COMMON)
@given(rows=st.lists(st.tuples(ANY, PLAIN).map(list), min_size=1, max_size=6), end=st.sampled_from(["\n", "\r\n"]))
def test_csv_is_read_as_it_was_written(rows: list[list[str]], end: str, tmp_path: Path) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([NAMES, *rows])
    assert values(read(tmp_path / "x.csv", "csv", b"\xef\xbb\xbf" + buffer.getvalue().encode())) == rows
    tabs = io.StringIO()
    csv.writer(tabs, "excel-tab", lineterminator=end, quoting=csv.QUOTE_ALL).writerows([NAMES, *rows])
    assert values(read(tmp_path / "x.tsv", "tsv", tabs.getvalue().encode(), quoted=True)) == rows


@settings(**COMMON)
@given(rows=st.lists(st.tuples(PLAIN, PLAIN).map(list), min_size=1, max_size=6))
def test_tsv_has_no_quotes(rows: list[list[str]], tmp_path: Path) -> None:
    content = "".join("\t".join(row) + "\n" for row in [NAMES, *rows])
    assert values(read(tmp_path / "x.tsv", "tsv", content.encode())) == rows
    bare = "".join("\t".join(row) + "\n" for row in rows).encode()
    if not bare.startswith(b"\xef\xbb\xbf"):
        assert values(read(tmp_path / "x.tsv", "tsv", bare, [1, 0], header=False)) == [row[::-1] for row in rows]


@settings(**COMMON)
@given(
    rows=st.lists(
        st.tuples(ANY, st.none() | ANY | st.integers(-9, 9) | st.booleans() | st.lists(ANY, max_size=3)).map(list),
        min_size=1,
        max_size=6,
    ),
    ascii_only=st.booleans(),
)
def test_json_lines_are_read_as_they_were_written(rows: list[list], ascii_only: bool, tmp_path: Path) -> None:
    lines = [json.dumps({"other": 1, **dict(zip(NAMES, row))}, ensure_ascii=ascii_only) for row in rows]
    assert values(read(tmp_path / "x.jsonl", "jsonl", "\n".join(lines).encode())) == rows


@settings(**COMMON)
@given(rows=st.lists(st.tuples(ANY, st.none() | st.lists(ANY, max_size=3)).map(list), min_size=1, max_size=6))
def test_parquet_is_read_as_it_was_written(rows: list[list], tmp_path: Path) -> None:
    table = pa.table(
        {
            "label": pa.array([row[1] for row in rows], pa.list_(pa.large_string())),
            "text": pa.array([row[0] for row in rows]).dictionary_encode(),
        }
    )
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=2)
    found = read(tmp_path / "x.parquet", "parquet", buffer.getvalue())
    assert (values(found), [number for number, _ in found]) == (rows, [*range(1, len(rows) + 1)])


def test_a_rows_number_is_that_of_its_first_line_and_blank_lines_at_the_end_are_none(tmp_path: Path) -> None:
    content = b'text,label\r\n"two\r\nlines, ""quoted""",a\r\nplain,b\r\n\r\n\n'
    assert read(tmp_path / "x.csv", "csv", content) == [(2, ['two\r\nlines, "quoted"', "a"]), (4, ["plain", "b"])]
    long = "word " * 40_000  # beyond the limit that the csv module has by itself, which stays
    before = csv.field_size_limit()
    assert values(read(tmp_path / "x.csv", "csv", f"text,label\n{long},a\n".encode())) == [[long, "a"]]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("kind", "content", "number", "reason"),
    [
        ("csv", b"text,label\nx,a\nonly one\ny,b\n", 3, "found 1 fields, expected 2"),
        ("csv", b"text,label\nx,a\n\ny,b\n", 3, "found a blank line, expected 2"),
        ("csv", b'text,label\nx,a\n"y"z,b\nz,c\n', 3, "no CSV: ',' expected after '\"'"),
        ("csv", b"text,label\nx,a\ncaf\xe9,b\n", 3, "invalid UTF-8 at byte 4 of the line"),
        ("csv", b"text,label\nx,a\na\rb,b\n", 3, "no CSV: a carriage return that ends no line stands outside"),
        ("tsv", b"text\tlabel\nx\ta\ny\n", 3, "found 1 fields, expected 2"),
        ("tsv", b"text\tlabel\nx\ta\n\xff\tb\n", 3, "invalid UTF-8 at byte 1"),
        ("jsonl", b'{"text": "x", "label": 1}\n{"text": "y"\n', 2, "no JSON: Expecting"),
        ("jsonl", b'{"text": "x", "label": 1}\n{"text": "y"}\n', 2, "no column 'label'; expected one of: text"),
        (
            "jsonl",
            b'{"text": "x", "label": 1}\n["y", 2]\n',
            2,
            "found a JSON list, expected an object with text, label",
        ),
        ("jsonl", b'{"text": "x", "label": 1}\n\n{"text": "y", "label": 1}\n', 2, "found a blank line"),
        ("jsonl", b'{"text": "x", "label": 1}\n' + b"[" * 100_000 + b"\n", 2, "no JSON"),
    ],
)
def test_a_faulty_row_is_named_and_the_others_are_read(
    kind: str, content: bytes, number: int, reason: str, tmp_path: Path
) -> None:
    rows = read(tmp_path / f"x.{kind}", kind, content)
    (found,) = [(place, row.reason) for place, row in rows if isinstance(row, BadRow)]
    assert found[0] == number
    assert found[1].startswith(reason)
    assert len(rows) >= 2


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("csv", b'text,label\nx,a\n"never closed,b\ny,c\nz,d\n', "x.csv:3: a quote is opened in this row and never"),
        ("csv", b"text,stars\nx,a\n", "x.csv:1: no column 'label'; expected one of: text, stars"),
        ("csv", b"text,Label\nx,a\n", "x.csv:1: no column 'label'; did you mean 'Label'"),
        ("csv", b"text,label,label\nx,a,b\n", "x.csv:1: the header has the column 'label' 2 times"),
        ("csv", "text,label\nx,a\n".encode("utf-16"), "x.csv:1: the file is UTF-16"),
        ("csv", b"text,label\rx,a\ry,b\r", "x.csv:1: lines end in carriage returns alone"),
        ("csv", b"te\xe9xt,label\nx,a\n", "x.csv:1: invalid UTF-8"),
        ("csv", b'"text","label"\r"x","a"\r', "x.csv:1: lines end in carriage returns alone"),
        ("csv", '"text","label"\nx,a\n'.encode("utf-16-le"), "x.csv:1: the file is UTF-16"),
        ("csv", b"\ntext,label\nx,a\n", "x.csv:1: a blank line, expected the names of the columns"),
        ("csv", b"text;label\nx;a\n", "x.csv:1: no column 'text', but fields seem to be separated by ';'"),
        ("csv", b'"text"\t"label"\nx\ta\n', "x.csv:1: no CSV"),
        ("csv", b"text\tlabel\nx\ta\n", "x.csv:1: no column 'text', but fields seem to be separated by tabs"),
        ("tsv", b"text,label\nx,a\n", "x.tsv:1: no column 'text', but fields seem to be separated by commas"),
        (
            "csv",
            gzip.compress(b"text,label\nx,a\n", mtime=0),
            "x.csv:1: the file is compressed by gzip; unpack it: gunzip",
        ),
        ("jsonl", b"PK\x03\x04\x14\x00\x06\x00", "x.jsonl:1: the file is a zip archive or a spreadsheet"),
        ("tsv", b"PAR1\x15\x04\n", "x.tsv:1: the file is Parquet; name it *.parquet, or say format: parquet"),
        ("jsonl", b'{\n  "text": "x",\n  "label": 1\n}\n', "x.jsonl:1: an object over several lines; expected one"),
        ("tsv", "text\tlabel\nx\ta\n".encode("utf-16-be"), "x.tsv:1: the file is UTF-16"),
        ("jsonl", b'[\n{"text": "x", "label": 1}\n]\n', "x.jsonl:1: a JSON array; expected JSON lines"),
        ("parquet", b"PAR1 is not all of it", "x.parquet is no Parquet file that can be read"),
        ("parquet", b"", "x.parquet is no Parquet file that can be read"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(kind: str, content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path / f"x.{kind}", kind, content)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_columns(tmp_path: Path) -> None:
    for kind in ("csv", "parquet"):
        with pytest.raises(DataError, match=r"no file .*gone"):
            list(read_rows(tmp_path / "gone", kind, NAMES, dialect_of(kind, ",", quoted=False, header=True)))
    with pytest.raises(DataError, match=r"x\.csv:1: found 2 fields, but column 2 is asked for"):
        read(tmp_path / "x.csv", "csv", b"x,a\n", [0, 2], header=False)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": ["x"]}), buffer)
    with pytest.raises(DataError, match=r"x\.parquet: no column 'label'; expected one of: text"):
        read(tmp_path / "x.parquet", "parquet", buffer.getvalue())
