"""The scoring server over real HTTP: the protocol, refusals, batches, the end."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import uvicorn
from helpers.scorers import make_scorer, texts

from lightning_glue.errors import DataError
from lightning_glue.inference.http_server import Limits, make_app
from lightning_glue.inference.micro_batches import MicroBatches, QueueFull
from lightning_glue.inference.protocol import UnknownType, read_request, write_answer
from lightning_glue.inference.scorer import Scorer
from lightning_glue.inference.text_model import Predictions
from lightning_glue.tasks import TASKS, Task

LIMITS = Limits(body=20_000, rows=40, seconds=10, queue=200)
RTE, SST2 = TASKS["RTE"], TASKS["SST-2"]


class Served:
    """uvicorn in a thread."""

    def __init__(self, scorer: Scorer, limits: Limits = LIMITS, token: str = "") -> None:
        app = make_app(scorer, limits, token)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def ask(self, body: Any, kind: str = "application/json", headers: dict[str, str] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/invocations", content, {"Content-Type": kind, **(headers or {})})
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if answer.status == 200 else text

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def scorer(bpe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return make_scorer("RTE", bpe_dir, tmp_path_factory.mktemp("rte"))


@pytest.fixture(scope="module")
def served(scorer: Scorer) -> Iterator[Served]:
    found = Served(scorer)
    yield found
    found.stop()


FIRST, SECOND = texts(6, 1), texts(6, 2)
RECORDS = [{"text": a, "text_pair": b} for a, b in zip(FIRST, SECOND)]
BODIES = {
    "records": {"dataframe_records": RECORDS},
    "split": {"dataframe_split": {"columns": ["text_pair", "id", "text"], "index": [*range(6)],
                                  "data": [[b, 1, a] for a, b in zip(FIRST, SECOND)]}},
    "inputs": {"inputs": {"text": FIRST, "text_pair": SECOND}},
    "instances": {"instances": RECORDS},
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_each_form_of_the_protocol(body: Any, served: Served, scorer: Scorer) -> None:
    status, found = served.ask(body)
    expected = scorer.model.predict(FIRST, SECOND)
    assert status == 200
    assert [row["label"] for row in found["predictions"]] == expected.labels
    shares = [[row[f"probability_{label}"] for label in RTE.labels] for row in found["predictions"]]
    assert np.array(shares) == pytest.approx(expected.probabilities, abs=1e-5)


def parquet(**columns: list[Any]) -> bytes:
    body = io.BytesIO()
    pd.DataFrame(columns).to_parquet(body)
    return body.getvalue()


PARQUET = "application/vnd.apache.parquet"


def test_parquet_and_a_byte_order_mark(served: Served) -> None:
    by_json = served.ask({"dataframe_records": RECORDS})
    assert by_json[0] == 200
    assert served.ask(parquet(id=[*range(6)], text_pair=SECOND, text=FIRST), PARQUET) == by_json
    assert served.ask(b"\xef\xbb\xbf" + json.dumps({"dataframe_records": RECORDS}).encode()) == by_json


def test_csv_and_no_rows(served: Served) -> None:
    by_json = served.ask({"dataframe_records": RECORDS[:1]})
    table = f'text,text_pair\r\n"{FIRST[0]}","{SECOND[0]}"\r\n'.encode()
    assert served.ask(table, "text/csv; charset=utf-8") == by_json
    assert served.ask({"dataframe_records": []}) == (200, {"predictions": []})


@pytest.mark.parametrize(
    ("body", "kind", "status", "reason"),
    [
        (b"{", "application/json", 400, "no JSON"),
        (b"\xff", "application/json", 400, "not UTF-8 at byte 1"),
        ([1], "application/json", 400, "found list"),
        ({"inputs": {"text": ["a"]}}, "application/json", 400, "no column 'text_pair'"),
        ({"dataframe_records": [RECORDS[0], {"text": "a"}]}, "application/json", 400, "row 1 has no 'text_pair'"),
        ({"dataframe_records": [RECORDS[0], {"text": 5, "text_pair": ""}]}, "application/json", 400,
         "column 'text', row 1 holds 5, expected a text"),
        ({"inputs": {"text": ["a", None], "text_pair": ["b", "c"]}}, "application/json", 400, "row 1 holds None"),
        ({"inputs": {"text": ["a"], "text_pair": ["b", "c"]}}, "application/json", 400, "1 and 2 rows"),
        ({"dataframe_split": {"columns": ["text"], "data": [["a", "b"]]}}, "application/json", 400, "row 0"),
        ({"inputs": {"text": ["\ud83d"], "text_pair": ["b"]}}, "application/json", 400, "half a character"),
        (b"text,text_pair\na\n", "text/csv", 400, "row 0 has 1 fields"),
        (b"", "text/csv", 400, "empty"),
        (b"text,text_pair,text\na,b,c\n", "text/csv", 400, "2 columns 'text'"),
        (b"PAR1", PARQUET, 400, "no Parquet"),
        (parquet(text=["a"]), PARQUET, 400, "no column 'text_pair'"),
        (parquet(text=["a", None], text_pair=["b", "c"]), PARQUET, 400, "column 'text', row 1 holds"),
        (parquet(text=["a"] * 41, text_pair=["b"] * 41), PARQUET, 413, "41 rows; at most 40"),
        (parquet(text=["x" * 20_001], text_pair=["b"]), PARQUET, 413, "bytes once decompressed; at most 20000"),
        (parquet(text=["x" * 2000] * 40, text_pair=["b"] * 40), PARQUET, 413, "80040 characters"),
        (b"", "application/xml", 415, "content type"),
        ({"dataframe_records": RECORDS * 7}, "application/json", 413, "42 rows; at most 40"),
        ({"dataframe_records": [{"text": "x" * 20_000}]}, "application/json", 413, "larger than 20000 bytes"),
    ],
)  # fmt: skip
def test_what_is_refused_says_why_in_one_line(body: Any, kind: str, status: int, reason: str, served: Served) -> None:
    found, said = served.ask(body, kind)
    assert (found, said.count("\n")) == (status, 1)
    assert reason in said


def test_many_at_once_have_the_answers_they_have_alone_to_the_bit(served: Served) -> None:
    bodies = [{"dataframe_records": [{"text": a, "text_pair": b}]} for a, b in zip(texts(60, 3), texts(60, 4))]
    alone = [served.ask(body) for body in bodies]
    with ThreadPoolExecutor(16) as threads:
        together = [*threads.map(served.ask, bodies)]
    assert together == alone
    status, said = served.get("/metrics")
    counts = {
        name: float(value) for name, value in (line.rsplit(" ", 1) for line in said.splitlines() if line[0] != "#")
    }
    assert status == 200
    assert counts['glue_requests_total{status="200"}'] >= 120
    assert counts["glue_batch_rows_count"] < counts["glue_rows_total"]  # some were computed together
    assert counts["glue_queue_rows"] == 0


def test_health_and_version(served: Served) -> None:
    import mlflow

    assert [served.get(path) for path in ("/ping", "/health")] == [(200, "\n")] * 2
    assert served.get("/version") == (200, mlflow.__version__)
    assert served.get("/docs")[0] == 404


def test_a_token_is_asked_for(scorer: Scorer) -> None:
    found = Served(scorer, token="right")
    try:
        assert found.ask(BODIES["records"])[0] == 401
        assert found.ask(BODIES["records"], headers={"Authorization": "Bearer wrong"})[0] == 401
        assert found.ask(BODIES["records"], headers={"Authorization": "Bearer right"})[0] == 200
        assert (found.get("/metrics")[0], found.get("/ping")[0]) == (401, 200)
    finally:
        found.stop()


def slow(scorer: Scorer, seconds: float) -> Scorer:
    """The same scorer, each batch of which takes so long."""
    import copy

    found = copy.copy(scorer)
    outputs = scorer.outputs
    found.outputs = lambda rows, *_: (time.sleep(seconds), outputs(rows))[1]  # type: ignore[method-assign]
    return found


def test_a_full_queue_a_late_answer_and_an_orderly_end(scorer: Scorer) -> None:
    found = Served(slow(scorer, 0.4), Limits(rows=4, seconds=1.0, queue=8))
    body = {"dataframe_records": RECORDS[:4]}
    with ThreadPoolExecutor(12) as threads:
        answers = [*threads.map(found.ask, [body] * 12)]
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 503}
        late = Served(slow(scorer, 1.5), Limits(seconds=0.5))
        assert late.ask(body) == (504, "no answer within 0.5 s\n")
        late.stop()
        last = [threads.submit(found.ask, body) for _ in range(2)]
        time.sleep(0.2)
        found.stop()  # what was accepted is answered
        assert [one.result()[0] for one in last] == [200, 200]


def test_a_large_request_is_computed_in_parts_and_an_error_is_its_own(scorer: Scorer) -> None:
    rows = scorer.encode([texts(30, 5), texts(30, 6)])
    sizes: list[int] = []
    broken = threading.Event()

    def compute(part: Any) -> np.ndarray:
        sizes.append(len(part.tokens))
        if broken.is_set():
            raise RuntimeError("no")
        return scorer.outputs(part)

    async def ask() -> None:
        batches = MicroBatches(compute, 400, 40)
        whole = asyncio.create_task(batches.outputs(rows))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await batches.outputs(rows)
        assert np.array_equal(await whole, scorer.outputs(rows))
        broken.set()
        with pytest.raises(RuntimeError):
            await batches.outputs(scorer.encode([["a"], ["b"]]))
        assert batches.waiting_rows == 0
        await batches.close()

    asyncio.run(ask())
    assert len(sizes) > 3
    assert max(sizes) <= 400


def read(body: bytes, kind: str, task: Task) -> list[list[str]]:
    return read_request(body, kind, task, LIMITS.rows, LIMITS.body)


def test_lists_of_texts_for_tasks_on_one() -> None:
    for name in ("inputs", "instances"):
        assert read(json.dumps({name: ["a", "b"]}).encode(), "application/json", SST2) == [["a", "b"]]
    with pytest.raises(DataError, match="row 0 is 'a'"):
        read(b'{"inputs": ["a"]}', "application/json", RTE)
    with pytest.raises(UnknownType):
        read(b"{}", "application/json; charset=latin-1", SST2)


def test_any_number_of_labels_are_called_as_the_registered_model_calls_them() -> None:
    task = Task("own", ("ä b", "c"), ("f1",), None, (), (), multilabel=True)
    answer = Predictions([("ä b", "c"), ()], np.array([[0.75, 0.625], [0.25, 0.125]]), np.empty(0), task.labels)
    assert json.loads(write_answer(answer, task))["predictions"] == [
        {"labels": ["ä b", "c"], "probability_ä b": 0.75, "probability_c": 0.625},
        {"labels": [], "probability_ä b": 0.25, "probability_c": 0.125},
    ]
