"""What the sender and readiness are told of an inference engine that gives nothing to score."""

from __future__ import annotations

from rm_ood.errors import MismatchError, UnavailableError
from rm_ood.serve.refusal import Refusal

# By the refusal's kind.
PROBLEMS = {
    "engine_unavailable": "engine cannot be reached",
    "engine_timeout": "engine does not answer in time",
    "engine_failed": "engine fails",
    "engine_mismatch": "engine serves another reward model",
}


def unavailable() -> Refusal:
    return Refusal(503, "engine_unavailable", "the inference engine cannot be reached: try again later", 5.0)


def engine_refusal(error: Exception) -> Refusal:
    """What the sender is told of an engine that gives nothing to score; never its address or its words."""
    if isinstance(error, UnavailableError) and error.why == "busy":
        asked = 1.0 if error.retry_after_s is None else error.retry_after_s
        return Refusal(503, "engine_busy", "the inference engine is busy: try again later", asked)
    if isinstance(error, UnavailableError) and error.why == "unreachable":
        return unavailable()
    if isinstance(error, UnavailableError) and error.why == "timeout":
        return Refusal(504, "engine_timeout", "the inference engine did not answer in time", 1.0)
    if isinstance(error, MismatchError):
        message = "the inference engine does not serve the reward model that the guard was fitted on"
        return Refusal(502, "engine_mismatch", message, 5.0)
    return Refusal(502, "engine_failed", "the inference engine failed, or its answer cannot be used", 5.0)
