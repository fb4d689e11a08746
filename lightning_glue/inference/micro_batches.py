"""Requests that come at the same time, computed together.

Nobody waits for others to come: while the one thread that computes is busy, requests gather, and the next batch is what
has gathered, up to a number of tokens; when it is idle, a request is computed at once.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from lightning_glue.data.datamodule import TokenizedSplit


class QueueFull(Exception):
    """As many rows wait as may."""


@dataclass
class _Request:
    """Attributes: done: rows of it that are computed."""

    rows: TokenizedSplit
    answer: asyncio.Future[np.ndarray]
    outputs: list[np.ndarray] = field(default_factory=list)
    done: int = 0


class MicroBatches:
    """Head outputs for requests of tokenized rows.

    Args:
        compute: outputs (rows, classes) of rows; called in one thread.
        batch_tokens: of a batch, unless one row has more. A larger request is computed in parts.
        queue_rows: that wait at most.
        computed: told of each batch, its rows, tokens and seconds.
    """

    def __init__(
        self,
        compute: Callable[[TokenizedSplit], np.ndarray],
        batch_tokens: int,
        queue_rows: int,
        computed: Callable[[int, int, float], None] = lambda rows, tokens, seconds: None,
    ) -> None:
        self._compute, self._batch_tokens, self._queue_rows = compute, batch_tokens, queue_rows
        self._computed = computed
        self._waiting: deque[_Request] = deque()
        self._thread = ThreadPoolExecutor(1, "compute")
        self._worker: asyncio.Task[None] | None = None
        self.waiting_rows = 0

    async def outputs(self, rows: TokenizedSplit) -> np.ndarray:
        """Outputs (rows, classes), in their order. Cancelled, what is not computed yet is left out.

        Raises:
            QueueFull: computing them would make too many wait.
        """
        if self.waiting_rows and self.waiting_rows + len(rows) > self._queue_rows:
            raise QueueFull
        request = _Request(rows, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self.waiting_rows += len(rows)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await request.answer

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while parts := self._take():
            begin = time.perf_counter()
            together = _joined([_part(request.rows, request.done, count) for request, count in parts])
            try:
                outputs = await loop.run_in_executor(self._thread, self._compute, together)
            except Exception as error:
                for request, _ in parts:
                    self._leave(request, error)
                continue
            self._computed(len(together), len(together.tokens), time.perf_counter() - begin)
            start = 0
            for request, count in parts:
                request.outputs.append(outputs[start : start + count])
                start += count
                request.done += count
                self.waiting_rows -= count
                if request.done == len(request.rows):
                    self._waiting.remove(request)
                    if not request.answer.done():
                        request.answer.set_result(np.concatenate(request.outputs))

    def _leave(self, request: _Request, error: Exception | None = None) -> None:
        self._waiting.remove(request)
        self.waiting_rows -= len(request.rows) - request.done
        if error and not request.answer.done():
            request.answer.set_exception(error)

    def _take(self) -> list[tuple[_Request, int]]:
        """What is computed next: requests, the oldest first, and how many of their rows."""
        for request in [one for one in self._waiting if one.answer.done()]:
            self._leave(request)  # nobody waits for it any longer
        parts: list[tuple[_Request, int]] = []
        left = self._batch_tokens
        for request in self._waiting:
            sizes = np.cumsum(request.rows.lengths[request.done :])
            count = int(np.searchsorted(sizes, left, side="right"))
            if not parts:
                count = max(1, count)
            if not count:
                break
            parts.append((request, count))
            left -= int(sizes[count - 1])
        return parts

    async def close(self) -> None:
        """Wait until all is computed."""
        if self._worker:
            await self._worker
        self._thread.shutdown()


def _part(rows: TokenizedSplit, start: int, count: int) -> TokenizedSplit:
    if (start, count) == (0, len(rows)):
        return rows
    lengths = rows.lengths[start : start + count]
    begin = int(rows.starts[start])
    return TokenizedSplit(rows.name, rows.tokens[begin : begin + int(lengths.sum())], lengths, None)


def _joined(parts: list[TokenizedSplit]) -> TokenizedSplit:
    if len(parts) == 1:
        return parts[0]
    tokens, lengths = (np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "lengths"))
    return TokenizedSplit("rows", tokens, lengths, None)
