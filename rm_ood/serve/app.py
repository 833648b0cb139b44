"""The ASGI application: routes over a `Service`, inside a `Gate`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException

from rm_ood.artifact import package_version
from rm_ood.serve import policy
from rm_ood.serve.gate import Gate
from rm_ood.serve.openapi import describe
from rm_ood.serve.reading import classify_queries, reward_queries, score_queries
from rm_ood.serve.refusal import Refusal
from rm_ood.serve.scorer import Query, Scorer
from rm_ood.serve.service import Outcome, Service
from rm_ood.serve.settings import ServeSettings

FLAGGED = "RM-OOD-Flagged"
# FastAPI's own spans and logs tell paths, queries and the messages of exceptions; ours (rm_ood.serve.tracing) do not.
_NO_TELEMETRY: TelemetryConfig = {
    "tracing": False, "metrics": False, "logs": False, "operation_spans": False, "auto_configure": False,
}  # fmt: skip


def build_app(scorer: Scorer, settings: ServeSettings | None = None, *, service: Service | None = None) -> FastAPI:
    """The application that serves a scorer.

    Run it with `rm_ood.serve.server`, which adds the deadlines that need the connection itself.

    Args:
        scorer: `GuardScorer(guard)`, or another one.
        settings: limits, mode, key.
        service: one that was made before, of the same scorer; it is `app.state.service`.
    """
    shared = Service(scorer, settings or ServeSettings()) if service is None else service

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await shared.start()
        try:
            yield
        finally:
            await shared.stop()

    app = FastAPI(
        title="rm_ood", version=package_version(), docs_url=None, redoc_url=None, lifespan=life, telemetry=_NO_TELEMETRY,
        # A redirect would say the caller's own Host.
        redirect_slashes=False,
        description="Rewards, and whether the reward model was out of its ground.",
    )  # fmt: skip
    app.state.service = shared
    app.add_exception_handler(HTTPException, _not_a_route)
    app.add_exception_handler(RequestValidationError, _not_a_route)
    _scoring_routes(app, shared)
    _other_routes(app, shared)
    describe(app, shared.settings, shared.rules().allow_empty)
    endpoints = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(Gate, service=shared, endpoints=endpoints)
    return app


def _scoring_routes(app: FastAPI, service: Service) -> None:
    settings = service.settings

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        """Rewards and verdicts: one item, several, or one prompt with several answers."""
        queries = score_queries(await _json(request), service.rules(), settings.max_body_bytes)
        served = service.served
        outcomes = await _decide(request, service, queries)
        body = {
            "results": [policy.row(q.name, o.decision, settings.mode) for q, o in zip(queries, outcomes, strict=True)],
            "monitor": served.traffic.row(),
            "mode": settings.mode,
            "guard": served.scorer.digest,
            "request_id": request.state.request_id,
        }
        return JSONResponse(body, headers=_flags(settings.mode, outcomes))

    @app.post("/get_reward")
    async def get_reward(request: Request) -> Response:
        """OpenRLHF's remote reward model: rewards, and verdicts to log."""
        data, limit = await _json(request), settings.max_body_bytes
        queries = await service.read(reward_queries, data, service.rules(), limit, service.scorer.split)
        scorer = service.scorer
        outcomes = await _decide(request, service, queries)
        decisions = [outcome.decision for outcome in outcomes]
        rewards = [policy.number(d, settings.mode, _withheld(scorer, settings)) for d in decisions]
        logs = {
            "ood_is_ood": [float(d.is_ood) for d in decisions],
            "ood_p_value": [d.p_value for d in decisions],
            "ood_withheld": [float(policy.is_withheld(d, settings.mode)) for d in decisions],
            **{f"ood_{axis}_p_value": [d.axes[axis].p_value for d in decisions] for axis in decisions[0].axes},
        }
        body = {"rewards": rewards, "scores": rewards, "extra_logs": logs}
        return JSONResponse(body, headers=_flags(settings.mode, outcomes))

    @app.post("/classify")
    async def classify(request: Request) -> Response:
        """vLLM's classification reply: per item flag, p-value, and last the reward."""
        data, limit = await _json(request), settings.max_body_bytes
        queries, model = await service.read(classify_queries, data, service.rules(), limit, service.scorer.split)
        scorer = service.scorer
        outcomes = await _decide(request, service, queries)
        rows = []
        for i, d in enumerate(outcome.decision for outcome in outcomes):
            probs = [float(d.is_ood), d.p_value, policy.number(d, settings.mode, _withheld(scorer, settings))]
            rows.append({"index": i, "label": "ood" if d.is_ood else "in", "probs": probs, "num_classes": len(probs)})
        tokens = sum(outcome.tokens for outcome in outcomes)
        body = {
            "id": f"classify-{request.state.request_id}",
            "object": "list",
            "created": int(time.time()),
            "model": model,
            "data": rows,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }
        return JSONResponse(body, headers=_flags(settings.mode, outcomes))


async def _decide(request: Request, service: Service, queries: Sequence[Query]) -> list[Outcome]:
    """Verdicts, with what the metrics, the log and the trace say of a request."""
    outcomes = await service.decide(queries)
    decisions = [outcome.decision for outcome in outcomes]
    flagged = sum(d.is_ood for d in decisions)
    request.state.notes.update(items=len(queries), flagged=flagged, tokens=sum(o.tokens for o in outcomes))
    service.metrics.withheld.inc(sum(policy.is_withheld(d, service.settings.mode) for d in decisions))
    request.state.span.verdicts(decisions)
    return outcomes


def _withheld(scorer: Scorer, settings: ServeSettings) -> float:
    return scorer.withheld_reward if settings.withheld_reward is None else settings.withheld_reward


def _flags(mode: str, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The header that warns."""
    flagged = sum(outcome.decision.is_ood for outcome in outcomes)
    return {} if mode == "shadow" else {FLAGGED: f"{flagged}/{len(outcomes)}"}


def _other_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/guard")
    async def guard() -> Response:
        """The guard card: what it was fitted on, and what it promises."""
        return JSONResponse({"digest": service.scorer.digest, **service.scorer.card.to_dict()})

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """The guard card as a page."""
        return HTMLResponse(service.scorer.card.to_html())

    @app.get("/livez")
    async def livez() -> Response:
        """The process answers; the model is not asked."""
        return JSONResponse({"live": True})

    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether to send requests here, and if not, why."""
        reasons = service.unready()
        return JSONResponse({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    app.get("/health", description="As /readyz.")(readyz)
    app.get("/healthz", description="As /readyz.")(readyz)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        text, content_type = await service.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})


async def _json(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "not_json", "the header Content-Type must be application/json")
    return await request.body()


async def _not_a_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 422
    known = {404: ("not_found", "no such path"), 405: ("method_not_allowed", "this path has another method")}
    kind, message = known.get(status, ("invalid_request", "the request cannot be read"))
    headers = dict(getattr(error, "headers", None) or {})
    return JSONResponse(Refusal(status, kind, message).body(request.state.request_id), status, headers)
