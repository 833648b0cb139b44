"""Keys and texts: who may ask what, and that nothing that was sent comes out anywhere but in scores."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import Client, FaultyScorer, serving, wait_until

from rm_ood import InputError, OODGuard
from rm_ood.cli import main
from rm_ood.serve import logs
from rm_ood.serve.server import Server
from rm_ood.serve.settings import check_host, key_digest, read_api_key

KEY = "correct-horse-battery-staple"
ITEM = {"prompt": "question about the river", "response": "the answer is small"}


@pytest.fixture(scope="module")
def served(minilm_guard: OODGuard) -> Iterator[tuple[Client, Server]]:
    scorer = FaultyScorer(minilm_guard)
    with serving(scorer, api_key=key_digest(KEY), request_timeout_s=0.5, model_timeout_s=1.0) as both:
        yield both


def test_every_route_but_livez_asks_for_the_key(served: tuple[Client, Server]) -> None:
    client, server = served
    routes = {(method, r.path) for r in server.config.app.routes for method in r.methods}  # type: ignore[union-attr]
    assert {("POST", "/v1/score"), ("GET", "/metrics"), ("GET", "/"), ("GET", "/openapi.json")} <= routes
    assert len(routes) >= 12
    for method, path in (*routes, ("GET", "/nothing"), ("POST", "/"), ("OPTIONS", "/v1/score")):
        open_to_all = path == "/livez" and method in ("GET", "HEAD")
        body = b"" if method == "POST" else None
        refused = client.ask(method, path, body)
        assert (refused.status == 401) != open_to_all, (method, path)
        if not open_to_all:
            assert refused.headers["www-authenticate"] == "Bearer"
        assert client.ask(method, path, body, key=KEY).status != 401
    for wrong in ("", KEY[:-1], KEY + "x", KEY.upper(), f"{KEY} {KEY}"):
        assert client.post("/v1/score", ITEM, key=wrong).status == 401
    assert client.post("/v1/score", ITEM, headers={"authorization": f"Basic {KEY}"}).status == 401
    assert client.post("/v1/score", ITEM, headers={"authorization": "Bearer \xe9"}).status == 401


def test_the_key_is_asked_for_before_the_body_is_read(served: tuple[Client, Server]) -> None:
    client, _ = served
    reply = client.raw(
        b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\nConnection: close\r\n\r\n"
    )
    assert reply.startswith(b"HTTP/1.1 401")


SECRET = "s3cr3t"


def words(where: str) -> str:
    return f"{SECRET}{where}"


def log_as_a_server(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Log to stderr as the process does; the call that comes back ends it."""
    loggers = [logging.getLogger(name) for name in ("rm_ood.serve", "uvicorn.error", "asyncio")]
    before = [(list(logger.handlers), logger.propagate) for logger in loggers]
    monkeypatch.setattr("warnings.showwarning", None)
    logs.configure()

    def put_back() -> None:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers[:] = handlers
            logger.propagate = propagate

    return put_back


def test_what_is_sent_comes_out_nowhere(
    served: tuple[Client, Server], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = served
    put_back = log_as_a_server(monkeypatch)
    bodies: list[Any] = [
        {"prompt": words("A"), "response": words("B")},
        {"prompt": words("A"), "response": f"explode {words('B')}"},
        {"prompt": words("A"), "response": 3, words("C"): 1},
        {"prompt": words("A"), "response": "x", "id": [words("D")], "session": words("E") * 99},
        {"items": [{"prompt": words("A")}, {words("F"): {words("G"): 1}}]},
        {"messages": [{"role": words("H"), "content": words("I")}, {"role": "assistant", "content": words("J")}]},
        {"messages": [{"role": "user", "content": [{"type": words("K"), "text": words("L")}]}] * 2},
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{words("M"): 1}]}, {"role": "assistant"}]},
        {"prompt": words("A") * 9000, "response": "x"},
        b'{"' + words("N").encode() + b'": 1, "' + words("N").encode() + b'": 2}',
        words("O").encode(),
        b'{"prompt": "' + words("P").encode() + b'\\ud800", "response": ""}',
        b'{"prompt": ' + words("Q").encode(),
    ]
    replies = [client.post("/v1/score", body, key=KEY) for body in bodies]
    texts = {"query": [words("A")], "prompts": [words("B")], "labels": [words("C")]}
    replies += [client.post("/get_reward", texts, key=KEY), client.post("/classify", {"input": words("A")}, key=KEY)]
    replies += [client.post("/v1/score", ITEM, key=words("key")), client.get(f"/{words('path')}", key=KEY)]
    replies += [
        client.get("/livez", headers={"X-Request-Id": words("!")}),
        client.get("/livez", headers={"baggage": words("b"), "traceparent": words("t"), "tracestate": words("s")}),
        client.post("/v1/score/", ITEM, key=KEY, headers={"Host": words("host")}),
        client.get("/metrics", key=KEY, headers={"Accept": "application/openmetrics-text; version=" + words("v")}),
        client.ask(words("VERB").upper(), "/v1/score", b"", key=KEY),
        client.post("/v1/score", ITEM, headers={"content-type": words("type")}, key=KEY),
    ]
    raw = [
        client.raw(b"GET /" + words("a").encode() + b" HTTP/1.1\nHost: localhost\n\n"),
        client.raw(words("line").encode() + b"\r\n\r\n"),
        client.raw(
            f"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 99\r\n\r\n".encode(),
            words("half").encode(),
        ),
    ]
    shown = [reply.body for reply in replies] + raw
    shown += [repr(reply.headers).encode() for reply in replies]
    shown += [client.get(path, key=KEY).body for path in ("/metrics", "/readyz", "/v1/guard", "/openapi.json", "/")]
    out, err = capfd.readouterr()
    put_back()
    assert err.count('"event": "request"') >= len(bodies)
    assert {reply.status for reply in replies} >= {200, 400, 401, 404, 405, 415, 422, 500}
    everything = b"\n".join(shown).decode("latin-1").lower() + out.lower() + err.lower()
    assert SECRET not in everything
    assert KEY not in everything
    for word in ("/work", "site-packages", "traceback", ".py", "rm_ood.serve."):
        assert word not in out + err + "".join(reply.body.decode() for reply in replies)


