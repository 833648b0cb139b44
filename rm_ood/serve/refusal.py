"""Every way that a request is refused: status, a word for programs, a sentence for people; never the request's own text."""

from __future__ import annotations

import math
from dataclasses import dataclass

# In the state of a request whose connection was one past the limit when it was made.
EXCESS = "rm_ood_excess"
# In the state of a request that came in where other machines reach a server without a key.
KEY_NEEDED = "rm_ood_key_needed"


@dataclass(eq=False)
class Refusal(Exception):
    """A request that gets no scores.

    Attributes:
        status: of the reply.
        kind: the reply's `type`, from a fixed set.
        message: what was asked, what came, what to do.
        retry_after_s: when to try again, for 429 and 503.
        close: whether the connection ends with the reply.
    """

    status: int
    kind: str
    message: str
    retry_after_s: float | None = None
    close: bool = False

    def headers(self) -> dict[str, str]:
        """Of the reply."""
        found = {}
        if self.retry_after_s is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.close:
            found["connection"] = "close"
        return found

    def body(self, request_id: str) -> dict[str, str]:
        """Of the reply."""
        return {"error": self.message, "type": self.kind, "request_id": request_id}


def unauthorized() -> Refusal:
    return Refusal(401, "unauthorized", "an API key is needed: send the header Authorization: Bearer KEY")


def key_needed() -> Refusal:
    return Refusal(403, "key_needed", "this address asks for a key, and the server has none: start it with one")


def other_host() -> Refusal:
    return Refusal(
        421,
        "other_host",
        "the request's Host is none of this server's names: ask for 127.0.0.1 or localhost, or start it with --allowed-host NAME",
    )


def overloaded(waiting: int, retry_after_s: float) -> Refusal:
    return Refusal(429, "overloaded", f"{waiting} items wait for the model already: try again later", retry_after_s)


def no_model() -> Refusal:
    return Refusal(503, "no_model", "a thread that scoring needs has ended: the server must be started again", 1.0)


def stuck_model(timeout_s: float) -> Refusal:
    return Refusal(
        503,
        "model_stuck",
        f"the reward model has not answered for {timeout_s:g} s: try again later",
        min(timeout_s, 10.0),
    )


def too_many_connections() -> Refusal:
    return Refusal(503, "too_many_connections", "too many open connections: try again later", 1.0, close=True)


def body_too_large(limit: int) -> Refusal:
    return Refusal(413, "body_too_large", f"the body is larger than {limit} bytes: send fewer or shorter items")


def slow_request(timeout_s: float) -> Refusal:
    return Refusal(408, "request_timeout", f"the request did not arrive within {timeout_s:g} s")


def slow_model(timeout_s: float) -> Refusal:
    return Refusal(504, "model_timeout", f"the reward model did not answer within {timeout_s:g} s")


def internal() -> Refusal:
    return Refusal(500, "internal", "the request could not be scored; the server's log has its request_id")
