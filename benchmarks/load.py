"""HTTP load from one event loop: kept connections, evenly spaced or as fast as answers come."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shot:
    """One request: status (0: no answer), seconds from the time it was due to its last byte, and whether 429 told when."""

    status: int
    seconds: float
    retry_after: bool


def body(items: Sequence[tuple[str, str]]) -> bytes:
    """A `/v1/score` request with its head."""
    return request("/v1/score", {"items": [{"prompt": p, "response": r} for p, r in items]})


def request(path: str, content: Any, more: str = "") -> bytes:
    """A POST with its head; `more` are header lines."""
    data = json.dumps(content).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    )
    return f"{head}{more}\r\n".encode() + data


class Connections:
    """Connections to a port, opened as needed, and kept or closed after each reply."""

    def __init__(self, port: int, keep: bool = True) -> None:
        self._port = port
        self._keep = keep
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, data: bytes, due: float) -> Shot:
        """Send a request; its time counts from when it was due."""
        # As clients do: a server closes what has been idle for its keep-alive time.
        self._idle = [pair for pair in self._idle if not pair[0].at_eof()]
        try:
            pair = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            return Shot(0, time.perf_counter() - due, False)
        reader, writer = pair
        try:
            writer.write(data)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            return Shot(0, time.perf_counter() - due, False)
        if not self._keep or b"connection: close" in head:
            writer.close()
        else:
            self._idle.append(pair)
        return Shot(int(head.split(b" ", 2)[1]), time.perf_counter() - due, b"retry-after:" in head)

    def close(self) -> None:
        """Close those that are idle."""
        for _, writer in self._idle:
            writer.close()


def closed(port: int, bodies: Iterator[bytes], seconds: float, clients: int) -> tuple[list[Shot], float]:
    """So many clients that each send when they have an answer; and the seconds that it took."""

    async def run() -> tuple[list[Shot], float]:
        connections, shots = Connections(port), []
        start = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - start < seconds:
                shots.append(await connections.ask(next(bodies), time.perf_counter()))

        await asyncio.gather(*(client() for _ in range(clients)))
        took = time.perf_counter() - start
        connections.close()
        return shots, took

    return asyncio.run(run())


def opened(port: int, bodies: Iterator[bytes], seconds: float, rate: float, keep: bool = True) -> list[Shot]:
    """Evenly spaced requests that wait for no answer, `rate` a second; on kept connections, or each on a new one."""

    async def run() -> list[Shot]:
        connections = Connections(port, keep)
        start = time.perf_counter()
        tasks = []
        for i in itertools.count():
            due = start + i / rate
            if due - start >= seconds:
                break
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(connections.ask(next(bodies), due)))
        shots = await asyncio.gather(*tasks)
        connections.close()
        return list(shots)

    return asyncio.run(run())


def endless(make: Callable[[int], bytes]) -> Iterator[bytes]:
    """make(0), make(1), ..."""
    return map(make, itertools.count())
