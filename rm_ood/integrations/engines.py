"""Rewards from an inference engine, verdicts from a guard without a model: clients for SGLang and vLLM.

Both engines serve sequence classifiers over HTTP. They get the token ids that the guard's own text path makes, and give
the final vector (SGLang) or its distances (vLLM with the plugin of `rm_ood.integrations.vllm_plugin`), so the guard
judges by its channel `final`. README.md beside this file: how to start them, and what each cannot do.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, overload

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from rm_ood.calls import read_call
from rm_ood.channels import FINAL
from rm_ood.decision import Decision, Decisions
from rm_ood.dialogue import Response, Text
from rm_ood.embed import Embedded, merge, span_facts
from rm_ood.errors import EngineError, InputError, MismatchError
from rm_ood.fingerprint import text_fingerprint
from rm_ood.guard import OODGuard
from rm_ood.integrations.read_out import RewardHead, read_head
from rm_ood.integrations.transport import JsonClient, number_rows
from rm_ood.integrations.vllm_plugin import UNSCORABLE, distance_columns, guard_number
from rm_ood.reward_model import reward_column
from rm_ood.skew import EndsCheck, encode_items
from rm_ood.state import ChannelScores, FittedState
from rm_ood.text import NO_LIMIT, Encoded, TextEncoder

Floats = NDArray[np.float64]
# Room in a reply: for its frame, and per item and number. A float64 takes at most 25 characters.
_FRAME_BYTES = 2**16
_ITEM_BYTES = 2**10
_NUMBER_BYTES = 32


@dataclass(frozen=True)
class EngineReply:
    """What an engine says of n items.

    Attributes:
        scores: raw channel scores. rewards: (n,).
        mismatched: (n,) bool, whether a reward is not that of its vector.
        vectors: (n, H) float32, where the engine gives them.
    """

    scores: ChannelScores
    rewards: Floats
    mismatched: NDArray[np.bool_]
    vectors: torch.Tensor | None = None


class EngineScorer(ABC):
    """What the clients of both engines share; use `SGLangScorer` or `VLLMScorer`.

    The engines pool the very last token they get; transformers pools the rightmost token whose id is not the pad id. Where
    the pad token is the end token, these differ for every text that ends in it, so trailing pad ids are not sent.

    Args:
        url: the engine's address, `http://host:port`.
        guard: a fitted and calibrated guard whose verdict has the channel `final`; it needs no model.
        tokenizer: the reward model's fast tokenizer.
        model: name that the engine serves the model under; None for its only one.
        max_length: the model's own limit in tokens, for a guard fitted without `max_length` on a model whose limit is below
            the tokenizer's.
        pad_id: the model's pad id where the guard does not know it; None takes the guard's, else the tokenizer's.
        batch_size: items in a request.
        headers: sent with every request, such as `{"Authorization": "Bearer ..."}`.
        timeout, whole_s, retries, patience: see `JsonClient`.

    Raises:
        NotFittedError: the guard is not fitted or not calibrated.
        MismatchError: another tokenizer, template, length limit or pad id than the guard was fitted with.
        InputError: a guard that an engine cannot serve (text pairs, a read-out at the first token, no `final`).
    """

    def __init__(
        self,
        url: str,
        guard: OODGuard,
        tokenizer: Any,
        *,
        model: str | None = None,
        max_length: int | None = None,
        pad_id: int | None = None,
        batch_size: int = 64,
        headers: Mapping[str, str] | None = None,
        **client: Any,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size={batch_size!r}: expected a positive integer")
        state = guard.state
        state.profile(state.config.joined)
        _check_servable(state)
        self.guard = guard
        self.model = model
        self.batch_size = batch_size
        self._cut_id = _cut_id(state, tokenizer, pad_id)
        self.text = _text(state, tokenizer, max_length)
        ends = state.record.get("ends")
        self._ends = None if ends is None else EndsCheck(ends, tokenizer, state.config.text_format)
        self._client = JsonClient(url, headers=headers, **client)

    @overload
    def check(
        self, prompt: Text, response: str, groups: Sequence[str] | None = None, progress: bool = False
    ) -> Decision: ...
    @overload
    def check(
        self,
        prompt: Sequence[Any],
        response: Sequence[Any],
        groups: Sequence[str] | None = None,
        progress: bool = False,
    ) -> Decisions: ...
    def check(
        self, prompt: Any, response: Any, groups: Sequence[str] | None = None, progress: bool = False
    ) -> Decision | Decisions:
        """Reward and verdict of one item, or of many; the call forms are those of `OODGuard.check`.

        Verdicts are those of the channel `final` alone. The traffic alarm is not fed.

        Raises:
            EngineError: the engine did not answer with what was asked; nothing is scored.
            MismatchError: vectors of another width, or distances of another guard.
            InputError: names the field, what came, and the remedy.
        """
        state = self.guard.state
        state.profile(state.config.joined)
        call = read_call(prompt, response, state.config)
        if not call.items:
            return state.nothing()
        items = self.encode(call.items)
        scores: list[ChannelScores] = []
        parts: list[Embedded] = []
        with tqdm(total=len(items), desc="check", unit="item", disable=not progress) as bar:
            for start in range(0, len(items), self.batch_size):
                scored, part = self.score(items[start : start + self.batch_size], state)
                scores.append(scored)
                parts.append(part)
                bar.update(len(part.rewards))
        part = merge(parts, np.arange(len(items)))
        decisions = state.decide(ChannelScores.concatenate(scores), part, groups=groups, prompt_index=call.prompt_index)
        return decisions[0] if call.is_single else decisions

    def encode(self, items: Sequence[tuple[Text, Response]]) -> list[Encoded]:
        """Token ids and spans of n items, as `rm_ood.scoring.Scoring.encode` gives them.

        Raises:
            InputError: an item that cannot be encoded; names it as `items[i]`.
        """
        return encode_items(self.text, items, self._ends)

    def ask(self, encoded: Sequence[Encoded], state: FittedState) -> EngineReply:
        """What the engine says of n items, at least one, in one request. Raises EngineError and MismatchError as `check`."""
        return self._ask([self._sent(item.input_ids) for item in encoded], state)

    def score(self, encoded: Sequence[Encoded], state: FittedState) -> tuple[ChannelScores, Embedded]:
        """The same as `FittedState.decide` takes it."""
        reply = self.ask(encoded, state)
        # What is not finite, `decide` sees in the scores.
        failed = ["read_out_mismatch" if wrong else None for wrong in reply.mismatched]
        lengths, reasons, truncated = span_facts(encoded)
        return reply.scores, Embedded({}, reply.rewards, lengths, list(failed), reasons, truncated)

    def close(self) -> None:
        """Close the connections; a second call does nothing."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sent(self, ids: list[int]) -> list[int]:
        """The ids up to the token whose vector the guard knows, which an engine takes to be the last one."""
        end = len(ids)
        while end > 1 and ids[end - 1] == self._cut_id:
            end -= 1
        # Nothing but pad ids: transformers reads position 0.
        return ids[:end]

    @abstractmethod
    def _ask(self, ids: list[list[int]], state: FittedState) -> EngineReply:
        """The reply to one request, read and checked."""

    def _post(self, path: str, body: dict[str, Any], ids: list[list[int]], numbers: int) -> dict[str, Any]:
        """The reply to a request, which is to hold at most `numbers` numbers per item."""
        if self.model is not None:
            body["model"] = self.model
        reply = self._client.post(path, body, _FRAME_BYTES + len(ids) * (_ITEM_BYTES + numbers * _NUMBER_BYTES))
        usage = reply.get("usage")
        read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        sent = sum(map(len, ids))
        if read != sent:
            raise EngineError(
                f"{path}: {sent} tokens were sent, the engine counts {read} (usage.prompt_tokens). It packs items into one "
                "sequence (SGLang: start without --enable-mis), adds or cuts tokens, or is too old to count them: its vectors "
                "are not those of these items."
            )
        return reply


