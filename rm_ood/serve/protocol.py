"""uvicorn's HTTP/1.1 protocol with deadlines on what the other side owes: a request's head, a body's rest, a reply's reader.

uvicorn bounds the time between requests, not that of a request: a client that sends one byte now and then holds its
connection for ever.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from rm_ood.serve.refusal import EXCESS, Refusal, slow_request

HEAD_BYTES = 64 * 1024
# A line feed without carriage return: lenient parsers behind a proxy and strict ones before it tell requests apart
# differently.
_BARE_LF = re.compile(rb"(?<!\r)\n")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
# How long a body that nobody wants is read on, so that its sender sees the reply.
_LINGER_S = 2.0
# Connections past the limit are answered 503; past this many times the limit they are closed at once.
_FLOOD = 4


class DeadlineProtocol(H11Protocol):
    """One connection. Class attributes are set by the server.

    Attributes:
        request_timeout_s: to receive a request's head, and for a reader to take a reply.
        max_connections: open at once.
        refused: told of what is refused here, before the application sees it; gives the reply's request id.
    """

    request_timeout_s = 10.0
    max_connections = 128
    refused: Callable[[Refusal], str] = staticmethod(lambda refusal: "")

    _timer: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection owes a head."""
        super().connection_made(transport)
        # A reply is two writes, and asyncio sets this only on sockets whose protocol number is given: without it the second
        # waits some 40 ms for the other side.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > _FLOOD * self.max_connections:
            transport.abort()
            return
        if len(self.connections) > self.max_connections:
            # Those that were there before go on.
            self.app_state = {**self.app_state, EXCESS: True}
        self._expect(self.request_timeout_s, self._slow_head)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is owed any more."""
        self._settle()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The first bytes of a head begin its time."""
        if self.conn.their_state is h11.IDLE and self._timer is None:
            self._expect(self.request_timeout_s, self._slow_head)
        super().data_received(data)

    def handle_events(self) -> None:
        """Refuse a head that is too long or could be read in two ways, before h11 reads it."""
        if self.conn.their_state is h11.IDLE:
            waiting = bytes(self.conn.trailing_data[0])
            end = _HEAD_END.search(waiting)
            if end is not None and end.end() > HEAD_BYTES:
                self._refuse(Refusal(431, "head_too_large", f"the head is larger than {HEAD_BYTES} bytes"))
                return
            if end is not None and _BARE_LF.search(waiting, 0, end.end()):
                self._refuse(Refusal(400, "invalid_http", "a line of the head does not end in CRLF"))
                return
        super().handle_events()
        if self.conn.their_state is not h11.IDLE and self._timer is not None and not self._lingers:
            self._settle()

    @property
    def _lingers(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete and self.conn.their_state is h11.SEND_BODY

    def on_response_complete(self) -> None:
        """After a reply that did not wait for the body, its rest is read for a moment."""
        super().on_response_complete()
        if self._lingers and not self.transport.is_closing():
            self._expect(_LINGER_S, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, in the form of every other error."""
        self._refuse(Refusal(400, "invalid_http", "this is not an HTTP/1.1 request that can be read"))

    def pause_writing(self) -> None:
        """The reader is slow."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self.request_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _expect(self, seconds: float, otherwise: Any) -> None:
        self._settle()
        self._timer = self.loop.call_later(seconds, otherwise)

    def _settle(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _slow_head(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._refuse(slow_request(self.request_timeout_s))

    def _refuse(self, refusal: Refusal) -> None:
        self._settle()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        request_id = self.refused(refusal)
        body = json.dumps(refusal.body(request_id)).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers.append((b"x-request-id", request_id.encode()))
        headers.append((b"content-length", str(len(body)).encode()))
        for event in (
            h11.Response(status_code=refusal.status, headers=headers, reason=b""),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
