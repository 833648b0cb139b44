"""Many clients at once, over good networks and bad ones: the same verdicts, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import POISON, preference_rows, sentence
from serving import Client, guard_scorer, serving, wait_until

from rm_ood import OODGuard
from rm_ood.serve.server import Server

RNG = random.Random(3)
ITEMS = [
    (f"question 1 {i} {sentence(RNG)}", " ".join(sentence(RNG) for _ in range(RNG.randint(1, 5)))) for i in range(60)
]
ITEMS[7] = (ITEMS[7][0], f"a {POISON}")
ITEMS[23] = (ITEMS[23][0], "")


@pytest.fixture(scope="module")
def served(minilm_guard: OODGuard) -> Iterator[tuple[Client, Server]]:
    with serving(guard_scorer(minilm_guard), max_queue=256, request_timeout_s=2.0) as both:
        yield both


def test_eight_clients_get_the_verdicts_of_one(served: tuple[Client, Server], minilm_guard: OODGuard) -> None:
    client, _ = served
    alone = [minilm_guard.check(prompt, response) for prompt, response in ITEMS]

    def ask(worker: int) -> list[tuple[int, dict[str, Any]]]:
        order = random.Random(worker).sample(range(len(ITEMS)), len(ITEMS))
        found: list[tuple[int, dict[str, Any]]] = []
        while order:
            some, order = order[: worker + 1], order[worker + 1 :]
            body = {"items": [{"id": str(i), "prompt": ITEMS[i][0], "response": ITEMS[i][1]} for i in some]}
            answer = client.post("/v1/score", body)
            assert answer.status == 200
            found += [(i, row) for i, row in zip(some, answer.json["results"], strict=True)]
        return found

    with ThreadPoolExecutor(8) as pool:
        for rows in pool.map(ask, range(8)):
            assert len(rows) == len(ITEMS)
            for i, row in rows:
                wanted = alone[i]
                assert row["id"] == str(i)
                assert row["is_ood"] == wanted.is_ood
                assert row["reasons"] == list(wanted.reasons)
                if row["reward"] is None:
                    assert "non_finite" in row["reasons"]
                    continue
                assert row["reward"] == pytest.approx(wanted.reward, abs=1e-4)
                for axis, verdict in wanted.axes.items():
                    for name, channel in verdict.channels.items():
                        score = row["axes"][axis]["channels"][name]["score"]
                        assert score == pytest.approx(channel.score, rel=1e-4), name


class Proxy:
    """A network between client and server: slow, thin, cut into pieces, reset, or silent."""

    def __init__(self, target: int, toxic: str) -> None:
        self.target, self.toxic = target, toxic
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        await asyncio.gather(self._pipe(reader, back), self._pipe(there, writer), return_exceptions=True)

    async def _pipe(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        passed = 0
        try:
            while data := await source.read(4096):
                step = {"slicer": 7, "bandwidth": 64}.get(self.toxic, len(data))
                for start in range(0, len(data), step):
                    if self.toxic == "latency":
                        await asyncio.sleep(0.05)
                    if self.toxic == "bandwidth":
                        await asyncio.sleep(0.005)
                    if self.toxic == "timeout" and passed > 60:
                        await asyncio.sleep(60)
                    if self.toxic == "reset" and passed > 60:
                        sink.get_extra_info("socket").setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                        sink.transport.abort()
                        return
                    sink.write(data[start : start + step])
                    await sink.drain()
                    passed += step
        finally:
            sink.close()

    @contextmanager
    def running(self) -> Iterator[Client]:
        self._thread.start()
        assert self._ready.wait(10)
        try:
            yield Client(self.port, timeout=6)
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()


@pytest.mark.parametrize("toxic", ["latency", "bandwidth", "slicer", "reset", "timeout"])
def test_bad_networks_leave_nothing_behind(served: tuple[Client, Server], toxic: str) -> None:
    client, server = served
    loop = server.service.batcher._task.get_loop()  # type: ignore[union-attr]
    wait_until(lambda: not server.server_state.connections)
    before = len(asyncio.all_tasks(loop))
    rows = preference_rows(4, seed=11)
    body = {"items": [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]}

    def ask(bad: Client) -> int:
        try:
            return bad.post("/v1/score", body).status
        except OSError:
            return 0

    with Proxy(client.port, toxic).running() as bad, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, bad) for _ in range(4)]
        # Others are served meanwhile.
        assert client.post("/v1/score", body).status == 200
        statuses = [future.result() for future in asked]
    assert set(statuses) <= ({200} if toxic in ("latency", "bandwidth", "slicer") else {0, 408}), statuses
    wait_until(lambda: not server.server_state.connections)
    wait_until(lambda: len(asyncio.all_tasks(loop)) <= before)
    assert server.service.batcher.waiting == 0
    wait_until(lambda: client.metric("rm_ood_requests_in_flight") == 1)
    assert client.metric('rm_ood_requests_total{status="500"}') == 0
