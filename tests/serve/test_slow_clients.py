"""Clients that are slow, stop half way, send too much, or send what is no HTTP: none of them holds the server up."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from serving import Client, guard_scorer, serving, wait_until

from rm_ood import OODGuard
from rm_ood.serve.server import Server

LIMIT_S = 0.6
GOOD = {"prompt": "question about the river", "response": "the answer is small"}
BODY = json.dumps(GOOD).encode()
HEAD = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def served(minilm_guard: OODGuard) -> Iterator[tuple[Client, Server]]:
    with serving(guard_scorer(minilm_guard), request_timeout_s=LIMIT_S, max_connections=300) as both:
        yield both


def status(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1]) if reply.startswith(b"HTTP/1.1 ") else 0


@pytest.mark.parametrize("start", [b"", b"POST /v1/score HT", HEAD, HEAD + b"Content-Length: 50\r\n\r\n{"])
def test_half_requests_are_dropped_at_the_deadline(served: tuple[Client, Server], start: bytes) -> None:
    client, server = served
    sockets = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(50)]
    try:
        for half in sockets:
            half.sendall(start)
        wait_until(lambda: len(server.server_state.connections) >= 50)
        assert client.post("/v1/score", GOOD).status == 200
        wait_until(lambda: not server.server_state.connections, LIMIT_S + 2)
        replies = [half.recv(4096) for half in sockets]
        assert {status(reply) for reply in replies} == {408}
        assert b'"request_timeout"' in replies[0]
    finally:
        for half in sockets:
            half.close()


@pytest.mark.parametrize(("sent", "kind"), [(b"GET /livez\r\n\r\n", "invalid_http"), (b"GET /li", "request_timeout")])
def test_what_no_route_sees_has_a_request_id_in_reply_and_log(
    served: tuple[Client, Server], sent: bytes, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    client, _ = served
    with caplog.at_level(logging.INFO, "rm_ood.serve"):
        head, _, body = client.raw(sent).partition(b"\r\n\r\n")
    reply = json.loads(body)
    assert reply["type"] == kind
    assert re.fullmatch("[0-9a-f]{32}", reply["request_id"])
    assert f"x-request-id: {reply['request_id']}".encode() in head.lower()
    (line,) = (record.fields for record in caplog.records if record.msg == "refused")  # type: ignore[attr-defined]
    assert line == {"request_id": reply["request_id"], "status": status(head), "error": kind}


def test_a_drip_fed_body_ends_at_the_deadline(served: tuple[Client, Server]) -> None:
    client, _ = served
    start = time.monotonic()
    drip = [bytes([byte]) for byte in BODY[:40]]
    reply = client.raw(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY), *drip, pause=0.05)
    assert status(reply) == 408
    assert LIMIT_S <= time.monotonic() - start < LIMIT_S + 3


def test_a_reader_that_stops_is_let_go(served: tuple[Client, Server], minilm_guard: OODGuard) -> None:
    client, server = served
    stuck = socket.socket()
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    stuck.connect(("127.0.0.1", client.port))
    try:
        # Replies pile up until the sender's buffers are full.
        asks = b"GET /v1/guard HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3000

        def send() -> None:
            with contextlib.suppress(OSError):
                stuck.sendall(asks)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        wait_until(lambda: len(server.server_state.connections) >= 1)
        assert client.post("/v1/score", GOOD).status == 200
        wait_until(lambda: not server.server_state.connections, 30)
    finally:
        stuck.close()


@pytest.mark.parametrize("framing", ["declared", "chunked"])
def test_a_body_past_the_limit_is_refused_at_once(served: tuple[Client, Server], framing: str) -> None:
    client, _ = served
    start = time.monotonic()
    if framing == "declared":
        reply = client.raw(HEAD + b"Connection: close\r\nContent-Length: 2097152\r\n\r\n", b"x" * 1000)
    else:
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        reply = client.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 20)
    assert status(reply) == 413
    assert b"body_too_large" in reply
    assert time.monotonic() - start < 4


def test_a_refused_body_that_never_ends_is_let_go(served: tuple[Client, Server]) -> None:
    client, server = served
    with socket.create_connection(("127.0.0.1", client.port)) as sender:
        sender.sendall(HEAD + b"Content-Length: 2097152\r\n\r\n")
        assert status(sender.recv(4096)) == 413
        end = time.monotonic() + 6
        while server.server_state.connections and time.monotonic() < end:
            try:
                sender.sendall(b"x")
            except OSError:
                break
            time.sleep(0.05)
        wait_until(lambda: not server.server_state.connections, 2)


@pytest.mark.parametrize(
    "data",
    [
        b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\nhello",
        b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost : x\r\nContent-Length: 5\r\n\r\nhello",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /livez\r\n\r\n",
        b"GET /livez HTTP/1.1\nHost: localhost\n\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: a\nY: b\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=[
        "two lengths", "negative length", "length and chunks", "unknown coding", "space before colon", "long header",
        "HTTP/0.9", "bare LF", "bare LF in a header", "TLS", "HTTP/2",
    ],
)  # fmt: skip
def test_what_is_no_plain_http_is_refused(served: tuple[Client, Server], data: bytes) -> None:
    client, _ = served
    reply = client.raw(data)
    assert status(reply) in (0, *range(400, 500)), reply[:200]
    if status(reply):
        assert client.metric(f'rm_ood_requests_total{{endpoint="other",status="{status(reply)}"}}') > 0
    assert client.get("/livez").status == 200


def test_a_connection_carries_several_requests(served: tuple[Client, Server]) -> None:
    client, _ = served
    one = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    reply = client.raw(one + one + one.replace(b"Host: localhost", b"Host: localhost\r\nConnection: close"))
    assert reply.count(b"HTTP/1.1 200") == 3


def test_a_kept_connection_is_answered_without_delay(served: tuple[Client, Server]) -> None:
    client, _ = served
    connection = http.client.HTTPConnection("127.0.0.1", client.port)
    took = []
    for _ in range(60):
        start = time.monotonic()
        connection.request("POST", "/v1/score", b"{}", {"content-type": "application/json"})
        assert connection.getresponse().read()
        took.append(time.monotonic() - start)
    connection.close()
    # A reply in two packets of which the second waited for the other side's word, some 40 ms, would be late every time, but
    # for the first ones of a connection; a machine with other work is late now and then.
    assert min(took[30:]) < 0.03


def test_a_reset_leaves_nothing_behind(served: tuple[Client, Server]) -> None:
    client, server = served
    for cut in (10, len(HEAD), len(HEAD) + 30):
        with socket.create_connection(("127.0.0.1", client.port)) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sender.sendall((HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)[:cut])
    wait_until(lambda: not server.server_state.connections, LIMIT_S + 2)
    wait_until(lambda: client.metric("rm_ood_requests_in_flight") == 1)
