"""MLflow's scoring protocol, ``/invocations``: a body to columns of texts, and an answer to a body.

A model takes the columns ``text`` and, for tasks on pairs, ``text_pair``, see
:mod:`lightning_glue.inference.pyfunc`.
"""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from lightning_glue.errors import DataError
from lightning_glue.inference.text_model import Predictions, check_texts
from lightning_glue.tasks import Task, input_columns

JSON, CSV, PARQUET = "application/json", "text/csv", "application/vnd.apache.parquet"
_FORMATS = ("dataframe_split", "dataframe_records", "inputs", "instances")
_SHOWN = 80


class UnknownType(DataError):
    """A content type that is not served."""


class TooLarge(DataError):
    """More than a request may have."""


def read_request(body: bytes, content_type: str, task: Task, most_rows: int, most_bytes: int) -> list[list[str]]:
    """The one or two columns of texts in a request's body, all of the same length.

    Args:
        most_rows: that it may have.
        most_bytes: that a compressed body may have once it is not.

    Raises:
        UnknownType: the body is of another type.
        TooLarge: it has more rows or bytes.
        DataError: it is no such body; names the row.
    """
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    if kind not in (JSON, CSV, PARQUET) or any(part != "charset=utf-8" for part in parameters):
        raise UnknownType(f"content type {content_type[:_SHOWN]!r}; expected {JSON} or {CSV}, in UTF-8, or {PARQUET}")
    if kind == PARQUET:
        columns = _of_parquet(body, task, most_rows, most_bytes)
    else:
        columns = _of_csv(_text(body), task) if kind == CSV else _of_json(_text(body), task)
    _check_rows(len(columns[0]), most_rows)
    for name, column in zip(input_columns(task), columns):
        check_texts(task, column, lambda row, name=name: f"column {name!r}, row {row}", "leave the row out")  # type: ignore[misc]
    return columns


def _check_rows(rows: int, most: int) -> None:
    if rows > most:
        raise TooLarge(f"{rows} rows; at most {most} a request: send several")


def _text(body: bytes) -> str:
    try:
        return body.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"the body is not UTF-8 at byte {error.start + 1}") from None


def _of_parquet(body: bytes, task: Task, most_rows: int, most_bytes: int) -> list[list[Any]]:
    """Columns as MLflow reads them; what the file says of its size is looked at first."""
    import pyarrow
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc.scoring_server import parse_parquet_input
    from pyarrow import parquet

    try:
        found = parquet.read_metadata(io.BytesIO(body))
        _check_rows(found.num_rows, most_rows)
        size = sum(found.row_group(i).total_byte_size for i in range(found.num_row_groups))
        if size > most_bytes:
            raise TooLarge(f"the body has {size} bytes once decompressed; at most {most_bytes}: send several")
        frame = parse_parquet_input(io.BytesIO(body))
    except (pyarrow.ArrowException, OSError, MlflowException):
        raise DataError("the body is no Parquet file of a table") from None
    _check_columns(list(frame.columns), task)
    columns = [list(frame[name]) for name in input_columns(task)]
    size = sum(len(text) for column in columns for text in column if isinstance(text, str))
    if size > most_bytes:  # one value, kept once, may be that of many rows
        raise TooLarge(f"the texts have {size} characters; at most {most_bytes} bytes: send several")
    return columns


def _check_columns(found: list[Any], task: Task) -> None:
    """Raise DataError unless each column of texts is there once."""
    wanted = input_columns(task)
    for name in wanted:
        if (count := found.count(name)) != 1:
            number = f"{count} columns" if count else "no column"
            raise DataError(f"{task.name}: {number} {name!r}; expected {', '.join(wanted)} once")


def _of_csv(text: str, task: Task) -> list[list[Any]]:
    try:
        rows = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    except csv.Error as error:
        raise DataError(f"the body is no CSV ({error})") from None
    if not rows:
        raise DataError(f"the body is empty; expected a header with {', '.join(input_columns(task))}")
    header, *rows = rows
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise DataError(f"row {i} has {len(row)} fields, the header {len(header)}")
    return _of_split({"columns": header, "data": rows}, task)


def _of_json(text: str, task: Task) -> list[list[Any]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the body is no JSON ({str(error)[:_SHOWN]})") from None
    given = [name for name in _FORMATS if isinstance(found, dict) and name in found]
    if len(given) != 1:
        raise DataError(f"expected a JSON object with one of {', '.join(_FORMATS)}; found {_kind(found)}")
    content = found[given[0]]
    if given[0] == "dataframe_split":
        return _of_split(content, task)
    if given[0] == "inputs" and isinstance(content, dict):
        return _of_columns(content, task)
    return _of_records(content, task, given[0])


def _kind(found: Any) -> str:
    return f"the keys {', '.join(map(str, found))[:_SHOWN]!r}" if isinstance(found, dict) else type(found).__name__


def _of_split(content: Any, task: Task) -> list[list[Any]]:
    columns, data = (content.get(name) if isinstance(content, dict) else None for name in ("columns", "data"))
    if not isinstance(columns, list) or not isinstance(data, list):
        raise DataError("dataframe_split has no lists 'columns' and 'data'")
    for i, row in enumerate(data):
        if not isinstance(row, list) or len(row) != len(columns):
            raise DataError(f"row {i} is no list of {len(columns)} values, one for each column")
    _check_columns(columns, task)
    return [[row[columns.index(name)] for row in data] for name in input_columns(task)]


def _of_columns(content: dict[str, Any], task: Task) -> list[list[Any]]:
    found = []
    for name in input_columns(task):
        column = content.get(name)
        column = [column] if isinstance(column, str) else column
        if not isinstance(column, list):
            raise DataError(f"{task.name}: no column {name!r}; expected {', '.join(input_columns(task))}")
        found.append(column)
    if len({len(column) for column in found}) > 1:
        raise DataError(f"the columns have {' and '.join(str(len(column)) for column in found)} rows")
    return found


def _of_records(content: Any, task: Task, name: str) -> list[list[Any]]:
    wanted = input_columns(task)
    if not isinstance(content, list):
        raise DataError(f"{name} is no list of rows")
    if name != "dataframe_records" and len(wanted) == 1 and all(isinstance(row, str) for row in content):
        return [list(content)]
    for i, row in enumerate(content):
        if not isinstance(row, dict):
            raise DataError(f"row {i} is {str(row)[:_SHOWN]!r}, expected an object with {', '.join(wanted)}")
        if missing := [column for column in wanted if column not in row]:
            raise DataError(f"row {i} has no {missing[0]!r}; expected {', '.join(wanted)}")
    return [[row[column] for row in content] for column in wanted]


def write_answer(answer: Predictions, task: Task) -> bytes:
    """The body with ``predictions``, a record for each row, as :mod:`lightning_glue.inference.pyfunc` calls them."""
    if task.is_regression:
        records: list[dict[str, Any]] = [{"score": score} for score in answer.scores.tolist()]
    else:
        names = [f"probability_{label}" for label in answer.classes]
        name = "labels" if task.multilabel else "label"
        records = [{name: label, **dict(zip(names, shares))}
                   for label, shares in zip(answer.labels, answer.probabilities.tolist())]  # fmt: skip
    return json.dumps({"predictions": records}, ensure_ascii=False).encode()
