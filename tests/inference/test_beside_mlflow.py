"""The same bodies to our server and to ``mlflow models serve`` of the same registered model: `make torture`."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.project import ROOT
from helpers.scorers import make_scorer, texts
from helpers.servers import free_port

from lightning_glue.tasks import TASKS
from lightning_glue.tracking.registry import describe_model

pytestmark = pytest.mark.torture

JSON, CSV, PARQUET = "application/json", "text/csv", "application/vnd.apache.parquet"
FIRST = [*texts(5, 1), "a naïve café 😀 日本", "", " word" * 700]
ROWS = [{"text": a, "text_pair": b} for a, b in zip(FIRST, texts(len(FIRST), 2))]


def register(name: str, bpe_dir: Path, folder: Path, store: str) -> str:
    """A model with random weights as a version in ``store``; its address."""
    from mlflow import MlflowClient

    folder.mkdir()
    make_scorer(name, bpe_dir, folder)
    describe_model(TASKS[name], "0" * 32, folder)
    client = MlflowClient(store)
    client.create_registered_model(f"glue-{name}")
    version = client.create_model_version(f"glue-{name}", str(folder))
    return f"models:/glue-{name}/{version.version}"


@contextmanager
def serving(module: str, arguments: list[str], folder: Path, store: str) -> Iterator[int]:
    """The port of a server in a session of its own, once it answers."""
    port, log = free_port(), folder / f"{module}.log"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # mlflow looks for uvicorn there
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(ROOT), "PATH": path}
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--port", str(port)],
            cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
        yield port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def servers(bpe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, int]]]:
    """Ours and MLflow's for each task."""
    folder = tmp_path_factory.mktemp("beside")
    store = f"sqlite:///{folder / 'mlflow.db'}"
    found = {}
    with ExitStack() as stack:
        for name in ("SST-2", "RTE"):
            model = register(name, bpe_dir, folder / name, store)
            theirs = ["models", "serve", "-m", model, "--env-manager", "local"]
            found[name] = (
                stack.enter_context(serving("lightning_glue.serve", [model, "--gpus", "0"], folder, store)),
                stack.enter_context(serving("mlflow", theirs, folder, store)),
            )
        yield found


