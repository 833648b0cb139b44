"""Items to raw channel scores: the step before a verdict, which depends on no threshold and can be kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from rm_ood.dialogue import Response, Text
from rm_ood.embed import Embedded, Embedder, merge
from rm_ood.skew import EndsCheck, encode_items
from rm_ood.state import ChannelScores, FittedState
from rm_ood.text import Encoded, TextEncoder


@dataclass(frozen=True)
class Scoring:
    """A fitted guard on its reward model, up to the raw scores.

    Attributes:
        state: detectors and settings.
        column: the reward model with its hooks.
        ends: compares how texts end with how the fit data did; None where that is not known.
    """

    state: FittedState
    column: Embedder
    ends: EndsCheck | None

    @cached_property
    def text(self) -> TextEncoder:
        """The tokenisation that the guard was fitted with."""
        return self.column.text(self.state.config.text_format)

    def encode(self, items: Sequence[tuple[Text, Response]]) -> list[Encoded]:
        """Token ids and spans of n items, with what their ends say of the tokenisation among their reasons.

        Raises:
            InputError: an item that cannot be encoded; names it as `items[i]`.
        """
        return encode_items(self.text, items, self.ends)

    def batches(self, encoded: Sequence[Encoded]) -> Iterator[tuple[NDArray[np.int64], ChannelScores, Embedded]]:
        """(indices into `encoded`, raw scores, rewards and vectors) of length-sorted batches, one forward each."""
        for index, part in self.column.batches(encoded, self.text):
            yield index, self.state.score(part.vectors, part.rewards), part

    def score(self, encoded: Sequence[Encoded], *, progress: bool = False) -> tuple[ChannelScores, Embedded]:
        """Raw scores of n items, at least one, in their own order, and what `FittedState.decide` needs beside them."""
        order: list[NDArray[np.int64]] = []
        parts: list[Embedded] = []
        scores: list[ChannelScores] = []
        with tqdm(total=len(encoded), desc="check", unit="item", disable=not progress) as bar:
            for index, scored, part in self.batches(encoded):
                order.append(index)
                scores.append(scored)
                # Vectors of all items together would not fit, and nothing reads them after this.
                parts.append(replace(part, vectors={}))
                bar.update(len(index))
        back = np.argsort(np.concatenate(order))
        return ChannelScores.concatenate(scores).take(back), merge(parts, back)
