"""A stand-in for SGLang 0.5.23 and vLLM 0.33: their documented JSON around a real model, on a port of this machine.

It pools the very last token it gets, as both engines do, so verdicts agree with those of the same guard on the local model
only if the client sends the right ids.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import torch

SGLANG, POOLING = "/v1/score", "/pooling"


class Engine:
    """A stand-in for both engines, with hooks to spoil a reply.

    Args:
        model, head: what it serves; they may be replaced.
        owner: what it calls itself in `/v1/models`.
        key: that requests must bring.
        port: 0 takes a free one.

    Attributes:
        limit: its `max_model_len`. lists: whether it has `/v1/models`.
    """

    def __init__(self, model: Any, head: Any, *, owner: str = "sglang", key: str | None = None, port: int = 0) -> None:
        self.model, self.head, self.owner, self.key = model, head, owner, key
        self.limit: int | None = 512
        self.lists = True
        self.in_flight, self.most_in_flight = 0, 0
        self.connections: set[socket.socket] = set()
        lock = threading.Lock()
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        # Statuses to answer before the first real answer.
        self.statuses: list[int] = []
        self.spoil: Callable[[dict[str, Any]], Any] = lambda reply: reply
        self.raw: Callable[[BaseHTTPRequestHandler], bool] = lambda handler: False
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                engine.connections.add(self.connection)

            def do_GET(self) -> None:
                if self.refused():
                    return
                card = {
                    "id": "rm",
                    "object": "model",
                    "created": 1,
                    "owned_by": engine.owner,
                    "max_model_len": engine.limit,
                }
                listed = json.dumps({"object": "list", "data": [card]}).encode()
                self.reply(*((200, listed) if engine.lists and self.path == "/v1/models" else (404, b"{}")))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.refused():
                    return
                with lock:
                    engine.in_flight += 1
                    engine.most_in_flight = max(engine.most_in_flight, engine.in_flight)
                try:
                    self.post(body)
                finally:
                    with lock:
                        engine.in_flight -= 1

            def refused(self) -> bool:
                if engine.key is None or self.headers["Authorization"] == f"Bearer {engine.key}":
                    return False
                self.reply(401, b'{"error": "Unauthorized"}')
                return True

            def post(self, body: Any) -> None:
                self.body = body
                engine.requests.append((self.path, body, dict(self.headers)))
                if engine.raw(self):
                    return
                status = engine.statuses.pop(0) if engine.statuses else 200
                answer = engine.answer(self.path, body) if status == 200 else {"error": {"message": str(body)}}
                self.reply(status, json.dumps(answer).encode())

            def reply(self, status: int, data: bytes, **headers: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """A client that gave up is what some tests are about."""

        self.server = Server(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def hidden(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model.model(torch.tensor([ids])).last_hidden_state[:, -1]

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        items = [body["query"] + item for item in body["items"]] if path == SGLANG else body["input"]
        hidden = [self.hidden(ids) for ids in items]
        tokens = sum(map(len, items))
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        with torch.inference_mode():
            rows = [self.head(h)[0].tolist() for h in hidden]
        if path == SGLANG:
            assert body["apply_softmax"] is body["item_first"] is False
            reply: dict[str, Any] = {"scores": rows, "model": "rm", "usage": usage, "object": "scoring"}
            reply["pooled_hidden_states"] = (
                [h[0].tolist() for h in hidden] if body["return_pooled_hidden_states"] else None
            )
        elif path == POOLING:
            assert (body["task"], body["encoding_format"]) == ("embed", "float")
            if body["use_activation"] is not False:
                hidden = [torch.nn.functional.normalize(h) for h in hidden]
            data = [{"index": i, "object": "pooling", "data": h[0].tolist()} for i, h in enumerate(hidden)]
            reply = {"id": "pool-1", "object": "list", "created": 1, "model": "rm", "data": data, "usage": usage}
        else:
            if body["use_activation"] is not False:
                rows = [torch.tensor(row).sigmoid().tolist() for row in rows]
            data = [{"index": i, "label": None, "probs": row, "num_classes": len(row)} for i, row in enumerate(rows)]
            reply = {"id": "classify-1", "object": "list", "created": 1, "model": "rm", "data": data, "usage": usage}
        return self.spoil(reply)

    def stop(self) -> None:
        """Close the port, and the connections that are open."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