def test_what_is_sent_comes_out_of_no_limit(
    minilm_guard: OODGuard, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back = log_as_a_server(monkeypatch)
    scorer = FaultyScorer(minilm_guard)
    limits: dict[str, Any] = {"max_queue": 1, "max_items": 1, "max_body_bytes": 3000, "max_connections": 4}
    body = {"prompt": words("A"), "response": words("B"), "id": words("C"), "session": words("D")}
    head = f"POST /v1/score?{words('E')} HTTP/1.1\r\nHost: localhost\r\nX-{words('F')}: {words('G')}\r\n".encode()
    try:
        with (
            serving(scorer, api_key=key_digest(KEY), request_timeout_s=0.5, model_timeout_s=2.0, **limits) as (
                client,
                server,
            ),
            ThreadPoolExecutor(2) as pool,
        ):
            client.key = KEY
            shown = [
                client.post("/v1/score", {**body, "prompt": words("H") * 500}).body,
                client.raw(head + b"Content-Length: 9\r\n\r\n" + words("I").encode()[:5]),
                client.raw(head + b"X: " + b"a" * 70_000 + words("J").encode() + b"\r\n\r\n"),
            ]
            scorer.go.clear()
            asked = [pool.submit(client.post, "/v1/score", body)]
            wait_until(lambda: scorer.seen)
            asked.append(pool.submit(client.post, "/v1/score", body))
            wait_until(lambda: server.service.batcher.waiting == 1)
            shown.append(client.post("/v1/score", body).body)
            held = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(4)]
            shown.append(client.post("/v1/score", body).body)
            shown += [one.result().body for one in asked]
            for one in held:
                one.close()
            scorer.go.set()
    finally:
        put_back()
    out, err = capfd.readouterr()
    kinds = {json.loads(reply[reply.index(b"{") :])["type"] for reply in shown}
    assert kinds == {
        "body_too_large", "unauthorized", "head_too_large", "overloaded", "too_many_connections", "model_timeout"
    }  # fmt: skip
    everything = b"".join(shown).decode().lower() + out.lower() + err.lower()
    assert err.count('"status": ') >= len(shown)
    assert SECRET not in everything
    assert KEY not in everything


def test_what_others_log_is_told_without_arguments_and_tracebacks() -> None:
    def line(message: str, *arguments: object, error: BaseException | None = None) -> dict[str, Any]:
        info = None if error is None else (type(error), error, None)
        record = logging.LogRecord("asyncio.x", logging.ERROR, "file", 1, message, arguments, info)
        found: dict[str, Any] = json.loads(logs.JsonFormatter().format(record))
        return found

    found = line("never retrieved\nfuture: <Task exception=s3cr3t>", error=RuntimeError("s3cr3t"))
    assert (found["event"], found["error"], found["logger"]) == ("never retrieved", "RuntimeError", "asyncio")
    assert line("from %s", "s3cr3t")["event"] == "from %s"
    assert "s3cr3t" not in json.dumps(found)


def test_request_ids_are_the_senders_only_where_harmless(served: tuple[Client, Server]) -> None:
    client, _ = served
    given = "trace-1.a_B"
    assert client.get("/livez", headers={"X-Request-Id": given}).headers["x-request-id"] == given
    for odd in ("a b", "a" * 65, "", "a\tb", "\xe9", "<x>"):
        found = client.get("/livez", headers={"X-Request-Id": odd}).headers["x-request-id"]
        assert len(found) == 32
        assert found != odd


def test_keys_come_from_a_file_or_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("RM_OOD_API_KEY", raising=False)
    assert read_api_key(None) is None
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert read_api_key(str(tmp_path / "key")) == key_digest(KEY)
    monkeypatch.setenv("RM_OOD_API_KEY", KEY)
    assert read_api_key(None) == key_digest(KEY)
    with pytest.raises(InputError, match="both given"):
        read_api_key(str(tmp_path / "key"))
    for bad in ("short", "with spaces in it, so many", "\xe9" * 20, ""):
        monkeypatch.setenv("RM_OOD_API_KEY", bad)
        with pytest.raises(InputError, match=r"16 to 512 printable") as caught:
            read_api_key(None)
        assert not bad or bad not in str(caught.value)
    monkeypatch.delenv("RM_OOD_API_KEY")
    assert main(["serve", "--guard", "g", "--model", "m", "--api-key-file", str(tmp_path / "none")]) == 1
    with pytest.raises(SystemExit):
        main(["serve", "--guard", "g", "--model", "m", "--api-key", KEY])
    out, err = capsys.readouterr()
    assert "use --api-key-file" in err
    assert KEY not in out + err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_addresses_that_others_reach_need_a_key(host: str) -> None:
    with pytest.raises(InputError, match="set a key"):
        check_host(host, None)
    check_host(host, key_digest(KEY))
    for own in ("127.0.0.1", "::1", "localhost", "127.0.0.2"):
        check_host(own, None)
