"""Text in, token ids and spans out: the one tokenisation path of fit, calibrate, score and serve.

Three formats, resolved once per guard and stored in it: `"chat"` (the tokenizer's chat template), `"pair"` (the
tokenizer's text pair, as encoder reward models are trained) and `"plain"` (`prompt + response` with the tokenizer's
special tokens). The response is found by character offsets in the rendered text, so templates need not be
prefix-preserving.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rm_ood.dialogue import Dialogue, Message, Response, Text, content_text, messages_of, parse_dialogue
from rm_ood.errors import InputError
from rm_ood.spans import Spans
from rm_ood.template import ChatTemplate

FORMATS = ("chat", "pair", "plain")
ON_TOO_LONG = ("flag", "truncate", "error")
# Tokenizers without a limit report about 1e30.
NO_LIMIT = 1_000_000


@dataclass(frozen=True)
class Encoded:
    """One item as the reward model reads it.

    Attributes:
        input_ids: token ids, (T,) int.
        token_type_ids: segment ids, (T,) int, or None where the tokenizer has none.
        prompt_end: column of the last token before the response.
        prompt_mask, response_mask: which tokens are the prompt's and the response's own words, (T,) bool: no special
            tokens, role markers or end marker, and never position 0, an attention sink.
        dropped: tokens cut from the left to keep within the maximum length.
        reasons: what the reader of the verdict should know: `truncated`, `empty_response`, `special_tokens_in_text`,
            `doubled_bos`; of a chat template `response_rewritten`, `prompt_rewritten`, `unrendered_fields`.
        turn_ends: column of the last token of each turn, the prompt's messages and then the response, end marker included:
            where the ids end if the dialogue is cut after that turn. -1 for a turn that was cut away or cannot be told.
            Empty for text that is no dialogue, and where they were not asked for.
        turn_roles: roles of these turns.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    prompt_end: int
    prompt_mask: list[bool]
    response_mask: list[bool]
    dropped: int
    reasons: tuple[str, ...]
    turn_ends: tuple[int, ...] = ()
    turn_roles: tuple[str, ...] = ()

    def prompt_only(self) -> Encoded:
        """The same item cut after its prompt: what a strict, prompt-only pass reads."""
        end = self.prompt_end + 1
        types = None if self.token_type_ids is None else self.token_type_ids[:end]
        return replace(
            self,
            input_ids=self.input_ids[:end],
            token_type_ids=types,
            prompt_mask=self.prompt_mask[:end],
            response_mask=[False] * end,
            turn_ends=tuple(column if column < end else -1 for column in self.turn_ends),
        )


@dataclass(frozen=True)
class Batch:
    """Padded model inputs with the spans beside them."""

    inputs: dict[str, Tensor]
    spans: Spans


def resolve_format(text_format: str, tokenizer: Any, prompts: Iterable[Text]) -> str:
    """The concrete format for `text_format="auto"`, from the data that the guard is fitted on.

    Messages, and dialogues written `Human: ...`/`Assistant: ...`, take the chat template; other strings the text pair of
    tokenizers that have class and separator tokens, and plain concatenation of those that have not.
    """
    if text_format in FORMATS:
        return text_format
    if text_format != "auto":
        raise InputError(f"text_format={text_format!r}: expected 'auto' or one of {FORMATS}")
    is_pair = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
    if is_pair and not tokenizer.chat_template:
        return "pair"
    if any(not isinstance(p, str) or parse_dialogue(p) is not None for p in prompts):
        return "chat"
    return "pair" if is_pair else "plain"


