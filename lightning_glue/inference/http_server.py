"""A fine-tuned model behind HTTP, with MLflow's scoring protocol."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response

from lightning_glue.data.datamodule import TokenizedSplit
from lightning_glue.errors import DataError
from lightning_glue.inference.micro_batches import MicroBatches, QueueFull
from lightning_glue.inference.protocol import JSON, TooLarge, UnknownType, read_request, write_answer
from lightning_glue.inference.scorer import Scorer

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # padding included: requests wait for a batch that is being computed
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Limits:
    """Attributes: body: bytes of a request. rows: of a request. seconds: from a request to its answer. queue: rows that
    wait."""

    body: int = 4 << 20
    rows: int = 1024
    seconds: float = 30.0
    queue: int = 4096


class Refused(Exception):
    """A request that gets no predictions."""

    def __init__(self, status: int, reason: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


class _Metrics:
    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "requests", "requests to /invocations by status", ["status"], namespace="glue", registry=self.registry
        )
        self.rows = Counter("rows", "rows predicted", namespace="glue", registry=self.registry)
        self.tokens = Counter("tokens", "real tokens predicted", namespace="glue", registry=self.registry)
        self.latency = Histogram(
            "request_seconds", "from a request to its answer", namespace="glue", registry=self.registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self.batch = Histogram(
            "batch_rows", "rows computed together", namespace="glue", registry=self.registry, buckets=_ROWS
        )
        depth = Gauge("queue_rows", "rows that wait or are computed", namespace="glue", registry=self.registry)
        depth.set_function(waiting)

    def computed(self, rows: int, tokens: int, seconds: float) -> None:
        self.rows.inc(rows)
        self.tokens.inc(tokens)
        self.batch.observe(rows)


def warm_up(scorer: Scorer) -> None:
    """Have kernels made for usual sizes, so that the first requests take no longer than the others."""
    for words in (4, 12, 24, 60):
        for rows in (1, 8):
            scorer.outputs(scorer.encode([["word " * words] * rows] * scorer.model.task.num_texts))


def make_app(scorer: Scorer, limits: Limits, token: str = "") -> FastAPI:
    """The application: ``/invocations``, ``/ping``, ``/health``, ``/version``, ``/metrics``.

    Args:
        token: that ``Authorization: Bearer`` must have for predictions and metrics; empty: nobody is asked.
    """
    batches = MicroBatches(
        scorer.outputs, _BATCH_TOKENS[scorer.model.device.type], limits.queue, lambda *batch: metrics.computed(*batch)
    )
    metrics = _Metrics(lambda: batches.waiting_rows)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await batches.close()

    app = FastAPI(title="lightning-glue", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and not secrets.compare_digest(given.encode(), token.encode()):
            raise Refused(401, "expected the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})

    async def predictions(request: Request) -> bytes:
        body = await _body(request, limits.body)
        content_type = request.headers.get("content-type", "")

        def encoded() -> TokenizedSplit:
            return scorer.encode(read_request(body, content_type, scorer.model.task, limits.rows, limits.body))

        try:
            rows = await run_in_threadpool(encoded)
        except DataError as error:
            status = 415 if isinstance(error, UnknownType) else 413 if isinstance(error, TooLarge) else 400
            raise Refused(status, str(error)) from None
        try:
            outputs = await batches.outputs(rows) if len(rows) else scorer.outputs(rows)
        except QueueFull:
            raise Refused(503, "too many rows wait; try again", {"Retry-After": "1"}) from None
        return write_answer(scorer.model.answered(torch.from_numpy(outputs)), scorer.model.task)

    @app.post("/invocations")
    async def invocations(request: Request) -> Response:
        begin = time.perf_counter()

        async def answer() -> Response:
            check_token(request)
            try:
                async with asyncio.timeout(limits.seconds):
                    return Response(await predictions(request), media_type=JSON)
            except TimeoutError:
                raise Refused(504, f"no answer within {limits.seconds:g} s") from None

        response = await _answered(answer)
        metrics.requests.labels(str(response.status_code)).inc()
        metrics.latency.observe(time.perf_counter() - begin)
        return response

    @app.get("/ping")
    @app.get("/health")
    async def ping() -> Response:
        return PlainTextResponse("\n")

    @app.get("/version")
    async def version() -> Response:
        from importlib.metadata import version as installed

        return PlainTextResponse(installed("mlflow"))

    @app.get("/metrics")
    async def shown(request: Request) -> Response:
        async def answer() -> Response:
            check_token(request)
            return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

        return await _answered(answer)

    return app


async def _answered(answer: Callable[[], Awaitable[Response]]) -> Response:
    """The answer, or a line that says why there is none."""
    try:
        return await answer()
    except Refused as refused:
        return PlainTextResponse(f"{refused}\n", refused.status, refused.headers)


async def _body(request: Request, limit: int) -> bytes:
    """A request's body.

    Raises:
        Refused: it is larger than ``limit`` bytes; no more of it is read.
    """
    too_large = Refused(413, f"the body is larger than {limit} bytes; send several", {"Connection": "close"})
    if int(request.headers.get("content-length") or 0) > limit:
        raise too_large
    parts, size = list[bytes](), 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)
