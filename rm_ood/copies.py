"""Noisy copies of fit texts, which `ContrastedMahalanobis` weighs distances against: of which texts, and with which words."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rm_ood.dialogue import Dialogue, response_text
from rm_ood.drawing import Reservoir
from rm_ood.errors import InputError
from rm_ood.preferences import CHOSEN, Item, stable_hash
from rm_ood.rewriting import change_prompt, change_response, prompt_texts, response_texts, vocabulary, word_perturbation
from rm_ood.text import Encoded, TextEncoder

# Copies with word noise, the paper's shift, at most; and the probability that a word is hit.
NOISY_PROMPTS, _NOISE = 4_000, 0.4


@dataclass
class Copied:
    """A fit prompt with the one response that is copied with it."""

    key: int
    response_hash: int
    item: Item

    def to_json(self) -> list[Any]:
        """JSON-able values."""
        return [self.key, self.response_hash, _item_to_json(self.item)]

    @classmethod
    def from_json(cls, saved: list[Any]) -> Copied:
        """What `to_json` gave."""
        key, response_hash, item = saved
        return cls(int(key), int(response_hash), _item_from_json(item))


class CopiedPrompts(Reservoir[Copied]):
    """A draw of fit prompts, each item as bytes."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size, seed)
        self._items: list[bytes] = []

    def _put(self, place: int, item: Copied) -> None:
        # A row's id may be no valid Unicode.
        packed = json.dumps(_item_to_json(item.item), ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._items[place : place + 1] = [packed]

    def _get(self, place: int, key: int, response_hash: int) -> Copied:
        return Copied(
            key, response_hash, _item_from_json(json.loads(self._items[place].decode("utf-8", "surrogatepass")))
        )


class NoisyCopies:
    """At most `size` fit prompts, drawn by a seeded hash of the prompt, so that it does not matter how a file is sorted.

    Of a prompt's responses a chosen one is copied, where it has one; of several, that of the smallest hash. The words are
    those of what is copied: nothing of calibration prompts may be in what scores them.

    Attributes:
        drawn: the prompts and what is copied of them.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.seed = seed
        self.drawn = CopiedPrompts(size, seed)

    def offer(self, key: int, item: Item) -> None:
        """Keep a fit item, of the prompt with this key, if the draw wants it."""
        if not self.drawn.wants(key, 0):
            return
        # Dialogues of one key may differ in all but their first turn.
        text = "\0".join([*prompt_texts(item.prompt), response_text(item.response)])
        half = 0 if item.label in (CHOSEN, None) else 2**63
        self.drawn.offer(Copied(key, half + stable_hash(text, self.seed) // 2, item))

    def encoded(self, text: TextEncoder) -> Iterator[Encoded]:
        """The copies, with noise on the words of prompt and response; none where the texts hold no words of letters."""
        words = vocabulary(
            t
            for copied in self.drawn.items()
            for t in (*prompt_texts(copied.item.prompt), *response_texts(copied.item.response))
        )

        def change(core: str) -> str:
            return word_perturbation(core, _NOISE, words, self.seed)

        for item in (copied.item for copied in self.drawn.items()) if words else ():
            prompt, response = change_prompt(item.prompt, change), change_response(item.response, change)
            # A copy that became too long, where that is an error, is one of many.
            with contextlib.suppress(InputError):
                yield text.encode(prompt, response, item.where)


def _item_to_json(item: Item) -> dict[str, Any]:
    saved = vars(item).copy()
    if isinstance(item.prompt, Dialogue):
        saved["prompt"] = {"dialogue": asdict(item.prompt)}
    return saved


def _item_from_json(saved: dict[str, Any]) -> Item:
    prompt = saved["prompt"]
    return Item(**{**saved, "prompt": Dialogue(**prompt["dialogue"]) if isinstance(prompt, dict) else prompt})
