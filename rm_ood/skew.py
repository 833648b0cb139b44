"""Are texts tokenised the way that the guard was fitted on? The commonest silent gap between training and serving.

TRL's RewardTrainer trains plain text with BOS and EOS; its GRPOTrainer scores the same text with neither. A guard calls such
tokens out-of-distribution, and is right.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rm_ood.dialogue import Response, Text
from rm_ood.errors import TokenisationWarning
from rm_ood.preferences import Item
from rm_ood.text import Encoded, TextEncoder, first_tokens, is_doubled

# Share of the fit items above which a first or last token counts as a rule of the tokenisation.
_RULE = 0.99
# Items tokenised both ways, and the characters that are left of each text.
_SAMPLE, _SHORT = 16, 200


class Ends:
    """What the fit items begin and end with, counted as they pass."""

    def __init__(self, tokenizer: Any) -> None:
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._n = self._with_bos = self._with_eos = 0
        self._last: Counter[int] = Counter()

    def add(self, ids: Sequence[int]) -> None:
        """Count one item."""
        self._n += 1
        self._with_bos += ids[0] == self._bos
        self._with_eos += ids[-1] == self._eos
        self._last[ids[-1]] += 1

    def merge(self, other: Ends) -> None:
        """Count what another count has seen."""
        self._n += other._n
        self._with_bos += other._with_bos
        self._with_eos += other._with_eos
        self._last += other._last

    def to_dict(self) -> dict[str, Any]:
        """JSON-able counts."""
        return {"n": self._n, "bos": self._with_bos, "eos": self._with_eos, "last": sorted(self._last.items())}

    def load(self, counts: Mapping[str, Any]) -> None:
        """Go on from counts that `to_dict` wrote."""
        self._n, self._with_bos, self._with_eos = counts["n"], counts["bos"], counts["eos"]
        self._last = Counter({int(token): int(count) for token, count in counts["last"]})

    def record(self) -> dict[str, float]:
        """Shares of the items that begin with BOS and end with EOS; the commonest last token and its share."""
        # Of several as common the smallest, whatever the order of the data.
        last, count = min(self._last.items(), key=lambda item: (-item[1], item[0]))
        return {
            "bos": self._with_bos / self._n,
            "eos": self._with_eos / self._n,
            "last": last,
            "last_share": count / self._n,
        }


class EndsCheck:
    """Rows whose ends are not those of the fit items. Warns once.

    Args:
        ends: as `Ends.record` gives it.
        tokenizer: of the reward model.
        text_format: only a chat template ends every item with the same token; other texts end with words.
    """

    def __init__(self, ends: Mapping[str, float], tokenizer: Any, text_format: str) -> None:
        self._ends = ends
        self._tokenizer = tokenizer
        self._is_chat = text_format == "chat"
        self._first = first_tokens(tokenizer)
        self._warned = False

    def encoded(self, items: Sequence[Encoded]) -> list[tuple[str, ...]]:
        """Reasons for n items: `tokenised_unlike_fit`, such as a text that lacks the EOS that the fit data had typed."""
        notes = [self._note(item.input_ids[0], item.input_ids[-1]) for item in items]
        return self._reasons(notes, [False] * len(items), stacklevel=7)

    def inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[tuple[str, ...]]:
        """Reasons for the rows of padded ids, (B, T): `tokenised_unlike_fit`, `doubled_bos`."""
        pad, eos = self._tokenizer.pad_token_id, self._tokenizer.eos_token_id
        own = input_ids != pad if attention_mask is None else attention_mask.bool()
        # First, second and last own token of each row, in one small copy: the batch may be large, and elsewhere.
        columns = torch.arange(own.shape[1], device=own.device)
        first = own.int().argmax(1)
        second = (own & (columns > first[:, None])).int().argmax(1)
        last = (columns * own).argmax(1)
        at = torch.stack([first, second, last], 1)
        ends = torch.cat([input_ids.gather(1, at), own.sum(1, keepdim=True)], 1).tolist()
        # Where EOS pads too, an end token without a mask looks like padding.
        is_known = attention_mask is not None or pad != eos
        notes = [self._note(one, end if is_known else None) if n else None for one, _, end, n in ends]
        doubled = [is_doubled([one, two][:n], self._first) for one, two, _, n in ends]
        return self._reasons(notes, doubled, stacklevel=6)

    def _reasons(self, notes: list[str | None], doubled: list[bool], *, stacklevel: int) -> list[tuple[str, ...]]:
        said = [note for note in notes if note is not None]
        if said and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(said)} of {len(notes)} rows are tokenised unlike the fit data: they {' or '.join(sorted(set(said)))} "
                "(reason tokenised_unlike_fit). "
                "Tokenise with guard.encode(), or fit the guard on text as it is served",
                TokenisationWarning,
                stacklevel=stacklevel,
            )
        return [
            (*(("tokenised_unlike_fit",) if note is not None else ()), *(("doubled_bos",) if twice else ()))
            for note, twice in zip(notes, doubled, strict=True)
        ]

    def _note(self, first: int, last: int | None) -> str | None:
        ends, tokenizer = self._ends, self._tokenizer
        note = _unlike(ends["bos"], first == tokenizer.bos_token_id, "begin", "BOS")
        if note is not None or last is None:
            return note
        note = _unlike(ends["eos"], last == tokenizer.eos_token_id, "end", "EOS")
        if note is None and self._is_chat and ends["last_share"] >= _RULE and last != ends["last"]:
            return "end with another token than the chat template's"
        return note


def encode_items(text: TextEncoder, items: Sequence[tuple[Text, Response]], ends: EndsCheck | None) -> list[Encoded]:
    """Token ids and spans of n items, with what their ends say of the tokenisation among their reasons.

    Raises:
        InputError: an item that cannot be encoded; names it as `items[i]`.
    """
    encoded = [text.encode(prompt, response, f"items[{i}]") for i, (prompt, response) in enumerate(items)]
    if ends is None:
        return encoded
    notes = ends.encoded(encoded)
    return [replace(item, reasons=(*item.reasons, *note)) for item, note in zip(encoded, notes, strict=True)]


def _unlike(share: float, has: bool, verb: str, name: str) -> str | None:
    if share >= _RULE and not has:
        return f"{verb} without {name}"
    return f"{verb} with {name}" if share <= 1 - _RULE and has else None


def grpo_difference(text: TextEncoder, items: Iterable[Item]) -> str | None:
    """How this plain-text tokenisation differs from that of TRL's GRPOTrainer, which adds no special tokens; None where
    it does not. Both are carried out, on a few items cut short."""
    front: set[str] = set()
    back: set[str] = set()
    for item, _ in zip(items, range(_SAMPLE), strict=False):
        prompt, response = str(item.prompt)[-_SHORT:], str(item.response)[-_SHORT:]
        ids = text.encode(prompt, response, item.where).input_ids
        bare = text.tokenizer(
            prompt + response, add_special_tokens=False, split_special_tokens=text.split_special_tokens
        )
        plain = list(bare["input_ids"])
        start = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), 0)
        tokens = text.tokenizer.convert_ids_to_tokens
        front |= set(tokens(ids[:start]))
        back |= set(tokens(ids[start + len(plain) :]))
    said = [
        *([f"begins it with {' '.join(sorted(front))}"] if front else []),
        *([f"ends it with {' '.join(sorted(back))}"] if back else []),
    ]
    if not said:
        return None
    return (
        f"this guard reads plain text as TRL's RewardTrainer trains on it ({', '.join(said)}); TRL's GRPOTrainer scores plain "
        "text with no special tokens, which this guard will call out-of-distribution. For GRPO fit with "
        "special_tokens=False, append_eos=False; chat data have no such gap"
    )
