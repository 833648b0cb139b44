"""More work than the model can do: what fits is answered as always, the rest at once and with a time to come back."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Client, FaultyScorer, serving, wait_until

from rm_ood import OODGuard
from rm_ood.serve.server import Server

PAUSE_S = 0.05
QUEUE = 16


def item(i: int, words: str = "the answer is small") -> dict[str, str]:
    return {"prompt": f"question {i} about the river", "response": words}


@pytest.fixture
def faulty(minilm_guard: OODGuard) -> FaultyScorer:
    return FaultyScorer(minilm_guard, pause=PAUSE_S)


@pytest.fixture
def served(faulty: FaultyScorer) -> Iterator[tuple[Client, Server]]:
    with serving(faulty, max_queue=QUEUE, max_items=16, max_connections=40, model_timeout_s=5) as both:
        yield both


def test_overload_sheds_at_once_with_a_time_and_spares_the_rest(
    served: tuple[Client, Server], faulty: FaultyScorer
) -> None:
    client, server = served
    faulty.go.clear()
    with ThreadPoolExecutor(QUEUE + 1) as pool:
        accepted = [pool.submit(client.post, "/v1/score", item(0))]
        wait_until(lambda: faulty.seen)
        accepted += [pool.submit(client.post, "/v1/score", item(i)) for i in range(QUEUE)]
        wait_until(lambda: server.service.batcher.waiting == QUEUE)
        shed = [client.post("/v1/score", item(i)) for i in range(30)]
        # They did not wait for the model, which has answered nobody yet.
        assert not any(future.done() for future in accepted)
        faulty.go.set()
        assert {future.result().status for future in accepted} == {200}
    assert {(answer.status, answer.json["type"]) for answer in shed} == {(429, "overloaded")}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in shed)
    # What was accepted waited for the batch before it and for a queue's worth of batches, no more.
    assert len(faulty.seen) <= 1 + -(-QUEUE // faulty.batch_size)
    assert server.service.batcher.waiting == 0
    assert client.metric('rm_ood_requests_total{status="429"}') == len(shed)


def test_every_request_of_a_rush_is_scored_or_shed(served: tuple[Client, Server]) -> None:
    client, server = served
    # Half of the connections: one that the client has closed counts until the server has seen it.
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda i: client.post("/v1/score", item(i)).status, range(150)))
    assert set(found) <= {200, 429}
    assert 200 in found
    assert server.service.batcher.waiting == 0
    assert client.metric('rm_ood_requests_total{status="429"}') == found.count(429)
    assert client.metric('rm_ood_requests_total{endpoint="/v1/score",status="200"}') == found.count(200)


def test_a_request_that_does_not_fit_leaves_room_for_one_that_does(
    served: tuple[Client, Server], faulty: FaultyScorer
) -> None:
    client, server = served
    faulty.go.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(client.post, "/v1/score", item(0))
        wait_until(lambda: faulty.seen)
        second = pool.submit(client.post, "/v1/score", {"items": [item(i) for i in range(12)]})
        wait_until(lambda: server.service.batcher.waiting == 12)
        assert client.post("/v1/score", {"items": [item(i) for i in range(8)]}).status == 429
        third = pool.submit(client.post, "/v1/score", {"items": [item(i) for i in range(4)]})
        wait_until(lambda: server.service.batcher.waiting == 16)
        assert client.metric("rm_ood_queue_depth") == 16
        faulty.go.set()
        assert [future.result().status for future in (first, second, third)] == [200] * 3


def test_connections_past_the_limit_are_answered_at_once(served: tuple[Client, Server]) -> None:
    client, server = served
    held = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(40)]
    try:
        wait_until(lambda: len(server.server_state.connections) == 40)
        start = time.monotonic()
        answer = client.post("/v1/score", item(0))
        assert (answer.status, answer.json["type"]) == (503, "too_many_connections")
        assert int(answer.headers["retry-after"]) >= 1
        assert time.monotonic() - start < 1
        assert client.get("/livez").status == 200
        flood = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(150)]
        try:
            # Past a multiple of the limit a connection is not even read from.
            assert flood[-1].recv(1) == b""
        except ConnectionResetError:
            pass
        finally:
            for one in flood:
                one.close()
    finally:
        for one in held:
            one.close()
    wait_until(lambda: not server.server_state.connections)
    assert client.post("/v1/score", item(0)).status == 200


def test_work_that_nobody_waits_for_never_reaches_the_model(faulty: FaultyScorer) -> None:
    with serving(faulty, max_queue=64) as (client, server):
        faulty.go.clear()
        blocker = threading.Thread(target=client.post, args=("/v1/score", item(0, "the first answer")))
        blocker.start()
        wait_until(lambda: faulty.seen)
        senders = []
        for i in range(50):
            sender = socket.create_connection(("127.0.0.1", client.port))
            body = b'{"prompt": "a question", "response": "gone %d"}' % i
            head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sender.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            senders.append(sender)
        wait_until(lambda: server.service.batcher.waiting == 50)
        for sender in senders:
            sender.close()
        wait_until(lambda: client.metric('rm_ood_requests_total{endpoint="/v1/score",status="499"}') == 50)
        faulty.go.set()
        blocker.join()
        assert client.post("/v1/score", item(1, "the last answer")).status == 200
        assert faulty.seen == [["the first answer"], ["the last answer"]]
        # The request that asks is itself in flight.
        wait_until(lambda: client.metric("rm_ood_requests_in_flight") == 1)
        assert server.service.batcher.waiting == 0
