"""Threads that end, memory that is let go, a process that is killed while it saves."""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from serving import FaultyScorer, guard_scorer, serving, wait_until

from rm_ood import OODGuard
from rm_ood.serve.refusal import Refusal
from rm_ood.serve.scorer import GuardScorer
from rm_ood.serve.server import Server
from rm_ood.serve.settings import ServeSettings
from rm_ood.serve.worker import Worker, WorkerEnded

ITEM = {"prompt": "question about the river", "response": "the answer is small"}


class Dying(FaultyScorer):
    """Ends its thread on a word, as an exit within a native library does."""

    def encode(self, queries: Any) -> Any:
        if any("end of the tokenizer" in str(query.response) for query in queries):
            raise SystemExit
        return super().encode(queries)

    def score(self, works: Any) -> Any:
        if any("end of the model" in str(work.query.response) for work in works):
            raise SystemExit
        return super().score(works)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("thread", ["model", "tokenizer"])
def test_a_thread_that_ends_is_told_within_a_second(minilm_guard: OODGuard, thread: str) -> None:
    with serving(Dying(minilm_guard), drain_timeout_s=1.0) as (client, _):
        assert client.post("/v1/score", ITEM).status == 200
        start = time.monotonic()
        ended = client.post("/v1/score", {**ITEM, "response": f"the end of the {thread}"})
        assert (ended.status, ended.json["type"], ended.headers["retry-after"]) == (503, "no_model", "1")
        ready = client.get("/readyz")
        assert time.monotonic() - start < 1
        assert (ready.status, ready.json["reasons"]) == (503, [f"{thread} thread ended"])
        assert client.metric("rm_ood_ready") == 0
        # Nobody waits for what cannot come.
        start = time.monotonic()
        answer = client.post("/v1/score", ITEM)
        assert time.monotonic() - start < 1
        assert (answer.status, answer.json["type"]) == (503, "no_model")
        # Nor is a body read, be it as bad as this one.
        assert client.post("/v1/score", b"{").json["type"] == "no_model"
        assert client.get("/livez").status == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_waits_behind_the_end_of_a_thread_is_told() -> None:
    def end() -> None:
        time.sleep(0.1)
        raise SystemExit

    async def run() -> list[Any]:
        worker = Worker("ending")
        async with asyncio.timeout(5):
            found = await asyncio.gather(worker.run(end), *(worker.run(int) for _ in range(3)), return_exceptions=True)
            assert not worker.alive
            return [*found, *await asyncio.gather(worker.run(int), return_exceptions=True)]

    assert [type(one) for one in asyncio.run(run())] == 5 * [WorkerEnded]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_call_that_comes_as_the_thread_ends_is_told() -> None:
    class Late(queue.SimpleQueue[Any]):
        """Takes a call only once the thread has ended, if it can end meanwhile."""

        def put(self, item: Any, *more: Any) -> None:
            go.set()
            worker._thread.join(0.5)
            super().put(item, *more)

    async def run() -> list[Any]:
        async with asyncio.timeout(5):
            ending = asyncio.ensure_future(worker.run(end))
            await asyncio.sleep(0.05)
            worker._calls = Late()
            return await asyncio.gather(ending, worker.run(int), return_exceptions=True)

    def end() -> None:
        go.wait(5)
        raise SystemExit

    go, worker = threading.Event(), Worker("ending")
    assert [type(one) for one in asyncio.run(run())] == 2 * [WorkerEnded]
    worker._thread.join(5)


def test_a_stopped_thread_makes_the_calls_of_before_and_no_others() -> None:
    async def run() -> list[Any]:
        worker = Worker("stopped")
        before = [asyncio.ensure_future(worker.run(go.wait, 5)), asyncio.ensure_future(worker.run(int))]
        await asyncio.sleep(0)
        worker.stop()
        assert not worker.alive
        go.set()
        async with asyncio.timeout(5):
            return await asyncio.gather(*before, worker.run(int), return_exceptions=True)

    go = threading.Event()
    *made, refused = asyncio.run(run())
    assert made == [True, 0]
    assert isinstance(refused, WorkerEnded)


