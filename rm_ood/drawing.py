"""Which prompts are kept of all that go by: a bounded draw that depends on the data alone, in flat arrays.

Of ten thousand small vectors, as objects of their own, most of the memory would be their administration.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rm_ood.errors import MismatchError
from rm_ood.preferences import stable_hash

# Rows of vectors that are allocated at once: little is empty in the last block, and none is ever moved.
_BLOCK = 64
_FACTS = np.dtype([("reward", np.float64), ("label", np.int64), ("lengths", np.int64, (2,))])
# The label of a response whose class is not known.
UNKNOWN = -1


class Drawn(Protocol):
    """What a reservoir keeps: something of one prompt and one of its responses, with their 64-bit hashes."""

    key: int
    response_hash: int


D = TypeVar("D", bound=Drawn)


class Reservoir(ABC, Generic[D]):
    """At most `size` prompts, drawn by a seeded hash of the prompt; for each, the response with the smallest hash.

    The draw depends on the data alone, never on their order, and one response a prompt keeps the prompts independent of
    each other. Who derives from it says how an item lies in its place, of which there are never more than `size`.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        # One entry a prompt in each, by rank and key: the prompt to give up is the last.
        self._ranks, self._keys, self._hashes, self._places = (array("Q") for _ in range(4))
        self._free: list[int] = []

    @abstractmethod
    def _put(self, place: int, item: D) -> None:
        """Write an item to a place: one that was written before, or the next new one."""

    @abstractmethod
    def _get(self, place: int, key: int, response_hash: int) -> D:
        """The item in a place."""

    def response_hash(self, key: int, response: str) -> int:
        """The rank by which a prompt's response is drawn; another one for the same answer to another prompt."""
        return stable_hash(f"{key:016x}{response}", self.seed)

    def wants(self, key: int, response_hash: int) -> bool:
        """Whether this response would be kept, before its forward is paid for."""
        at, is_known = self._find(key)
        return response_hash < self._hashes[at] if is_known else at < self.size

    def offer(self, item: D) -> None:
        """Keep the item if it is still wanted."""
        at, is_known = self._find(item.key)
        if is_known:
            if item.response_hash < self._hashes[at]:
                self._hashes[at] = item.response_hash
                self._put(self._places[at], item)
            return
        if at == self.size:
            return
        if len(self) == self.size:
            for entries in (self._ranks, self._keys, self._hashes):
                entries.pop()
            place = self._places.pop()
        else:
            place = self._free.pop() if self._free else len(self)
        self._put(place, item)
        self._ranks.insert(at, self._rank(item.key))
        self._keys.insert(at, item.key)
        self._hashes.insert(at, item.response_hash)
        self._places.insert(at, place)

    def merge(self, other: Reservoir[D]) -> None:
        """Keep what is still wanted of another draw with the same size and seed."""
        for item in other.items():
            self.offer(item)

    def outlive(self, others: Collection[int]) -> None:
        """Give up the prompts that would go in a merge with draws of these other prompts."""
        first = set(heapq.nsmallest(self.size, {*self._keys, *others}, key=lambda key: (self._rank(key), key)))
        stay = [key in first for key in self._keys]
        self._free += [place for place, stays in zip(self._places, stay, strict=True) if not stays]
        for entries in (self._ranks, self._keys, self._hashes, self._places):
            entries[:] = array("Q", [entry for entry, stays in zip(entries, stay, strict=True) if stays])

    def keys(self) -> list[int]:
        """The prompts that were kept, ascending."""
        return sorted(self._keys)

    def items(self) -> Iterator[D]:
        """What was kept, in the order of the keys."""
        for at in self._by_key():
            yield self._get(self._places[at], self._keys[at], self._hashes[at])

    def __len__(self) -> int:
        return len(self._keys)

    def _by_key(self) -> list[int]:
        order: list[int] = np.argsort(np.array(self._keys, dtype=np.uint64)).tolist()
        return order

    def _find(self, key: int) -> tuple[int, bool]:
        """The entry of a prompt, or the one that it would have, and whether it is there."""
        rank = self._rank(key)
        at = bisect_left(self._ranks, rank)
        while at < len(self) and self._ranks[at] == rank and self._keys[at] < key:
            at += 1
        return at, at < len(self) and self._keys[at] == key

    def _rank(self, key: int) -> int:
        # Another seed than the split's, that is a 64-bit seed too.
        return stable_hash(f"{key:016x}", self.seed ^ 1)