class SGLangScorer(EngineScorer):
    """Rewards and final vectors from SGLang's `/v1/score`, verdicts from the guard.

    Takes the arguments of `EngineScorer`, and:

    Args:
        head: `(weight, bias)` of the reward head, a checkpoint folder with safetensors, or what `read_head` made of one: every
            reward is then recomputed from its vector, and an item whose reward is another one is flagged, with the reason
            `read_out_mismatch`.

    Raises:
        InputError, MismatchError: as `EngineScorer`, and a head that cannot be read, or another one than was fitted on.
    """

    def __init__(self, url: str, guard: OODGuard, tokenizer: Any, *, head: Any = None, **options: Any) -> None:
        self._head = head if head is None or isinstance(head, RewardHead) else read_head(head, guard.state)
        super().__init__(url, guard, tokenizer, **options)

    def _ask(self, ids: list[list[int]], state: FittedState) -> EngineReply:
        # The engine reads query + item for each item: with an empty query that is the item, and its own prefix cache finds
        # what items share.
        body = {
            "query": [], "items": ids, "return_pooled_hidden_states": True, "apply_softmax": False, "item_first": False,
        }  # fmt: skip
        width = state.detectors[FINAL].n_features_in_
        reply = self._post("/v1/score", body, ids, width + _ITEM_BYTES)
        vectors = reply.get("pooled_hidden_states")
        if vectors is None or (isinstance(vectors, list) and any(v is None for v in vectors)):
            raise EngineError(
                "/v1/score: the reply has no pooled_hidden_states. SGLang fills them from pull request 22427 (April 2026) on, "
                "for Llama, Qwen2, Qwen3 and Gemma2 ForSequenceClassification and InternLM2, Qwen2 and Qwen3 ForRewardModel, "
                "and not for cross-encoders such as BERT and RoBERTa."
            )
        hidden = number_rows(vectors, len(ids), "pooled_hidden_states")
        if hidden.shape[1] != width:
            raise MismatchError(
                f"/v1/score: pooled_hidden_states have {hidden.shape[1]} features, the guard was fitted on {width}: another "
                "reward model is served here"
            )
        scores = number_rows(reply.get("scores"), len(ids), "scores")
        rewards = _reward(scores, state.config.reward)
        with np.errstate(over="ignore"):
            final = torch.from_numpy(hidden.astype(np.float32))
        wrong = np.zeros(len(ids), dtype=bool)
        if self._head is not None:
            # What is not finite has its own reason.
            finite = np.isfinite(final.numpy()).all(1) & np.isfinite(rewards)
            wrong = self._head.disagrees(final, torch.from_numpy(rewards)).numpy() & finite
        return EngineReply(state.score({FINAL: final}, rewards), rewards, wrong, final)


