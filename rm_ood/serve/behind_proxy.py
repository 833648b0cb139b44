"""What the application needs where another server takes the connections: paths and headers as if it stood alone, and a key."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from rm_ood.serve.gate import App, Message, Receive, Send
from rm_ood.serve.refusal import KEY_NEEDED
from rm_ood.serve.settings import is_loopback


class BehindProxy:
    """Around the application, with its `Gate`; for HTTP requests alone.

    A request that came in at an address which other machines reach is refused where there is no key. The proxy writes
    `X-Request-Id` itself, so that ours would be there twice; and it may serve the application under a prefix.

    Args:
        app: the application.
        has_key: whether it asks for a key.
    """

    def __init__(self, app: App, has_key: bool) -> None:
        self._app = app
        self._has_key = has_key

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request."""
        prefix = scope.get("root_path", "").rstrip("/")
        path = scope["path"].removeprefix(prefix) or "/"
        exposed = not self._has_key and not is_loopback((scope.get("server") or ("",))[0])

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        own = {"path": path, "root_path": "", "raw_path": path.encode()}
        state = {**scope.get("state", {}), KEY_NEEDED: exposed}
        await self._app({**scope, **own, "state": state}, receive, reply)
