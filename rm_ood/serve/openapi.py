"""The OpenAPI document: schemas of requests and replies with the limits of this server, every refusal, examples that work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from rm_ood.serve import schemas
from rm_ood.serve.settings import ServeSettings

JSON = "application/json"
_REF = "#/components/schemas/{model}"

# Path -> (request, reply, examples of requests).
_SCORING: dict[str, tuple[TypeAdapter[Any], Any, Mapping[str, Any]]] = {
    "/v1/score": (
        schemas.SCORE,
        schemas.ScoreReply,
        {
            "one item": {"prompt": "What kind of music do you like?", "response": "I like all kinds of music."},
            "several answers": {"prompt": "How are you?", "responses": ["I am doing well.", "Fine, thanks."]},
            "several items": {
                "items": [
                    {"id": "a", "session": "user-7", "prompt": "How are you?", "response": "I am doing well."},
                    {"id": "b", "prompt": "How are you?", "responses": ["Fine, thanks.", "42"]},
                ]
            },
            "messages": {
                "messages": [
                    {"role": "user", "content": "How are you?"},
                    {"role": "assistant", "content": "I am doing well."},
                ]
            },
        },
    ),
    "/get_reward": (
        schemas.REWARD,
        schemas.RewardReply,
        {
            "one text": {
                "query": ["\n\nHuman: How are you?\n\nAssistant: I am doing well."],
                "prompts": ["\n\nHuman: How are you?\n\nAssistant:"],
                "labels": [None],
            }
        },
    ),
    "/classify": (
        schemas.CLASSIFY,
        schemas.ClassifyReply,
        {
            "a dialogue": {"input": "\n\nHuman: How are you?\n\nAssistant: I am doing well.", "use_activation": False},
            "messages": {
                "messages": [
                    {"role": "user", "content": "How are you?"},
                    {"role": "assistant", "content": "I am doing well."},
                ]
            },
        },
    ),
}
_OTHER: dict[str, tuple[Any, tuple[int, ...]]] = {
    "/v1/guard": (schemas.CardReply, ()),
    "/livez": (schemas.LiveReply, ()),
    "/readyz": (schemas.ReadyReply, (503,)),
    "/health": (schemas.ReadyReply, (503,)),
    "/healthz": (schemas.ReadyReply, (503,)),
}
_REFUSALS = {
    400: "not JSON, or not HTTP that can be read in one way",
    401: "no API key, or another one",
    403: "this address needs a key, and the server has none",
    408: "the request did not arrive in time",
    413: "the body is too large",
    415: "not application/json",
    421: "for another host than this server answers for",
    422: "not of the schema, a text that the guard does not take, or past a limit",
    429: "too much waits for the model: Retry-After says when to try again",
    500: "the items could not be scored",
    502: "the inference engine failed, or serves another reward model",
    503: "too many connections, or nothing to score with: Retry-After says when to try again",
    504: "the model did not answer in time",
}


def describe(app: FastAPI, settings: ServeSettings, allow_empty: bool) -> None:
    """Give the application its document, made on first use.

    Args:
        settings: whose limits and key it tells.
        allow_empty: the guard takes empty prompts.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, settings, allow_empty)
        return app.openapi_schema

    # FastAPI's own way of replacing it.
    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI, settings: ServeSettings, allow_empty: bool) -> dict[str, Any]:
    doc = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = doc.setdefault("components", {})
    found: dict[str, Any] = {}

    def schema(of: Any, limits: Callable[[Any], None] = lambda node: None) -> dict[str, Any]:
        adapter = of if isinstance(of, TypeAdapter) else TypeAdapter(of)
        own = adapter.json_schema(ref_template=_REF)
        limits(own)
        found.update(own.pop("$defs", {}))
        return own

    error = schema(schemas.ErrorReply)
    found["ErrorReply"] = error
    refusals = {status: _content(text, {"$ref": _REF.format(model="ErrorReply")}) for status, text in _REFUSALS.items()}
    for status in (429, 503):
        refusals[status]["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}
    for path, (request, reply, examples) in _SCORING.items():
        operation = doc["paths"][path]["post"]
        content = {
            "schema": schema(request, lambda node: _limit(node, settings, allow_empty)),
            "examples": {name: {"value": value} for name, value in examples.items()},
        }
        operation["requestBody"] = {"required": True, "content": {JSON: content}}
        operation["responses"] = {
            "200": _content("scored", schema(reply)), **{str(status): r for status, r in refusals.items()}
        }  # fmt: skip
    for path, operations in doc["paths"].items():
        for operation in operations.values():
            if path not in _SCORING:
                reply, statuses = _OTHER.get(path, (None, ()))
                if reply is not None:
                    shape = schema(reply)
                    operation["responses"] = {"200": _content("as it is", shape)}
                    operation["responses"] |= {str(status): _content("not ready", shape) for status in statuses}
                unready = {} if statuses else {"503": refusals[503]}
                if path == "/metrics":
                    operation["responses"] = {"200": {"description": "as it is", "content": {"text/plain": {}}}}
                operation["responses"] |= (
                    {**{str(status): refusals[status] for status in (401, 403, 421)}, **unready}
                    if path != "/livez"
                    else {}
                )
            operation["security"] = [] if path == "/livez" else [{"key": []}]
    if settings.api_key is not None:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    else:
        for operations in doc["paths"].values():
            for operation in operations.values():
                del operation["security"]
    components["schemas"] = dict(sorted(found.items()))
    return doc


def _content(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {JSON: {"schema": dict(schema)}}}


def _limit(node: Any, settings: ServeSettings, allow_empty: bool) -> None:
    """Write the server's limits into a request's schema."""
    if isinstance(node, list):
        for part in node:
            _limit(part, settings, allow_empty)
    if not isinstance(node, dict):
        return
    if allow_empty and node.get("pattern") == schemas.WORDS:
        del node["pattern"]
    if node.get("type") == "string" and not {"maxLength", "enum", "const"} & node.keys():
        node["maxLength"] = settings.max_chars
    # A list of anything, labels, is read by nobody.
    if node.get("type") == "array" and node.get("items"):
        node.setdefault("maxItems", settings.max_items)
    for part in node.values():
        _limit(part, settings, allow_empty)