class Panicking(FaultyScorer):
    """Panics on a word, in the Rust of the real tokenizer."""

    def encode(self, queries: Any) -> Any:
        for query in queries:
            if "panic" in str(query.response):
                self.guard.tokenizer.backend_tokenizer.encode(str(query.response)).truncate(2, stride=5)
        return super().encode(queries)


def test_a_panic_of_the_tokenizer_ends_its_request_alone(minilm_guard: OODGuard) -> None:
    with serving(Panicking(minilm_guard)) as (client, _):
        answer = client.post("/v1/score", {**ITEM, "response": "do not panic now"})
        assert (answer.status, answer.json["type"]) == (500, "internal")
        assert client.post("/v1/score", ITEM).status == client.get("/readyz").status == 200


def test_what_is_loaded_is_left_out_of_collections_until_it_is_replaced(
    minilm_guard: OODGuard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minilm_guard.save_pretrained(tmp_path / "guard")

    def again() -> GuardScorer:
        return GuardScorer(OODGuard.from_pretrained(tmp_path / "guard", minilm_guard.model, minilm_guard.tokenizer))

    frozen = []
    monkeypatch.setattr(Server, "run", lambda self, sockets: frozen.append(gc.get_freeze_count()))
    server = Server(guard_scorer(minilm_guard), ServeSettings(), port=0)
    server.socket.close()
    try:
        server.serve_forever()
        assert frozen[0] > 10_000
        monkeypatch.undo()
        gc.unfreeze()
        with serving(again()) as (client, server):
            gc.freeze()
            server.service.load = again
            loop = server.service.batcher._task.get_loop()  # type: ignore[union-attr]

            def replaced(times: int) -> weakref.ref[Any]:
                loop.call_soon_threadsafe(server.reload)
                wait_until(lambda: client.metric('rm_ood_guard_reloads_total{outcome="replaced"}') == times)
                wait_until(lambda: not server._reloads)
                assert gc.get_freeze_count() > 10_000
                scorer = server.service.scorer
                # A cycle, as modules and hooks make them.
                scorer.me = scorer  # type: ignore[attr-defined]
                return weakref.ref(scorer)

            second = replaced(1)
            assert second() is not None
            replaced(2)
            assert second() is None
    finally:
        gc.unfreeze()


def test_a_refused_request_is_let_go_without_a_collection(minilm_guard: OODGuard) -> None:
    faulty = FaultyScorer(minilm_guard)
    with serving(faulty, max_queue=4, max_items=4, max_body_bytes=2000, request_timeout_s=0.2) as (client, _):
        client.get("/livez")
        gc.collect()
        # Those that another test's engine is out with are not this server's.
        others = {id(one) for one in _refusals()}
        gc.disable()
        try:
            statuses = {
                client.post("/v1/score", body).status
                for body in (
                    {**ITEM, "response": "x" * 2000},
                    {**ITEM, "field": 1},
                    b"{",
                    {**ITEM, "response": "explode"},
                )
            }
            # In the tokenizer's thread.
            statuses.add(client.post("/get_reward", {"query": ["abc"], "prompts": ["b"]}).status)
            statuses.add(
                client.ask("GET", "/livez", headers={"transfer-encoding": "chunked", "content-length": "0"}).status
            )
            half = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
            assert client.raw(half).startswith(b"HTTP/1.1 408")
            assert statuses == {400, 413, 422, 500}
            # The last one's task may still be ending.
            wait_until(lambda: not [one for one in _refusals() if id(one) not in others], 2)
        finally:
            gc.enable()


def _refusals() -> list[Refusal]:
    return [one for one in gc.get_objects() if type(one) is Refusal]
