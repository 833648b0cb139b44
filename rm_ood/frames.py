"""Results that are kept for the next time, as many as a number of characters allows."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class Frames:
    """A function of a string whose latest results are kept; those go first that were not asked for longest.

    Its keys hold what a sender wrote, of any length, so a number of results would be no bound on memory. Safe to share
    between threads; a copy begins empty.

    Args:
        make: the function; its result for a string is always the same.
        most: characters of strings and results together; a larger one is not kept.
    """

    def __init__(self, make: Callable[[str], str | None], most: int) -> None:
        self._make, self._most = make, most
        self._kept: OrderedDict[str, str | None] = OrderedDict()
        self._lock = threading.Lock()
        self.size = 0

    def __call__(self, key: str) -> str | None:
        """The result for a string, kept or made now."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = self._make(key)
        with self._lock:
            if key not in self._kept and _size(key, made) <= self._most:
                self._kept[key] = made
                self.size += _size(key, made)
            while self.size > self._most:
                self.size -= _size(*self._kept.popitem(last=False))
        return made

    def clear(self) -> None:
        """Keep nothing of what was made so far."""
        with self._lock:
            self._kept.clear()
            self.size = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Frames, (self._make, self._most)


def _size(key: str, made: str | None) -> int:
    return len(key) + len(made or "")
