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
from dataclasses import replace
from typing import Any

import pytest
from serving import FaultyScorer, serving, wait_until

from rm_ood import OODGuard
from rm_ood.serve.batcher import Batcher, Job, Pace
from rm_ood.serve.refusal import Refusal

ITEM = {"prompt": "question about the river", "response": "the answer is small"}


class Model:
    """Gives back what it gets, one batch at a time for each that is let go on."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.go = threading.Semaphore(0)

    def __call__(self, key: Any, works: Sequence[Any]) -> Sequence[Any]:
        self.batches.append(list(works))
        assert self.go.acquire(timeout=20)
        return works


def batcher_of(score: Any, *, timeout_s: float = 60, **options: Any) -> Batcher:
    return Batcher(score, max_queue=100, wait_s=0, timeout_s=timeout_s, **options)


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
        batcher = batcher_of(model, batch_size=4, max_wait_s=60)
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
        batcher = batcher_of(Model(), batch_size=2, max_wait_s=25)
        batcher.pace.ran(2, 10)
        now = time.monotonic()
        for name, length, age in (("short", 1, waited), ("long", 900, waited), ("short too", 1, 0.5)):
            one = job(name, length)
            one.since = now - age
            batcher._queue.append(one)
        return batcher._take()

    # It has 25 s, of which the batch that is made now takes ten and the one after it as many.
    assert [one.work for one in asyncio.run(run())] == first


def at(batcher: Batcher, now: float, *pace: tuple[int, float]) -> None:
    """Batches of so many items took so many seconds; those in the model began at `now`."""
    batcher.pace = Pace()
    for size, took in pace:
        batcher.pace.ran(size, took)
    batcher._calls = {task: replace(call, since=now) for task, call in batcher._calls.items()}


def test_what_would_wait_too_long_is_refused_and_an_idle_model_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()

    async def run() -> None:
        batcher = batcher_of(model, batch_size=2, max_wait_s=35)
        batcher.start()
        # No batch has been seen yet: the wait is not known.
        model.go.release()
        await asyncio.gather(*put(batcher, job(0)))
        results = put(batcher, job(1))
        await until(lambda: len(model.batches) == 2)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now)
        # The one in the model is due; each that waits takes one more.
        at(batcher, now - 10, (2, 10))
        results += put(batcher, *(job(i) for i in range(6)))
        for n in (1, 2, 40):
            with pytest.raises(Refusal) as caught:
                batcher.reserve(n)
            assert (caught.value.status, caught.value.retry_after_s) == (429, 30)
        # What is overdue is expected to take as long again.
        at(batcher, now - 14, (2, 10))
        assert [batcher.wait_s(n) for n in (0, 1, 2, 3)] == [4, 14, 14, 24]
        at(batcher, now - 4, (2, 10))
        assert batcher.wait_s(0) == 6
        monkeypatch.undo()
        for _ in range(4):
            model.go.release()
        await asyncio.gather(*results)
        await until(lambda: batcher.busy_since is None)
        at(batcher, 0, (2, 10))
        for _ in range(5):
            model.go.release()
        await asyncio.gather(*put(batcher, *(job(i) for i in range(10))))
        assert batcher.waiting == 0
        await batcher.stop()

    asyncio.run(run())


def test_a_full_batch_is_judged_by_the_items_of_those_before() -> None:
    batcher = batcher_of(Model(), batch_size=16, max_wait_s=0.4)
    for _ in range(20):
        batcher.pace.ran(1, 0.02)
    assert batcher.wait_s(16) == pytest.approx(0.32)
    # Two full ones, and one of four.
    assert batcher.wait_s(36) == pytest.approx(0.72)
    # A model that takes as long whatever is in the batch is found to do so.
    for _ in range(60):
        batcher.pace.ran(16, 0.02)
    assert batcher.wait_s(16) == pytest.approx(0.02, rel=1e-3)
    assert batcher.wait_s(1) == pytest.approx(0.02, rel=1e-3)


def test_a_first_batch_that_loads_what_later_ones_find_is_forgotten_at_the_second() -> None:
    pace = Pace()
    assert pace.expects(4) == 0
    pace.ran(2, 3.0)
    assert pace.expects(4) == 6
    pace.ran(2, 0.1)
    assert pace.expects(4) == pytest.approx(0.2)
    # From now on one slow batch is one among others.
    pace.ran(2, 3.0)
    assert 1 < pace.expects(2) < 2


@pytest.mark.parametrize(("max_wait_s", "most"), [(0.4, 40), (60.0, 100)])
def test_a_rush_after_calm_is_given_what_it_has_time_for(max_wait_s: float, most: int) -> None:
    item_s = 0.01

    def score(key: Any, works: Sequence[Any]) -> Sequence[Any]:
        time.sleep(item_s * len(works))
        return works

    async def run() -> int:
        batcher = batcher_of(score, batch_size=16, max_wait_s=max_wait_s)
        batcher.start()
        for i in range(5):
            await asyncio.gather(*put(batcher, job(i)))
            await until(lambda: batcher.busy_since is None)
        accepted: list[asyncio.Future[Any]] = []
        for i in range(200):
            with contextlib.suppress(Refusal):
                accepted += put(batcher, job(i))
        await asyncio.gather(*accepted)
        await batcher.stop()
        return len(accepted)

    # 10 ms an item, and as many as the queue holds. Where the machine is busy, an item took longer before.
    assert most / 2 <= asyncio.run(run()) <= most


def test_a_model_that_does_not_answer_is_given_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()

    async def run() -> None:
        batcher = batcher_of(model, batch_size=2, max_wait_s=100, timeout_s=60)
        batcher.start()
        results = put(batcher, job(0))
        await until(lambda: model.batches)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now)
        at(batcher, now - 60)
        batcher.check(1)
        at(batcher, now - 61)
        with pytest.raises(Refusal, match="for 60 s") as caught:
            batcher.check(1)
        assert (caught.value.status, caught.value.kind) == (503, "model_stuck")
        monkeypatch.undo()
        model.go.release()
        await asyncio.gather(*results)
        await until(lambda: batcher.busy_since is None)
        batcher.check(1)
        await batcher.stop()

    asyncio.run(run())


@pytest.mark.parametrize("begun", [True, False])
def test_nobody_waits_for_a_batcher_that_was_stopped(begun: bool) -> None:
    model = Model()

    async def run() -> list[Any]:
        batcher = batcher_of(model, batch_size=2, max_wait_s=60)
        batcher.start()
        results = put(batcher, *(job(i) for i in range(5)))
        while not (model.batches if begun else batcher._calls):
            await asyncio.sleep(0)
        await batcher.stop()
        async with asyncio.timeout(5):
            return await asyncio.gather(*results, return_exceptions=True)

    try:
        assert [type(one) for one in asyncio.run(run())] == 5 * [asyncio.CancelledError]
    finally:
        model.go.release()


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
