"""A small HTTP server that answers `POST /v1/score` as the wire has it, by a real guard; with hooks to spoil its answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from rm_ood import OODGuard
from rm_ood.dialogue import Dialogue

# What an item may carry for its chat template.
BESIDE: dict[str, Any] = {"tools": [], "chat_template_kwargs": {}}


class GuardServer:
    """A guard behind a port of this machine; `with GuardServer(guard) as server: ... server.url`."""

    def __init__(self, guard: OODGuard, *, api_key: str | None = None, watch: bool = False) -> None:
        self.guard = guard
        self.api_key = api_key
        self.monitor = guard.monitor() if watch else None
        self.digest = "d" * 64
        self.requests: list[dict[str, Any]] = []
        # (status, headers) of the answers before the first real one.
        self.refusals: list[tuple[int, dict[str, str]]] = []
        self.spoil: Callable[[dict[str, Any]], Any] = lambda reply: reply
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if server.api_key is not None and self.headers["Authorization"] != f"Bearer {server.api_key}":
                    return self.reply(401, {"error": "a key", "type": "Unauthorized", "request_id": "r"})
                if self.path != "/v1/score":
                    return self.reply(404, {"error": "path", "type": "NotFound", "request_id": "r"})
                with lock:
                    server.requests.append(json.loads(body))
                    if server.refusals:
                        status, headers = server.refusals.pop(0)
                        # What a careless server does: it says what it was sent.
                        return self.reply(status, {"error": body.decode(), "type": "E", "request_id": "r"}, headers)
                    return self.reply(200, server.spoil(server.answer(server.requests[-1])))

            def reply(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request."""
        items = body.get("items", [body])
        prompts, answers, ids, sessions = [], [], [], []
        for i, item in enumerate(items):
            assert item.keys() <= {"id", "session", "prompt", "response", "responses", "messages", *BESIDE}
            given = item["responses"] if "responses" in item else [item["response"]]
            name = item.get("id", str(i))
            beside = [item.get(name, empty) for name, empty in BESIDE.items()]
            prompts.append(Dialogue(item["prompt"], *beside) if any(beside) else item["prompt"])
            answers.append(given)
            ids += [f"{name}#{j}" for j in range(len(given))] if "responses" in item else [name]
            sessions += [item.get("session", f"{len(self.requests)} {i}")] * len(given)
        decisions = self.guard.check(prompts, answers)
        monitor = None
        if self.monitor is not None:
            state = self.monitor.watch(decisions, sessions)
            monitor = {"alarm": state.alarm, "e_value": state.e_value}
        return {
            "results": [{"id": name, **decision.to_dict()} for name, decision in zip(ids, decisions, strict=True)],
            "monitor": monitor,
            "mode": "shadow",
            "guard": self.digest,
            "request_id": f"request-{len(self.requests)}",
        }

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