class VLLMScorer(EngineScorer):
    """Rewards and distances from vLLM's `/classify` under the plugin `rm_ood.integrations.vllm_plugin`, ranked by the guard.

    The plugin serves the distances of a saved guard; this client ranks them by the calibration of the guard it was given,
    which has to be the same fit (the reply says which it is). Takes the arguments of `EngineScorer`.
    """

    def _ask(self, ids: list[list[int]], state: FittedState) -> EngineReply:
        detector = state.detectors[FINAL]
        columns = (*distance_columns(detector), "guard", "reward")
        reply = self._post("/classify", {"input": ids, "use_activation": False}, ids, _ITEM_BYTES)
        table = indexed_rows(reply, len(ids), "/classify", "probs")
        if table.shape[1] != len(columns) or not (table[:, -2] == -float(guard_number(detector))).all():
            raise MismatchError(
                f"/classify: expected the numbers {columns} of this guard, got {table.shape[1]} others. Start vLLM with "
                "RM_OOD_GUARD set to this saved guard (or VLLM_PLUGINS naming rm_ood), and without logit_mean, logit_sigma and "
                "an activation."
            )
        distances = table[:, :-2]
        # NaN is neither; a row without one of its distances has none.
        whole = ((distances >= 0) & (distances < UNSCORABLE)).all(1, keepdims=True)
        distances = np.where(whole, distances, np.inf)
        rewards = table[:, -1]
        return EngineReply(state.score_distances({FINAL: distances}, rewards), rewards, np.zeros(len(ids), dtype=bool))


