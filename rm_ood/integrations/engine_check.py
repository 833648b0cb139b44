"""Which engine answers at an address, and does it serve the reward model that the guard was fitted on?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rm_ood.canaries import CANARIES
from rm_ood.channels import FINAL
from rm_ood.errors import EngineError, InputError, MismatchError, UnavailableError
from rm_ood.identity import Canaries, compare
from rm_ood.integrations.engines import EngineReply, EngineScorer, SGLangScorer, VLLMScorer
from rm_ood.integrations.transport import JsonClient
from rm_ood.integrations.vllm_vectors import VLLMVectorScorer
from rm_ood.state import FittedState
from rm_ood.text import Encoded

KINDS: dict[str, type[EngineScorer]] = {"sglang": SGLangScorer, "vllm": VLLMScorer, "vllm-vectors": VLLMVectorScorer}
# Names that engines give themselves, in `owned_by` of the models they list.
_OWNERS = ("sglang", "vllm")
_LIST_BYTES = 2**20
# As between the distances of one model's canaries (`rm_ood.identity`), where the engine gives no vectors.
_DISTANCE_TOLERANCE = 0.1


def engine_models(url: str, **client: Any) -> list[dict[str, Any]]:
    """What the engine lists in `GET /v1/models`.

    Args:
        url, client: of `JsonClient`.
    Raises:
        UnavailableError: nobody answers. EngineError: no such list.
    """
    connection = JsonClient(url, **client)
    try:
        listed = connection.get("/v1/models", _LIST_BYTES).get("data")
    except UnavailableError:
        raise
    except EngineError as error:
        raise EngineError(f"{error} {_NAME_IT}") from error
    finally:
        connection.close()
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def engine_kind(models: list[dict[str, Any]]) -> str:
    """`"sglang"` or `"vllm"`, as `engine_models` say. Raises EngineError where they do not say one of them."""
    names = [one.get("owned_by") for one in models]
    found = [kind for kind in _OWNERS if kind in names]
    if len(found) != 1:
        raise EngineError(f"/v1/models names neither SGLang nor vLLM as the owner of its models. {_NAME_IT}")
    return found[0]


def engine_limit(models: list[dict[str, Any]], name: str | None) -> int | None:
    """Most tokens of an item, as `engine_models` say of the model of this name, or of any; None where they do not say."""
    limits = [one.get("max_model_len") for one in models if name is None or one.get("id") == name]
    return min((n for n in limits if isinstance(n, int)), default=None)


_NAME_IT = f"Say which engine it is (--engine-kind): one of {list(KINDS)}."


def canary_items(scorer: EngineScorer) -> list[Encoded]:
    """The canary texts, tokenised. Raises InputError where this guard's text path does not take them."""
    return [scorer.text.encode(prompt, response, "canary") for prompt, response in CANARIES]


def check_canaries(
    scorer: EngineScorer, state: FittedState, items: Sequence[Encoded], *, allow_dtype_change: bool = False
) -> tuple[str, ...]:
    """Ask the engine the canary texts, and compare its answers with those of the fitted model.

    Rewards are compared, and vectors, or distances where the engine gives no vectors; tolerances are those of
    `rm_ood.identity.compare`.

    Args:
        items: of `canary_items`.
        allow_dtype_change: accept what another dtype than that of the fit may do.
    Returns:
        `("dtype",)` where they differ by as much and it was accepted, else `()`: for `FittedState.overrides`.
    Raises:
        InputError: the guard keeps no canaries: nothing would tell another model from its own.
        MismatchError: another reward model, or one that gives the canaries no finite answers.
        EngineError: no answer.
    """
    saved = state.identity.canaries
    if saved is None:
        raise InputError(
            "this guard keeps no answers to the canary texts, so nothing would tell whether the engine serves its reward model: "
            "its reward model could not be asked them (fitting warns of it). Serve the guard with the model itself, without "
            "--engine, or fit it anew on a model that gives short texts finite rewards and vectors."
        )
    size = scorer.batch_size
    replies = [scorer.ask(items[i : i + size], state) for i in range(0, len(items), size)]
    rewards = np.concatenate([reply.rewards for reply in replies])
    scores = np.concatenate([reply.scores.scores for reply in replies])
    wrong = int(sum(reply.mismatched.sum() for reply in replies))
    if wrong or not (np.isfinite(rewards).all() and np.isfinite(scores).all()):
        what = f"{wrong} rewards are not those of their vectors" if wrong else "not all of them are finite numbers"
        raise MismatchError(f"the engine's answers to the canary texts: {what}. {_ANOTHER}")
    told = _difference(saved, replies, rewards, state, same_dtype=True)
    if told is None:
        return ()
    if allow_dtype_change and _difference(saved, replies, rewards, state, same_dtype=False) is None:
        return ("dtype",)
    raise MismatchError(
        f"the engine's answers to the canary texts are not those of the reward model that the guard was fitted on: {told}. "
        f"{_ANOTHER}"
    )


_ANOTHER = (
    "Serve that model, with the tokenizer's ids as they come, in the dtype of the fit (or accept another one: "
    "--allow-dtype-change), or fit a guard on the model that is served."
)


def _difference(
    saved: Canaries, replies: list[EngineReply], rewards: Any, state: FittedState, *, same_dtype: bool
) -> str | None:
    dtype = state.identity.fields["dtype"]
    dtypes = (dtype, dtype if same_dtype else "another")
    vectors = [reply.vectors for reply in replies if reply.vectors is not None]
    if vectors:
        return compare(saved, Canaries({FINAL: torch.cat(vectors)}, rewards), dtypes, state.distances)
    told = compare(saved, Canaries({}, rewards), dtypes, lambda _: np.empty((len(rewards), 0)))
    if told is not None or not same_dtype:
        return told
    column = replies[0].scores.channels.index(FINAL)
    distances = np.concatenate([reply.scores.scores[:, column] for reply in replies])
    expected = state.distances({FINAL: saved.vectors[FINAL]})[:, 0]
    gap = float(np.abs(distances / np.maximum(expected, 1e-300) - 1).max())
    if gap <= _DISTANCE_TOLERANCE:
        return None
    return f"they differ in distance of final by {100 * gap:.2g} % (tolerance {100 * _DISTANCE_TOLERANCE:g} %)"