@dataclass
class Kept:
    """One calibration prompt with the one response drawn for it."""

    key: int
    response_hash: int
    group: str | None
    label: int | None
    vectors: dict[str, NDArray[np.float32]]
    reward: float
    lengths: tuple[int, int]


@dataclass(frozen=True)
class KeptFacts:
    """What is known of n calibration prompts beside their vectors, in the order of the keys.

    Attributes:
        keys, response_hashes: (n,) uint64. rewards: (n,) float64. labels: (n,) int64, or `UNKNOWN`.
        lengths: (n, 2) int64, tokens of prompt and response. groups: n labels, or None.
    """

    keys: NDArray[np.uint64]
    response_hashes: NDArray[np.uint64]
    rewards: NDArray[np.float64]
    labels: NDArray[np.int64]
    lengths: NDArray[np.int64]
    groups: list[str | None]


class KeptPrompts(Reservoir[Kept]):
    """A draw of calibration prompts, the vectors of each side by side in a row of a block.

    Attributes:
        widths: channel -> columns of its vectors; empty before there was a prompt.
    """

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size, seed)
        self.widths: dict[str, int] = {}
        self._blocks: list[NDArray[np.float32]] = []
        self._facts: list[NDArray[np.void]] = []
        self._groups: list[str | None] = []

    def facts(self) -> KeptFacts:
        """All that is known beside the vectors."""
        order = self._by_key()
        places = [self._places[at] for at in order]
        facts = np.empty(len(order), dtype=_FACTS)
        for i, place in enumerate(places):
            facts[i] = self._facts[place // _BLOCK][place % _BLOCK]
        return KeptFacts(
            keys=np.array(self._keys, dtype=np.uint64)[order],
            response_hashes=np.array(self._hashes, dtype=np.uint64)[order],
            rewards=facts["reward"].copy(),
            labels=facts["label"].copy(),
            lengths=facts["lengths"].copy(),
            groups=[self._groups[place] for place in places],
        )

    def vectors(self, start: int = 0, stop: int | None = None) -> dict[str, NDArray[np.float32]]:
        """Channel -> (n, H) vectors of some prompts, counted in the order of the keys."""
        places = [self._places[at] for at in self._by_key()[start:stop]]
        found = {name: np.empty((len(places), width), dtype=np.float32) for name, width in self.widths.items()}
        for i, place in enumerate(places):
            for name, row in self._split(place).items():
                found[name][i] = row
        return found

    def _put(self, place: int, item: Kept) -> None:
        widths = {name: len(vector) for name, vector in item.vectors.items()}
        self.widths = self.widths or widths
        if widths != self.widths:
            raise MismatchError(f"calibration vectors of other channels or widths: {widths}, not {self.widths}")
        if place == len(self._groups):
            if place % _BLOCK == 0:
                self._blocks.append(np.empty((_BLOCK, sum(widths.values())), dtype=np.float32))
                self._facts.append(np.empty(_BLOCK, dtype=_FACTS))
            self._groups.append(None)
        for name, row in self._split(place).items():
            row[:] = item.vectors[name]
        label = UNKNOWN if item.label is None else item.label
        self._facts[place // _BLOCK][place % _BLOCK] = (item.reward, label, item.lengths)
        self._groups[place] = item.group

    def _get(self, place: int, key: int, response_hash: int) -> Kept:
        reward, label, (prompt, response) = self._facts[place // _BLOCK][place % _BLOCK].tolist()
        return Kept(
            key=key,
            response_hash=response_hash,
            group=self._groups[place],
            label=None if label == UNKNOWN else label,
            vectors={name: row.copy() for name, row in self._split(place).items()},
            reward=reward,
            lengths=(prompt, response),
        )

    def _split(self, place: int) -> dict[str, NDArray[np.float32]]:
        """Channel -> vector, views of the place's row."""
        row, end = self._blocks[place // _BLOCK][place % _BLOCK], 0
        views = {}
        for name, width in self.widths.items():
            views[name], end = row[end : end + width], end + width
        return views
