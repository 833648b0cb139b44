"""One replica of a Ray Serve deployment: the server's application, its guard, its end of the shared traffic monitor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from rm_ood.errors import InputError
from rm_ood.guard import OODGuard
from rm_ood.reward_model import load_reward_model
from rm_ood.serve import logs
from rm_ood.serve.app import build_app
from rm_ood.serve.behind_proxy import BehindProxy
from rm_ood.serve.gate import Receive, Send
from rm_ood.serve.refusal import Refusal
from rm_ood.serve.scorer import GuardScorer, Scorer
from rm_ood.serve.service import Service
from rm_ood.serve.settings import KEY_VARIABLE, ServeSettings, is_loopback
from rm_ood.serve.shared_traffic import LEASE_WAIT_S, Ask, SharedTraffic, Together, Watch
from rm_ood.serve.traffic import Traffic

# How often a replica hears of the alarm and shows its metrics.
_BEAT_S = 1.0
# For what a replica asks of the watch; a reply never waits for it.
_ASK_TIMEOUT_S = 5.0
# For its first question: the watch starts beside it, and may have to wait for the folder of the one before.
_JOIN_TIMEOUT_S = LEASE_WAIT_S + 30.0


@dataclass(frozen=True)
class Plan:
    """What each replica is made of, but for the guard.

    Attributes:
        model: folder or Hub id that every machine sees.
        settings: as for `rm-ood serve`.
        model_options: of `load_reward_model`. options: of `OODGuard.from_pretrained`.
    """

    model: str
    settings: ServeSettings
    model_options: Mapping[str, Any]
    options: Mapping[str, Any]


class ReplicaService(Service):
    """A service whose traffic and metrics are those of all replicas.

    Args:
        scorer, settings: as for `Service`.
        ask: the `Watch` of the deployment.
        replica: its name, in metrics.
    """

    def __init__(self, scorer: Scorer, settings: ServeSettings, ask: Ask, replica: str) -> None:
        self._call, self._replica = ask, replica
        super().__init__(scorer, replace(settings, monitor_state=None))

    def watching(self, scorer: Scorer, *, resume: bool) -> Traffic:
        """See `Service`; where it goes on from is the watch's own business."""
        return SharedTraffic(scorer, self.metrics, self._ask)

    async def _ask(self, method: str, *args: Any) -> Any:
        async with asyncio.timeout(_ASK_TIMEOUT_S):
            return await self._call(method, *args)

    async def join(self) -> None:
        """Hear how the alarm stands; what goes wrong is raised."""
        async with asyncio.timeout(_JOIN_TIMEOUT_S):
            self.served.traffic.state = await self._call("open", self.served.traffic.monitor)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            # What is being told when this ends is told to its end: `stop` waits for it.
            await asyncio.shield(self.served.traffic.save())
            try:
                await self._show("publish")
            except Exception as error:
                logs.log("metrics_not_told", level="error", error=type(error).__name__)

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """See `Service`; of all replicas, since nobody chooses which one answers."""
        try:
            found = await self._show("collected")
        except Exception as error:
            logs.log("metrics_not_told", level="error", error=type(error).__name__)
            # One replica's numbers in the place of all would look as if the others had counted backwards.
            raise Refusal(503, "metrics_unavailable", "the metrics of all replicas cannot be had", 5.0) from None
        return self.metrics.text(accept, Together(found))

    async def _show(self, method: str) -> Any:
        self.refresh()
        return await self._ask(method, self._replica, list(self.metrics.registry.collect()))


class Replica:
    """One replica: a reward model, its guard, and the server's application.

    Ray constructs it, asks for its application, and then names the guard (`reconfigure`), first and whenever it changes.

    Args:
        plan: what to load.
        watch: handle of the `Watch`.

    Raises:
        InputError: Ray's proxies listen where other machines reach them, and there is no key.
    """

    def __init__(self, plan: Plan, watch: Any) -> None:
        logs.configure()
        _check_proxies(plan.settings.api_key)
        self._plan = plan
        self._model, self._tokenizer = load_reward_model(plan.model, **plan.model_options)
        self._service: ReplicaService | None = None
        self._user_config: Any = None
        self._late = _LateApp(self._stop)

        async def ask(method: str, *args: Any) -> Any:
            return await getattr(watch, method).remote(*args)

        self._ask: Ask = ask

    async def __serve_build_asgi_app__(self) -> _LateApp:
        """What Ray calls with each request."""
        return self._late

    async def reconfigure(self, user_config: Any) -> None:
        """Serve the guard that `user_config` names: `{"guard": path}`; Ray updates one replica after the other.

        A replica that serves already goes on as it was where the new guard cannot be read or fails its checks
        (`rm_ood_guard_reloads_total{outcome="rolled_back"}`); one that starts does not come up. Ray calls this with the same
        `user_config` too, where a replica's rank changes: then nothing is done.
        """
        if self._service is None:
            self._service = await self._start(self._scorer(user_config))
        elif user_config != self._user_config:
            self._service.load = lambda: self._scorer(user_config)
            await self._service.reload()
        self._user_config = user_config

    def _scorer(self, user_config: Any) -> GuardScorer:
        known = isinstance(user_config, Mapping) and set(user_config) <= {"guard", "version"}
        if not known or not isinstance(user_config.get("guard"), str):
            raise InputError(
                "user_config: expected {guard: PATH}, and version: ANYTHING NEW to have the same path read anew, got "
                f"{type(user_config).__name__}"
            )
        guard = OODGuard.from_pretrained(user_config["guard"], self._model, self._tokenizer, **self._plan.options)
        return GuardScorer(guard, self._plan.settings.batch_size)

    async def _start(self, scorer: Scorer) -> ReplicaService:
        from ray import serve

        settings = self._plan.settings
        if settings.allowed_hosts or settings.api_key is None:
            # Ray's proxies answer for any name; this machine's own are allowed beside these.
            settings = replace(settings, allowed_hosts=(*settings.allowed_hosts, "localhost"))
        service = ReplicaService(scorer, settings, self._ask, serve.get_replica_context().replica_tag)
        await service.join()
        await service.start()
        app = build_app(scorer, settings, service=service)
        self._late.app = BehindProxy(app, has_key=settings.api_key is not None)
        return service

    async def _stop(self) -> None:
        if self._service is not None:
            await self._service.stop()

    async def check_health(self) -> None:
        """Raises what only another process mends: Ray starts one in the place of this one."""
        broken = ["user_config names no guard"] if self._service is None else self._service.broken()
        if broken:
            raise RuntimeError(", ".join(broken))


class _LateApp:
    """The application, once the guard is there; Ray asks for it, and starts it, before it names the guard."""

    def __init__(self, stop: Callable[[], Awaitable[None]]) -> None:
        self.app: BehindProxy | None = None
        self._stop = stop

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self._stop()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if self.app is None:
            raise RuntimeError("user_config names no guard")
        await self.app(scope, receive, send)


class RayWatch(Watch):
    """The watch as a deployment of one replica."""

    def __init__(self, folder: str | None, save_s: float) -> None:
        logs.configure()
        super().__init__(folder, save_s)

    async def __del__(self) -> None:
        await self.close()


def _check_proxies(api_key: bytes | None) -> None:
    # Where the proxies listen is an option of Ray's that an application is not told.
    from ray.serve.context import _get_global_client

    host = _get_global_client().http_config.host
    if api_key is None and host is not None and not is_loopback(host):
        raise InputError(
            f"Ray's proxies listen on {host}, which other machines reach: set a key (api_key_file=FILE, or {KEY_VARIABLE} where "
            "the application is built), or http_options: {host: 127.0.0.1}"
        )
