"""What every request passes before a route sees it, as one ASGI middleware: identity, key, limits, deadlines, the log."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from rm_ood.serve.logs import log
from rm_ood.serve.metrics import OTHER, SCORING
from rm_ood.serve.refusal import (
    EXCESS,
    KEY_NEEDED,
    Refusal,
    body_too_large,
    key_needed,
    other_host,
    slow_request,
    too_many_connections,
    unauthorized,
)
from rm_ood.serve.service import Service, refusal_of
from rm_ood.serve.settings import host_name, is_allowed_host, key_digest

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = "/livez"
# Nobody is there to read the reply any more.
CLIENT_GONE = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    ),
)


class Gate:
    """Middleware around the routes.

    Args:
        app: the routes.
        service: limits, metrics, connections.
        endpoints: paths that metrics and the log may name.
    """

    def __init__(self, app: App, service: Service, endpoints: frozenset[str]) -> None:
        self._app = app
        self._service = service
        self._endpoints = endpoints

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = _request_id(headers.get("x-request-id"))
        endpoint = scope["path"] if scope["path"] in self._endpoints else OTHER
        notes: dict[str, Any] = {}
        reply = _Reply(send, request_id)
        start = time.monotonic()
        metrics = self._service.metrics
        with (
            metrics.in_flight.track_inprogress(),
            self._service.tracing.request(_method(scope), endpoint, headers) as span,
        ):
            scope.setdefault("state", {}).update(request_id=request_id, notes=notes, span=span)
            try:
                await self._pass(scope, headers, receive, reply)
            except _Gone:
                reply.status = CLIENT_GONE
            except asyncio.CancelledError:
                reply.status = reply.status or CLIENT_GONE
                raise
            except Exception as error:
                notes["error"] = error.kind if isinstance(error, Refusal) else type(error).__name__
                if not reply.status:
                    await _answer(error, request_id)(scope, receive, reply)
            finally:
                took = time.monotonic() - start
                span.answered(reply.status)
                metrics.answered(endpoint, reply.status, took)
                self._log(_method(scope), endpoint, request_id, reply.status, took, notes)

    def _log(
        self, method: str, endpoint: str, request_id: str, status: int, took: float, notes: dict[str, Any]
    ) -> None:
        if endpoint in _QUIET and status == 200:
            return
        warns = self._service.settings.mode != "shadow" and notes.get("flagged")
        log(
            "request", level="error" if status == 500 else "warning" if warns else "info", request_id=request_id,
            method=method, endpoint=endpoint, status=status, ms=round(1000 * took, 2), **notes,
        )  # fmt: skip

    async def _pass(
        self, scope: MutableMapping[str, Any], headers: dict[str, str], receive: Receive, reply: _Reply
    ) -> None:
        settings = self._service.settings
        crowded = self._service.connections() > settings.max_connections
        if crowded and scope["state"].get(EXCESS) and scope["path"] != OPEN:
            raise too_many_connections()
        if "content-length" in headers and "transfer-encoding" in headers:
            raise Refusal(400, "ambiguous_length", "both Content-Length and Transfer-Encoding: send one", close=True)
        if scope["path"] != OPEN:
            if scope["state"].get(KEY_NEEDED):
                raise key_needed()
            if settings.allowed_hosts and not is_allowed_host(
                host_name(headers.get("host", "")), settings.allowed_hosts
            ):
                raise other_host()
            self._authorize(headers)
        if scope["method"] != "POST":
            await self._app(scope, receive, reply)
            return
        if scope["path"] in SCORING:
            # What would be turned away is not worth the reading.
            self._service.batcher.check(1)
        body = await self._body(headers, receive)
        await _while_connected(lambda again: self._app(scope, again, reply), body, receive)

    def _authorize(self, headers: dict[str, str]) -> None:
        wanted = self._service.settings.api_key
        if wanted is None:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Digests are of one length, and compared in constant time.
        if scheme.lower() != "bearer" or not hmac.compare_digest(key_digest(key), wanted):
            raise unauthorized()

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        limit, timeout_s = self._service.settings.max_body_bytes, self._service.settings.request_timeout_s
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise body_too_large(limit)
        parts, size = [], 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    part = message.get("body", b"")
                    size += len(part)
                    if size > limit:
                        raise body_too_large(limit)
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise slow_request(timeout_s) from None


def _answer(error: Exception, request_id: str) -> JSONResponse:
    """The reply to an error; whose frames, with the body in them, nobody holds once it is sent."""
    refusal = refusal_of(error)
    return JSONResponse(refusal.body(request_id), refusal.status, refusal.headers())


# Asked every few seconds; only what goes wrong is worth a line.
_QUIET = frozenset({"/livez", "/readyz", "/health", "/healthz", "/metrics"})
_METHODS = frozenset({"GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"})


class _Gone(Exception):
    """The client hung up."""


class _Reply:
    """`send`, with our headers, and the status that went out; 0 before."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._id = request_id.encode()
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *_HEADERS, (b"x-request-id", self._id)]
        await self._send(message)


async def _while_connected(call: Callable[[Receive], Awaitable[None]], body: bytes, receive: Receive) -> None:
    """Run a route on a whole body, and cancel it when the client hangs up."""
    read = False

    async def again() -> Message:
        nonlocal read
        if read:
            await asyncio.Event().wait()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def run() -> None:
        await call(again)

    route = asyncio.ensure_future(run())
    hung_up = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({route, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        if not route.done():
            raise _Gone
        await route
    finally:
        route.cancel()
        hung_up.cancel()
        await asyncio.gather(route, hung_up, return_exceptions=True)
        # An error of the route holds this frame: without this they would hold each other, and the body, until a collection.
        del route


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _request_id(given: str | None) -> str:
    """The sender's, where it is harmless; else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _method(scope: MutableMapping[str, Any]) -> str:
    return scope["method"] if scope["method"] in _METHODS else OTHER
