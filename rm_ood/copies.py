"""Noisy copies of fit texts, which `ContrastedMahalanobis` weighs distances against: of which texts, and with which words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from rm_ood.dialogue import response_text
from rm_ood.errors import InputError
from rm_ood.fitting import Reservoir
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


class NoisyCopies:
    """At most `size` fit prompts, drawn by a seeded hash of the prompt, so that it does not matter how a file is sorted.

    Of a prompt's responses a chosen one is copied, where it has one; of several, that of the smallest hash. The words are
    those of what is copied: nothing of calibration prompts may be in what scores them.

    Attributes:
        drawn: the prompts and what is copied of them.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.seed = seed
        self.drawn = Reservoir[Copied](size, seed)

    def offer(self, key: int, item: Item) -> None:
        """Keep a fit item, of the prompt with this key, if the draw wants it."""
        if not self.drawn.wants(key, 0):
            return
        # Dialogues of one key may differ in all but their first turn.
        text = "\0".join([*prompt_texts(item.prompt), response_text(item.response)])
        rank = stable_hash(text, self.seed) + (0 if item.label in (CHOSEN, None) else 2**64)
        self.drawn.offer(Copied(key, rank, item))

    def encoded(self, text: TextEncoder) -> Iterator[Encoded]:
        """The copies, with noise on the words of prompt and response; none where the texts hold no words of letters."""
        items = [copied.item for copied in self.drawn.items()]
        words = vocabulary(t for item in items for t in (*prompt_texts(item.prompt), *response_texts(item.response)))

        def change(core: str) -> str:
            return word_perturbation(core, _NOISE, words, self.seed)

        for item in items if words else ():
            prompt, response = change_prompt(item.prompt, change), change_response(item.response, change)
            # A copy that became too long, where that is an error, is one of many.
            with contextlib.suppress(InputError):
                yield text.encode(prompt, response, item.where)
