"""Requests to a scoring server from clients that each wait for an answer before they ask again (a closed loop).

    python benchmarks/load.py PORT CLIENTS < BODIES > RESULT

A process with one thread: each client is a task of asyncio with a connection of its own that is kept alive, HTTP/1.1
written by hand so that the clients take little of the cores that the server computes on. BODIES has a JSON body a line;
the clients share them, each is sent once. RESULT is a line of JSON, see :class:`Result`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

_ANSWER_SECONDS = 120


@dataclass
class Result:
    """Attributes: seconds: from the first request to the last answer. cpu: seconds that the clients computed.
    sent: requests. lost: of them without any answer. statuses, latencies, answers: of each request that has one, by its
    place among the bodies; an answer is parsed where the status is 200."""

    seconds: float = 0.0
    cpu: float = 0.0
    sent: int = 0
    lost: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    latencies: dict[int, float] = field(default_factory=dict)
    answers: dict[int, Any] = field(default_factory=dict)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of a response that tells its length."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.casefold(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), await reader.readexactly(int(headers["content-length"]))


async def _client(port: int, bodies: Iterator[tuple[int, bytes]], result: Result, raw: dict[int, bytes]) -> None:
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    for place, body in bodies:
        result.sent += 1
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                reader, writer = connection = connection or await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"POST /invocations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                             b"Content-Length: %d\r\n\r\n%b" % (len(body), body))  # fmt: skip
                result.statuses[place], raw[place] = await _answer(reader)
        except (OSError, EOFError, TimeoutError):
            result.lost += 1
            connection = None
            continue
        result.latencies[place] = time.perf_counter() - begin
    if connection:
        connection[1].close()


async def load(port: int, clients: int, bodies: list[bytes]) -> Result:
    """Send every body once."""
    result, raw, shared = Result(), dict[int, bytes](), iter(enumerate(bodies))
    begin, begin_cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(_client(port, shared, result, raw) for _ in range(clients)))
    result.seconds, result.cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    result.answers = {place: json.loads(raw[place]) for place, status in result.statuses.items() if status == 200}
    return result


def main() -> None:
    port, clients = map(int, sys.argv[1:])
    bodies = sys.stdin.buffer.read().splitlines()
    print(json.dumps(asdict(asyncio.run(load(port, clients, bodies)))))


if __name__ == "__main__":
    main()
