"""One pass over preference data: what is kept on the way.

Memory does not grow with the number of pairs, but for eight bytes per distinct fit prompt: a later calibration set must not
hold any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rm_ood.channels import FINAL, Channel
from rm_ood.moments import ClassMoments
from rm_ood.preferences import stable_hash
from rm_ood.vectors import unit_rows

# Batches of items encoded ahead, so that batches hold items of like length.
WINDOW_BATCHES = 32
# Keys that wait to be sorted in: so many, or a share of those that are, which keeps the sorting's cost a key the same.
_RECENT, _RECENT_SHARE = 4_096, 1 / 16
# Hashes that a sketch counts: the share of repeats is known to half a per cent.
_SKETCH = 8_192
T = TypeVar("T")


class KeySet:
    """A set of 64-bit keys in eight bytes each."""

    def __init__(self, keys: NDArray[np.uint64] | None = None) -> None:
        self._sorted = np.empty(0, dtype=np.uint64) if keys is None else np.unique(keys)
        self._recent: set[int] = set()

    def add(self, key: int) -> bool:
        """Put a key in; whether it was new."""
        if key in self:
            return False
        self._recent.add(key)
        if len(self._recent) >= max(_RECENT, _RECENT_SHARE * len(self._sorted)):
            self._sorted, self._recent = self.sorted(), set()
        return True

    def __contains__(self, key: int) -> bool:
        if key in self._recent:
            return True
        at = np.searchsorted(self._sorted, np.uint64(key))
        return bool(at < len(self._sorted) and self._sorted[at] == np.uint64(key))

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def merge(self, other: KeySet) -> None:
        """Put the keys of another set in."""
        self._sorted, self._recent = np.union1d(self.sorted(), other.sorted()), set()

    def sorted(self) -> NDArray[np.uint64]:
        """All keys, ascending."""
        return np.union1d(self._sorted, np.array(sorted(self._recent), dtype=np.uint64))


class DuplicateSketch:
    """Share of repeated items, estimated from those whose hash falls in a shrinking range (bounded memory)."""

    def __init__(self, size: int = _SKETCH) -> None:
        self.size = size
        self._limit = 2**64
        self._counts: dict[int, int] = {}

    def add(self, item_hash: int) -> None:
        """Count an item."""
        if item_hash >= self._limit:
            return
        self._counts[item_hash] = self._counts.get(item_hash, 0) + 1
        self._shrink()

    def merge(self, other: DuplicateSketch) -> None:
        """Count another sketch's items."""
        self._limit = min(self._limit, other._limit)
        for item_hash, count in other._counts.items():
            self._counts[item_hash] = self._counts.get(item_hash, 0) + count
        self._counts = {h: c for h, c in self._counts.items() if h < self._limit}
        self._shrink()

    def to_arrays(self) -> tuple[int, NDArray[np.uint64], NDArray[np.int64]]:
        """The end of the range, and hashes with their counts."""
        hashes, counts = list(self._counts), list(self._counts.values())
        return self._limit, np.array(hashes, dtype=np.uint64), np.array(counts, dtype=np.int64)

    @classmethod
    def from_arrays(cls, limit: int, hashes: NDArray[np.uint64], counts: NDArray[np.int64]) -> DuplicateSketch:
        """The sketch that `to_arrays` wrote."""
        sketch = cls()
        sketch._limit, sketch._counts = limit, dict(zip(hashes.tolist(), counts.tolist(), strict=True))
        return sketch

    def _shrink(self) -> None:
        while len(self._counts) > self.size:
            self._limit //= 2
            self._counts = {h: c for h, c in self._counts.items() if h < self._limit}

    @property
    def share(self) -> float:
        """Repeats over items, 0 to 1."""
        total = sum(self._counts.values())
        return 1 - len(self._counts) / total if total else 0.0


def in_other_half(key: int, seed: int) -> bool:
    """Which half of the fit prompts one is in, by a hash of its own: of the split's, fit prompts have the upper part."""
    return stable_hash(f"half {key:016x}", seed) & 1 == 1


@dataclass
class FitMoments:
    """Moments per channel: the responses' by class, each distinct prompt's once, those of both side by side as one class;
    and the reward's.

    Attributes:
        n_classes: of the responses.
        channels: of all prompts, or of those of one half where halves are kept apart; `other_half`: of the others.
        normalised: channels whose vectors count at length 1.
    """

    n_classes: int
    normalised: Callable[[str], bool] = lambda name: False
    channels: dict[str, ClassMoments] = field(default_factory=dict)
    other_half: dict[str, ClassMoments] = field(default_factory=dict)
    reward: ClassMoments = field(default_factory=lambda: ClassMoments(1, 1))

    def update(
        self,
        vectors: dict[str, Tensor],
        rewards: NDArray[np.float64],
        labels: Tensor,
        first: Tensor,
        other: Tensor | None = None,
    ) -> None:
        """Add a batch: vectors (n, H) per channel, rewards (n,), labels (n,) int, first (n,) bool (new prompt).

        Args:
            other: (n,) bool, rows of the other half; None keeps no halves apart.
        """
        halves = [(self.channels, None)] if other is None else [(self.channels, ~other), (self.other_half, other)]
        for name, x in vectors.items():
            axis = Channel.parse(name).axis
            if self.normalised(name):
                x = unit_rows(x)
            for kept, rows in halves:
                if name not in kept:
                    n_classes = self.n_classes if axis == "response" else 1
                    kept[name] = ClassMoments(x.shape[1], n_classes, device=x.device)
                if axis == "prompt":
                    rows = first if rows is None else first & rows
                mine, classes = (x, labels) if rows is None else (x[rows.to(x.device)], labels[rows])
                kept[name].update(mine, classes.to(x.device) if kept[name].n_classes > 1 else None)
        self.reward.update(torch.from_numpy(rewards)[:, None])

    def merge(self, other: FitMoments) -> None:
        """Add the moments of other prompts."""
        for mine, theirs in ((self.channels, other.channels), (self.other_half, other.other_half)):
            for name, moments in theirs.items():
                if name in mine:
                    mine[name].merge(moments)
                else:
                    mine[name] = moments
        self.reward.merge(other.reward)

    def class_counts(self) -> list[int]:
        """Responses of each class."""
        halves = [half[FINAL].counts for half in (self.channels, self.other_half) if half]
        counts: list[int] = torch.stack(halves).sum(0).tolist()
        return counts


def windows(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items: enough to sort by length, few enough to hold."""
    window: list[T] = []
    for item in items:
        window.append(item)
        if len(window) >= size:
            yield window
            window = []
    if window:
        yield window