def first_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids that a tokenizer puts before a text: BOS, `[CLS]`."""
    return frozenset({tokenizer.bos_token_id, tokenizer.cls_token_id} - {None})


def is_doubled(ids: Sequence[int], first: frozenset[int]) -> bool:
    """Whether ids begin with the same first token twice: one from the text or its template, one from the tokenizer."""
    return len(ids) > 1 and ids[0] == ids[1] and ids[0] in first


class TextEncoder:
    """Renders and tokenises items.

    Args:
        tokenizer: a fast tokenizer of the reward model.
        text_format: `"chat"`, `"pair"` or `"plain"`.
        max_length: longest input in tokens; None takes the tokenizer's own limit.
        on_too_long: `"flag"` cuts and gives the reason, `"truncate"` cuts, `"error"` raises. The response's end is never
            cut, and the prompt goes first, from its start.
        split_special_tokens: read special tokens that users typed as ordinary text.
        append_eos: end plain text with the tokenizer's end token, as TRL's RewardTrainer trains on.
        special_tokens: give plain text the special tokens that the tokenizer adds (BOS, or `[CLS]` and `[SEP]`); TRL's
            GRPOTrainer serves it without.
        suffix: token ids that end every item, for models that read their reward there.
        pad_id: the model's pad id, which tells it where an item ends; None takes the tokenizer's.

    Raises:
        InputError: a slow tokenizer, an unknown option, no chat template for `"chat"`.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_format: str,
        *,
        max_length: int | None = None,
        on_too_long: str = "flag",
        split_special_tokens: bool = False,
        append_eos: bool = False,
        special_tokens: bool = True,
        pad_id: int | None = None,
        suffix: tuple[int, ...] = (),
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"tokenizer: expected a fast tokenizer, got {type(tokenizer).__name__}. The response is found by "
                "character offsets, which only fast tokenizers give: AutoTokenizer.from_pretrained(..., use_fast=True)."
            )
        if on_too_long not in ON_TOO_LONG:
            raise InputError(f"on_too_long={on_too_long!r}: expected one of {ON_TOO_LONG}")
        if text_format == "chat" and not tokenizer.chat_template:
            raise InputError(
                "messages were given, but the tokenizer has no chat template. Set tokenizer.chat_template to the one the "
                "reward model was trained with, or pass prompts as plain strings with text_format='plain'."
            )
        self.tokenizer = tokenizer
        self.text_format = text_format
        limit = max_length if max_length is not None else tokenizer.model_max_length
        self.max_length = int(min(limit, NO_LIMIT))
        self.on_too_long = on_too_long
        self.split_special_tokens = split_special_tokens
        self.append_eos = append_eos
        self.suffix = suffix
        self.special_tokens = special_tokens
        ids = (pad_id, tokenizer.pad_token_id, 0)
        self._pad_id = next(i for i in ids if i is not None)
        self._special = frozenset(tokenizer.all_special_ids)
        self._specials_text = tuple(token for token in tokenizer.all_special_tokens if token)
        self._first = first_tokens(tokenizer)
        self._template = ChatTemplate(tokenizer)

    def contract(self) -> dict[str, Any]:
        """What makes two tokenisations the same, for the fingerprint."""
        return {
            "format": self.text_format,
            "max_length": self.max_length,
            "on_too_long": self.on_too_long,
            "split_special_tokens": self.split_special_tokens,
            "append_eos": self.append_eos,
            "suffix": list(self.suffix),
            "special_tokens": self.special_tokens,
        }

    def encode(self, prompt: Text, response: Response, where: str = "item", *, turns: bool = False) -> Encoded:
        """Token ids and spans of one item.

        Args:
            turns: find where the turns of a dialogue end, at a rendering for each.

        Raises:
            InputError: messages or tools for a format that takes none, a template that rewrites the response past
                recognition or leaves out what the item brings, an item that is too long under `on_too_long="error"`.
        """
        if self.text_format == "chat":
            encoded = self._encode_chat(prompt, response, where, turns)
        elif self.text_format == "pair":
            encoded = self._encode_pair(*self._strings(prompt, response, where))
        else:
            encoded = self._encode_plain(*self._strings(prompt, response, where))
        reasons = list(encoded.reasons)
        if not _words(response).strip():
            reasons.append("empty_response")
        texts = [_words(response), *_contents(prompt)]
        if any(token in text for text in texts for token in self._specials_text):
            reasons.append("special_tokens_in_text")
        if not encoded.input_ids:
            raise InputError(
                f"{where}: prompt and response give no token, so there is nothing to score. Leave the item out."
            )
        if is_doubled(encoded.input_ids, self._first):
            reasons.append("doubled_bos")
        return self._shorten(self._ended(replace(encoded, reasons=tuple(reasons))), where)

    def _ended(self, item: Encoded) -> Encoded:
        """The item with the suffix after it, which is nobody's words."""
        more = len(self.suffix)
        return replace(
            item,
            input_ids=[*item.input_ids, *self.suffix],
            token_type_ids=None
            if item.token_type_ids is None
            else [*item.token_type_ids, *item.token_type_ids[-1:] * more],
            prompt_mask=[*item.prompt_mask, *[False] * more],
            response_mask=[*item.response_mask, *[False] * more],
        )

    def pad(self, items: Sequence[Encoded], device: torch.device | str = "cpu", *, beside: int = 0) -> Batch:
        """Right-padded model inputs of a batch, with `beside` pad columns more than the longest item needs."""
        width = max(len(item.input_ids) for item in items) + beside

        def stack(rows: list[list[Any]], fill: Any, dtype: torch.dtype) -> Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=dtype, device=device)

        inputs = {
            "input_ids": stack([item.input_ids for item in items], self._pad_id, torch.long),
            "attention_mask": stack([[1] * len(item.input_ids) for item in items], 0, torch.long),
        }
        types = [item.token_type_ids for item in items if item.token_type_ids is not None]
        if types:
            inputs["token_type_ids"] = stack(types, 0, torch.long)
        spans = Spans(
            prompt_end=torch.tensor([item.prompt_end for item in items], dtype=torch.long, device=device),
            prompt_mask=stack([item.prompt_mask for item in items], False, torch.bool),
            response_mask=stack([item.response_mask for item in items], False, torch.bool),
        )
        return Batch(inputs, spans)

    def _strings(self, prompt: Text, response: Response, where: str) -> tuple[str, str]:
        """The two texts, for the formats that take nothing else."""
        if isinstance(prompt, str) and isinstance(response, str):
            return prompt, response
        came = "tools or template keywords" if isinstance(prompt, Dialogue) else "a list of messages"
        if isinstance(prompt, str):
            came = "a response with fields or blocks beside its text"
        remedy = (
            "but the tokenizer has no chat template and reads text pairs. Set tokenizer.chat_template, or join the turns into "
            "one string."
            if self.text_format == "pair"
            else "but this guard reads plain text (text_format='plain'). Pass strings, or fit the guard on messages with the "
            "tokenizer's chat template."
        )
        raise InputError(f"{where}: {came}, {remedy}")

    def _encode_chat(self, prompt: Text, response: Response, where: str, turns: bool) -> Encoded:
        rendered = self._template.render(prompt, response, where, turns=turns)
        encoded, offsets = self._encode_rendered(rendered.text, rendered.response, rendered.prompt)
        stops = [stop for _, stop in offsets]
        return replace(
            encoded,
            reasons=rendered.reasons,
            # The last token that ends within the turn; one that straddles its end belongs to the next.
            turn_ends=tuple(bisect_right(stops, end) - 1 if end > 0 else -1 for end in rendered.turn_ends),
            turn_roles=(*(message["role"] for message in messages_of(prompt)), "assistant") if turns else (),
        )

    def _encode_pair(self, prompt: str, response: str) -> Encoded:
        # Both cuts are made here, so the tokenizer's own truncation (and its warning) stays off.
        out = self.tokenizer(
            prompt,
            response,
            truncation=False,
            verbose=False,
            split_special_tokens=self.split_special_tokens,
        )
        segments = out.sequence_ids(0)
        first = next((i for i, s in enumerate(segments) if s == 1), None)
        if first is None:
            # No response token: the response would stand before the closing special token.
            first = len(segments) - 1
        ids = list(out["input_ids"])
        return Encoded(
            input_ids=ids,
            token_type_ids=list(out["token_type_ids"]) if "token_type_ids" in out else None,
            prompt_end=first - 1,
            prompt_mask=[
                s == 0 and i > 0 and t not in self._special for i, (s, t) in enumerate(zip(segments, ids, strict=True))
            ],
            response_mask=[s == 1 and t not in self._special for s, t in zip(segments, ids, strict=True)],
            dropped=0,
            reasons=(),
        )

    def _encode_plain(self, prompt: str, response: str) -> Encoded:
        text = prompt + response
        return self._encode_rendered(text, (len(prompt), len(text)), [(0, len(prompt))])[0]

    def _encode_rendered(
        self,
        text: str,
        response: tuple[int, int],
        prompt: list[tuple[int, int]],
    ) -> tuple[Encoded, list[tuple[int, int]]]:
        """The item, and the characters of each of its tokens."""
        is_plain = self.text_format == "plain"
        out = self.tokenizer(
            text,
            truncation=False,
            verbose=False,
            # A template writes its own; the tokenizer's would come on top.
            add_special_tokens=is_plain and self.special_tokens,
            split_special_tokens=is_plain and self.split_special_tokens,
            return_offsets_mapping=True,
        )
        ids: list[int] = list(out["input_ids"])
        offsets: list[tuple[int, int]] = list(out["offset_mapping"])
        types = list(out["token_type_ids"]) if "token_type_ids" in out else None
        eos = self.tokenizer.eos_token_id
        if is_plain and self.append_eos and eos is not None and ids[-1:] != [eos]:
            ids, offsets = [*ids, eos], [*offsets, (len(text), len(text))]
            types = None if types is None else [*types, types[-1]]
        start, end = response
        answering = [
            a < end and b > max(start, a) and t not in self._special for (a, b), t in zip(offsets, ids, strict=True)
        ]
        inside = [any(a < hi and b > max(lo, a) for lo, hi in prompt) for a, b in offsets]
        # A token that straddles the border holds words of the response, so it is the response's.
        prompt_mask = [
            i > 0 and p and not r and t not in self._special
            for i, (p, r, t) in enumerate(zip(inside, answering, ids, strict=True))
        ]
        response_mask = [i > 0 and r for i, r in enumerate(answering)]
        before = [i for i, (a, b) in enumerate(offsets) if b <= start and (a < b or i == 0)]
        straddling = next((i for i, (a, b) in enumerate(offsets) if b > start and a < b), len(ids))
        last = min(before[-1] if before else 0, max(straddling - 1, 0))
        return Encoded(ids, types, last, prompt_mask, response_mask, 0, ()), offsets

    def _shorten(self, item: Encoded, where: str) -> Encoded:
        """Cut from the left, after a leading special token: the prompt first, the response's start only if it must be."""
        excess = len(item.input_ids) - self.max_length
        if excess <= 0:
            return item
        if self.on_too_long == "error":
            raise InputError(
                f"{where}: {len(item.input_ids)} tokens, the limit is max_length={self.max_length}. Shorten the item, raise "
                "max_length, or choose on_too_long='flag'."
            )
        keep_front = 1 if item.input_ids[0] in self._special else 0
        # In a text pair the separator between prompt and response stays.
        kept_middle = {item.prompt_end} if self.text_format == "pair" else set()
        removable = [i for i in range(keep_front, len(item.input_ids) - 1) if i not in kept_middle]
        cut = frozenset(removable[:excess])
        if len(cut) < excess or (any(item.response_mask) and not any(_without(item.response_mask, cut)[1:])):
            raise InputError(
                f"{where}: max_length={self.max_length} leaves no token of the response in the {self.text_format} format. "
                "Raise max_length."
            )

        reasons = (*item.reasons, "truncated") if self.on_too_long == "flag" else item.reasons
        return replace(
            item,
            input_ids=_without(item.input_ids, cut),
            token_type_ids=None if item.token_type_ids is None else _without(item.token_type_ids, cut),
            prompt_end=max(item.prompt_end - sum(i <= item.prompt_end for i in cut), 0),
            # Another token stands at position 0 now.
            prompt_mask=[False, *_without(item.prompt_mask, cut)[1:]],
            response_mask=[False, *_without(item.response_mask, cut)[1:]],
            dropped=excess,
            reasons=reasons,
            turn_ends=tuple(-1 if end in cut else end - sum(i < end for i in cut) for end in item.turn_ends),
        )


def _without(values: list[Any], cut: frozenset[int]) -> list[Any]:
    return [value for i, value in enumerate(values) if i not in cut]


def _contents(prompt: Text) -> list[str]:
    """Every text that the prompt brings into the rendered text."""
    if isinstance(prompt, str):
        return [prompt]
    beside = [json.dumps(prompt.tools, ensure_ascii=False)] if isinstance(prompt, Dialogue) else []
    return [*map(_words, messages_of(prompt)), *beside]


def _words(message: str | Message) -> str:
    """A message's content, and its other fields as JSON."""
    if isinstance(message, str):
        return message
    fields = {name: value for name, value in message.items() if name not in ("role", "content")}
    return content_text(message) + (json.dumps(fields, ensure_ascii=False) if fields else "")
