"""What bounds the wait of what was accepted: order, expected time, refusals before the reading, the connections of others."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from serving import FaultyScorer, serving, wait_until

from rm_ood import OODGuard
from rm_ood.serve.batcher import Batcher, Job
from rm_ood.serve.refusal import Refusal

ITEM = {"prompt": "question about the river", "response": "the answer is small"}
BATCH_S = 0.2


class Model:
    """Gives back what it gets, after a while, and one batch at a time for each that is let go on."""

    def __init__(self, pause: float = 0.0) -> None:
        self.pause = pause
        self.batches: list[list[Any]] = []
        self.go = threading.Semaphore(0)

    def __call__(self, key: Any, works: Sequence[Any]) -> Sequence[Any]:
        self.batches.append(list(works))
        assert self.go.acquire(timeout=20)
        time.sleep(self.pause)
        return works


def job(work: Any, length: int = 1) -> Job:
    return Job(work, length, None, asyncio.get_running_loop().create_future())


def put(batcher: Batcher, *jobs: Job) -> list[asyncio.Future[Any]]:
    batcher.reserve(len(jobs))
    batcher.put(jobs)
    return [one.result for one in jobs]


async def until(holds: Any) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.005)


def test_nothing_is_passed_over_twice() -> None:
    model = Model()

    async def run() -> None:
        batcher = Batcher(model, batch_size=4, max_queue=100, max_wait_s=60, wait_s=0)
        batcher.start()
        results = put(batcher, job("first"))
        await until(lambda: model.batches)
        # Each has three others of its own length behind the rest, and would wait for its turn as the oldest.
        lengths = [1, 1000, 2000, 3000]
        results += put(batcher, *(job(length, length) for length in lengths))
        results += put(batcher, *(job(f"like {length}", length) for length in lengths for _ in range(3)))
        for _ in range(5):
            model.go.release()
        await asyncio.gather(*results)
        await batcher.stop()

    asyncio.run(run())
    assert model.batches[1] == [1] + 3 * ["like 1"]
    assert set(model.batches[2]) == {1000, 2000, 3000, "like 1000"}


@pytest.mark.parametrize(("waited", "first"), [(1.0, ["short", "short too"]), (6.0, ["short", "long"])])
def test_what_would_be_late_is_not_passed_over(waited: float, first: list[str]) -> None:
    async def run() -> list[Job]:
        batcher = Batcher(Model(), batch_size=2, max_queue=100, max_wait_s=25, wait_s=0)
        batcher._batch_s = 10
        now = time.monotonic()
        for name, length, age in (("short", 1, waited), ("long", 900, waited), ("short too", 1, 0.5)):
            one = job(name, length)
            one.since = now - age
            batcher._queue.append(one)
        return batcher._take()

    # It has 25 s, of which the batch that is made now takes ten and the one after it as many.
    assert [one.work for one in asyncio.run(run())] == first


def test_what_would_wait_too_long_is_refused_and_an_idle_model_refuses_nothing() -> None:
    model = Model(BATCH_S)

    async def run() -> None:
        batcher = Batcher(model, batch_size=2, max_queue=100, max_wait_s=3.5 * BATCH_S, wait_s=0)
        batcher.start()
        # No batch has been seen yet: the wait is not known.
        model.go.release()
        await asyncio.gather(*put(batcher, job(0)))
        results = put(batcher, job(1))
        await until(lambda: len(model.batches) == 2)
        await asyncio.sleep(1.5 * BATCH_S)
        # The batch in the model should be done; each that waits takes one more.
        results += put(batcher, *(job(i) for i in range(6)))
        for n in (1, 2, 40):
            with pytest.raises(Refusal) as caught:
                batcher.reserve(n)
            assert caught.value.status == 429
            assert caught.value.retry_after_s == pytest.approx(3 * BATCH_S, rel=0.25)
        for _ in range(4):
            model.go.release()
        await asyncio.gather(*results)
        await until(lambda: batcher.busy_since is None)
        model.go.release()
        for _ in range(4):
            model.go.release()
        await asyncio.gather(*put(batcher, *(job(i) for i in range(10))))
        assert batcher.waiting == 0
        await batcher.stop()

    asyncio.run(run())


def test_a_request_that_would_be_refused_is_not_read(minilm_guard: OODGuard) -> None:
    faulty = FaultyScorer(minilm_guard)
    with serving(faulty, max_queue=1, max_items=1) as (client, server):
        faulty.go.clear()
        asked = [threading.Thread(target=client.post, args=("/v1/score", ITEM)) for _ in range(2)]
        asked[0].start()
        wait_until(lambda: faulty.seen)
        asked[1].start()
        wait_until(lambda: server.service.batcher.waiting == 1)
        head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", client.port), timeout=5) as sender:
            sender.sendall(head + b"Content-Length: 500000\r\n\r\n")
            reply = sender.recv(4096)
        assert reply.startswith(b"HTTP/1.1 429")
        assert b"retry-after: " in reply.lower()
        # What needs no model is answered.
        assert client.get("/v1/guard").status == 200
        faulty.go.set()
        for thread in asked:
            thread.join()


def test_connections_that_were_there_go_on_when_others_fill_the_limit(minilm_guard: OODGuard) -> None:
    with serving(FaultyScorer(minilm_guard), max_connections=10) as (client, server), contextlib.ExitStack() as held:
        kept = http.client.HTTPConnection("127.0.0.1", client.port)

        def ask() -> int:
            kept.request("POST", "/v1/score", json.dumps(ITEM), {"content-type": "application/json"})
            reply = kept.getresponse()
            reply.read()
            return reply.status

        assert ask() == 200
        for _ in range(20):
            held.enter_context(socket.create_connection(("127.0.0.1", client.port)))
        wait_until(lambda: len(server.server_state.connections) == 21)
        assert client.post("/v1/score", ITEM).json["type"] == "too_many_connections"
        assert ask() == 200
        kept.close()
