"""Verdicts on what a reward model returns: on its own output, and on calls that went around its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rm_ood.decision import Decisions
from rm_ood.errors import InputError


class Observation:
    """What `OODGuard.observe` saw; `decide` gives the verdicts after its block."""

    def __init__(self, decide: Callable[[Tensor | None], Decisions]) -> None:
        self._decide = decide

    def decide(self, rewards: Tensor | None = None) -> Decisions:
        """The verdicts.

        Args:
            rewards: (B,) what was made of the head's output, for the self-check; without them the head's own output at the
                read-out position counts as the reward and the reason `unchecked_read_out` says so.
        Raises:
            CaptureError: inside the block, before the head was called.
            InputError: no rewards, and a model whose reward is more than one column of its head's output.
        """
        return self._decide(rewards)


class _Tuple(tuple[Any, ...]):
    """A model's tuple with the verdicts on it."""

    ood: Decisions


class _Dict(dict[str, Any]):
    """A model's dictionary with the verdicts on it."""

    ood: Decisions


def with_verdicts(outputs: Any, decisions: Decisions) -> Any:
    """The model's own output with an attribute `ood`; plain tuples and dictionaries, which take none, as a subclass."""
    if type(outputs) in (tuple, list):
        outputs = _Tuple(outputs)
    elif type(outputs) is dict:
        outputs = _Dict(outputs)
    elif isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        outputs = type(type(outputs).__name__, (type(outputs),), {})(*outputs)
    try:
        object.__setattr__(outputs, "ood", decisions)
    except AttributeError as error:
        raise InputError(
            f"the model's output, a {type(outputs).__name__}, takes no attribute to carry the verdicts: call the model inside "
            "guard.observe(**inputs) instead"
        ) from error
    return outputs