def ask(port: int, body: Any, kind: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/invocations", content, {"Content-Type": kind})
    answer = connection.getresponse()
    text = answer.read().decode()
    return answer.status, json.loads(text)["predictions"] if answer.status == 200 else text


def table(kind: str, rows: list[dict[str, str]]) -> bytes:
    if kind == CSV:
        return pd.DataFrame(rows).to_csv(index=False).encode()
    body = io.BytesIO()
    pd.DataFrame(rows).to_parquet(body)
    return body.getvalue()


def bodies(columns: list[str]) -> dict[str, tuple[Any, str]]:
    """What both answer alike, by name."""
    rows = [{name: row[name] for name in columns} for row in ROWS]
    full = [row for row in rows if row["text"]]  # an empty field of a CSV is a missing value to pandas
    split = {"columns": columns, "data": [[row[name] for name in columns] for row in rows]}
    by_column = {name: [row[name] for row in rows] for name in columns}
    found: dict[str, tuple[Any, str]] = {
        "split": ({"dataframe_split": split}, JSON),
        "split with an index and a further column": (
            {"dataframe_split": {"columns": [*reversed(columns), "id"], "index": [7] * len(rows),
                                 "data": [[*(row[name] for name in reversed(columns)), 1] for row in rows]}}, JSON),
        "split without rows": ({"dataframe_split": {"columns": columns, "data": []}}, JSON),
        "records": ({"dataframe_records": rows}, f"{JSON}; charset=UTF-8"),
        "records with a further column": ({"dataframe_records": [{**row, "id": 1} for row in rows]}, JSON),
        "inputs by column": ({"inputs": by_column}, JSON),
        "inputs of one row": ({"inputs": rows[0]}, JSON),
        "inputs by row": ({"inputs": rows}, JSON),
        "instances": ({"instances": rows}, JSON),
        "params": ({"instances": rows, "params": {}}, JSON),
        "a byte order mark": (b"\xef\xbb\xbf" + json.dumps({"inputs": by_column}).encode(), JSON),
        "csv": (table(CSV, full), CSV),
        "csv with \\r\\n and a blank line": (table(CSV, full).replace(b"\n", b"\r\n") + b"\r\n", CSV),
        "csv of a header": (table(CSV, full).splitlines()[0], CSV),
        "csv of numbers": (",".join(columns).encode() + b"\n" + b",".join([b"5"] * len(columns)), CSV),
        "parquet": (table(PARQUET, rows), PARQUET),
    }  # fmt: skip
    if len(columns) == 1:
        found |= {name: ({name: [row["text"] for row in rows]}, JSON) for name in ("inputs", "instances")}
    # What both refuse, or answer in a way of their own that docs/serving.md names.
    missing = [*rows[:2], {**rows[2], "text": None}]
    return found | {
        "400 a missing value in a record": ({"dataframe_records": missing}, JSON),
        "400 a missing value in a split": (
            {"dataframe_split": {"columns": columns, "data": [[row[name] for name in columns] for row in missing]}},
            JSON,
        ),
        "400 a missing value in a Parquet file": (table(PARQUET, missing), PARQUET),  # type: ignore[arg-type]
        "400 a record without the column": ({"dataframe_records": [rows[0], {"id": 1}]}, JSON),
        "400 a number": ({"dataframe_records": [{name: 5 for name in columns}]}, JSON),
        "400 no such column": ({"dataframe_records": [{"review": "a"}]}, JSON),
        "400 half a character": ({"inputs": {name: ["\ud83d"] for name in columns}}, JSON),
        "400 two forms": ({"inputs": by_column, "instances": rows}, JSON),
        "400 none of the forms": ({"messages": [{"role": "user", "content": "a"}]}, JSON),
        "400 a list": (rows, JSON),
        "400 no JSON": (b"{", JSON),
        "400 nothing": (b"", JSON),
        "400 a CSV cut within quotes": (",".join(columns).encode() + b'\n"a', CSV),
        "400 an empty CSV": (b"", CSV),
        "400 a CSV in Latin-1": (",".join(columns).encode() + b"\n\xe9,\xe9", CSV),
        "400 no Parquet": (b"PAR1", PARQUET),
        "415 another charset": ({"inputs": by_column}, f"{JSON}; charset=latin-1"),
        "415 another parameter": ({"inputs": by_column}, f"{JSON}; format=pandas-split"),
        "415 another type": (b"<a/>", "application/xml"),
        "400 200 a missing value in a column": ({"inputs": {name: ["a", None] for name in columns}}, JSON),
        "400 200 a CSV with a column twice": (
            ",".join([*columns, "text"]).encode() + b"\n" + b",".join([b"a"] * (len(columns) + 1)), CSV),
        "400 200 a CSV row with too many fields": (
            ",".join(columns).encode() + b"\n" + b",".join([b"a"] * (len(columns) + 1)), CSV),
        "200 400 an empty field in a CSV": (f"{','.join(['id', *columns])}\n1{',' * len(columns)}\n".encode(), CSV),
        "200 400 the text NA in a CSV": (f"{','.join(columns)}\n{','.join(['NA'] * len(columns))}\n".encode(), CSV),
        "200 400 no records": ({"dataframe_records": []}, JSON),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["SST-2", "RTE"])
def test_answers_and_refusals_are_those_of_mlflow(name: str, servers: dict[str, tuple[int, int]]) -> None:
    columns = ["text", "text_pair"][: TASKS[name].num_texts]
    different = set()
    for case, (body, kind) in bodies(columns).items():
        (status, found), (their_status, expected) = (ask(port, body, kind) for port in servers[name])
        expects = [int(word) for word in case.split()[:2] if word.isdecimal()] or [200]
        assert [status, their_status] == [expects[0], expects[-1]], (case, found, expected)
        if status != 200 or their_status != 200:
            continue
        assert [row["label"] for row in found] == [row["label"] for row in expected], case
        assert len(found) == len(expected), case
        for ours, theirs in zip(found, expected):
            assert ours == pytest.approx(theirs, abs=1e-5), case
        different |= {round(row[f"probability_{row['label']}"], 4) for row in found}
    assert len(different) > 5  # of answers that are all the same, equal ones say nothing


def test_the_rest_of_the_protocol(servers: dict[str, tuple[int, int]]) -> None:
    for path in ("/ping", "/health", "/version"):
        ours, theirs = (
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60).read() for port in servers["RTE"]
        )
        assert ours == theirs
