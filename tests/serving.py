"""A real server on loopback, and a client that shows everything that came back."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rm_ood.serve.scorer import GuardScorer, Scorer
from rm_ood.serve.server import Server
from rm_ood.serve.settings import ServeSettings


@dataclass(frozen=True)
class Answer:
    """A reply: status, headers in lower case, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection per request, or one that is kept."""

    def __init__(self, port: int, key: str | None = None, timeout: float = 30.0) -> None:
        self.port, self.key, self.timeout = port, key, timeout

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, key: str | None = None
    ) -> Answer:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        sent = {} if data is None else {"content-type": "application/json"}
        key = self.key if key is None else key
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)
        try:
            connection.request(method, path, data, {**sent, **(headers or {})})
            reply = connection.getresponse()
            return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def get(self, path: str, **more: Any) -> Answer:
        return self.ask("GET", path, **more)

    def post(self, path: str, body: Any, **more: Any) -> Answer:
        return self.ask("POST", path, body, **more)

    def metric(self, name: str) -> float:
        """The sum of a metric's series, by their names and, where given, labels: `rm_ood_requests_total{status="200"}`."""
        base, _, labels = name.partition("{")
        wanted = re.findall(r'\w+="[^"]*"', labels)
        found = []
        for line in self.get("/metrics").body.decode().splitlines():
            if re.match(rf"{re.escape(base)}(\{{| )", line) and all(label in line for label in wanted):
                found.append(float(line.rpartition(" ")[2]))
        assert found or labels, f"no series {name}"
        return sum(found)

    def raw(self, *parts: bytes, pause: float = 0.0, timeout: float | None = None) -> bytes:
        """Send bytes as they are; all that comes back until the other side closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout or self.timeout) as connection:
            got = b""
            try:
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause)
                while chunk := connection.recv(65536):
                    got += chunk
            except (ConnectionResetError, BrokenPipeError):
                pass
            return got


@contextmanager
def serving(scorer: Scorer, **settings: Any) -> Iterator[tuple[Client, Server]]:
    """A server of this process, in a thread."""
    server = Server(scorer, ServeSettings(**settings), port=0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [server.socket]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield Client(server.port), server
    finally:
        server.handle_exit(15, None)
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"


def guard_scorer(guard: Any) -> GuardScorer:
    """A scorer that leaves the shared guard's hooks alone."""
    scorer = GuardScorer(guard)
    scorer.close = lambda: None  # type: ignore[method-assign]
    return scorer


def wait_until(holds: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


class FaultyScorer(GuardScorer):
    """The guard, with faults: words in a response that make the model raise or hang, and a pause before each batch."""

    def __init__(self, guard: Any, *, pause: float = 0.0) -> None:
        super().__init__(guard)
        self.pause = pause
        self.seen: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()

    def score(self, works: Any) -> Any:
        texts = [str(work.query.response) for work in works]
        self.seen.append(texts)
        self.go.wait(30)
        time.sleep(self.pause)
        if any("explode" in text for text in texts):
            raise RuntimeError(f"cannot score {texts}")
        return super().score(works)

    def close(self) -> None:
        pass