def indexed_rows(reply: Mapping[str, Any], n: int, path: str, field: str) -> Floats:
    """n rows of numbers of one length, (n, m), from vLLM's list `data`, whose rows say which item is theirs.

    Raises:
        EngineError: no such list, not each item once, or what is no number.
    """
    data = reply.get("data")
    if not isinstance(data, list) or any(not isinstance(row, dict) for row in data):
        raise EngineError(f"{path}: the reply has no list of objects `data`: is this vLLM?")
    by_index = {row.get("index"): row.get(field) for row in data if isinstance(row.get("index"), int)}
    if len(data) != n or sorted(by_index) != list(range(n)):
        raise EngineError(f"{path}: {n} items were sent, {len(data)} came back, or not each of them once")
    return number_rows([by_index[i] for i in range(n)], n, field)


def _check_servable(state: FittedState) -> None:
    c = state.config
    if FINAL not in c.joined:
        raise InputError(
            f"an engine gives final vectors only, and this guard's verdict is joined from {list(c.joined)}: load it with "
            "channels='final'"
        )
    if c.text_format == "pair":
        raise InputError(
            "this guard reads text pairs, whose segments the engines' token ids cannot carry: serve it with OODGuard"
        )
    rule = _rule(state)
    if rule not in ("auto", "non_pad", "last_token"):
        raise InputError(
            f"this guard reads its vector by read_out={rule!r}, the engines pool the last token they get: serve it with "
            "OODGuard"
        )


def _rule(state: FittedState) -> str:
    """The read-out rule that the fitted model went by, its class' own where the settings left it open."""
    own = state.config.read_out
    return state.identity.fields.get("read_out", own) if own == "auto" else own


def _cut_id(state: FittedState, tokenizer: Any, pad_id: int | None) -> int | None:
    """The id that does not count at the end of an item, or None."""
    if _rule(state) == "last_token":
        return None
    known = state.identity.fields.get("pad_token_id")
    if known is None:
        found: int | None = tokenizer.pad_token_id if pad_id is None else pad_id
        return found
    fitted = None if known == "None" else int(known)
    if pad_id is not None and pad_id != fitted:
        raise MismatchError(
            f"pad_id={pad_id}: the guard was fitted on a model whose pad id is {known}. Leave pad_id out."
        )
    return fitted


def _text(state: FittedState, tokenizer: Any, max_length: int | None) -> TextEncoder:
    """The guard's own text path, as far as tokenizer and limit are those that it was fitted with."""
    c = state.config
    text = TextEncoder(
        tokenizer,
        c.text_format,
        max_length=c.max_length if max_length is None else max_length,
        on_too_long=c.on_too_long,
        split_special_tokens=c.split_special_tokens,
        append_eos=c.append_eos,
        special_tokens=c.special_tokens,
        suffix=tuple(int(i) for i in state.identity.fields.get("suffix", "").split()),
    )
    found = text_fingerprint(tokenizer, text.contract())
    wrong = [name for name, value in found.items() if state.identity.fields.get(name, value) != value]
    if wrong == ["text"]:
        fitted = json.loads(state.identity.fields["text"])["max_length"]
        here = "the tokenizer names none" if text.max_length == NO_LIMIT else f"not max_length={text.max_length}"
        raise MismatchError(
            f"the guard was fitted with a limit of {fitted} tokens, {here}. Pass the reward model's own "
            "(max_position_embeddings of its config) as max_length= (for rm-ood serve, put its config.json into the --model "
            "folder), or fit the guard with max_length."
        )
    if wrong:
        raise MismatchError(f"tokenizer: differs from the one that the guard was fitted with in {wrong}")
    return text


def _reward(scores: Floats, reward: str) -> Floats:
    labels, column = scores.shape[1], reward_column(reward)
    if column >= labels or (labels != 1 and ":" not in reward):
        raise MismatchError(
            f"scores: the engine gives {labels} numbers per item, and the guard's reward is {reward!r}: another model is served "
            "here"
        )
    return scores[:, column]
