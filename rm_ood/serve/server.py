"""Run the application: uvicorn with deadlines, signals, a drain that ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import uvicorn

from rm_ood.serve.app import build_app
from rm_ood.serve.logs import log
from rm_ood.serve.metrics import OTHER
from rm_ood.serve.protocol import HEAD_BYTES, DeadlineProtocol
from rm_ood.serve.refusal import Refusal
from rm_ood.serve.scorer import Scorer
from rm_ood.serve.service import Service
from rm_ood.serve.settings import ServeSettings, check_host


class Server(uvicorn.Server):
    """One server.

    Args:
        scorer: what it serves.
        settings: limits, mode, key.
        host, port: where; port 0 takes a free one.
        load: makes the scorer anew on SIGHUP; None: SIGHUP changes nothing.
        asked: set where a SIGHUP came before (see `rm_ood.serve.hangup`).

    Raises:
        InputError: an address that other machines reach, and no key. OSError: the port is taken.
    """

    def __init__(
        self,
        scorer: Scorer,
        settings: ServeSettings,
        host: str = "127.0.0.1",
        port: int = 8000,
        load: Callable[[], Scorer] | None = None,
        asked: threading.Event | None = None,
    ) -> None:
        check_host(host, settings.api_key)
        if settings.allowed_hosts or settings.api_key is None:
            settings = replace(settings, allowed_hosts=(*settings.allowed_hosts, host))
        self.service = Service(scorer, settings)
        self.service.load = load
        self._asked = threading.Event() if asked is None else asked
        self._reloads: set[asyncio.Task[bool]] = set()
        self.service.connections = lambda: len(self.server_state.connections)
        protocol = type(
            "Protocol",
            (DeadlineProtocol,),
            {
                "request_timeout_s": settings.request_timeout_s,
                "max_connections": settings.max_connections,
                "refused": staticmethod(self._refused),
            },
        )
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.create_server((host, port), family=family, backlog=1024)
        self.host, self.port = host, self.socket.getsockname()[1]
        super().__init__(
            uvicorn.Config(
                build_app(scorer, settings, service=self.service),
                http=protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s)),
                h11_max_incomplete_event_size=HEAD_BYTES,
            )
        )

    @property
    def url(self) -> str:
        """Where it answers."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def _refused(self, refusal: Refusal) -> str:
        """Count and log what no route sees; its request id."""
        request_id = secrets.token_hex(16)
        self.service.metrics.answered(OTHER, refusal.status, 0.0)
        log("refused", request_id=request_id, status=refusal.status, error=refusal.kind)
        return request_id

    def summary(self) -> dict[str, Any]:
        """What was served, JSON-able."""
        return {"guard": self.service.scorer.digest, "requests": self.server_state.total_requests}

    def serve_forever(self) -> None:
        """Serve until SIGTERM or SIGINT, then answer what was accepted."""
        _freeze()
        log("listening", url=self.url, guard=self.service.scorer.digest[:12], mode=self.service.settings.mode)
        self.run(sockets=[self.socket])
        log("stopped")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving; unlike uvicorn's, a handled one does not end the process afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers: dict[int, Callable[[int, FrameType | None], Any]] = {
            signal.SIGTERM: self.handle_exit,
            signal.SIGINT: self.handle_exit,
        }
        if hasattr(signal, "SIGHUP"):
            loop = asyncio.get_running_loop()
            handlers[signal.SIGHUP] = lambda *_: loop.call_soon_threadsafe(self.reload)
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        if self._asked.is_set():
            log("hangup_kept")
            self.reload()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def reload(self) -> None:
        """Load the guard anew and put it in the place of this one; in the event loop."""
        task = asyncio.get_running_loop().create_task(self._reload(), name="rm-ood-reload")
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> bool:
        replaced = await self.service.reload()
        if gc.get_freeze_count():
            gc.unfreeze()
            _freeze()
        return replaced

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; a second SIGINT does not wait."""
        self.service.draining = True
        super().handle_exit(sig, frame)


def _freeze() -> None:
    """Leave what is loaded out of garbage collections: of a model and its libraries one takes a tenth of a second and more,
    in which nobody is answered."""
    gc.collect()
    gc.freeze()
