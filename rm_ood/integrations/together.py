"""Calls of many threads as one: trainers ask for one answer at a time, models are fastest on many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from rm_ood.errors import OODGuardError, UnavailableError

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Ticket(Generic[Item, Result]):
    """One call: what it asks, and what came of it."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.results: list[Result] | None = None
        self.error: Exception | None = None

    @property
    def is_open(self) -> bool:
        return self.results is None and self.error is None


class Together(Generic[Item, Result]):
    """Runs `work` on the items of all calls that wait, one run at a time; nobody waits for a batch to fill.

    An interrupt (Ctrl-C) ends the call of the thread that it comes to, whoever's items that thread was at; the other calls go
    on waiting, and one of them takes the next turn.

    Args:
        work: items to results, one each, in their order.
        limit: no further call joins a run that has so many items.
    """

    def __init__(self, work: Callable[[list[Item]], list[Result]], limit: int = 64) -> None:
        self._work, self._limit = work, limit
        self._waiting: list[_Ticket[Item, Result]] = []
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def __call__(self, items: Sequence[Item]) -> list[Result]:
        """Results of this call's items.

        Raises:
            Exception: what `work` raised; an item that cannot be used fails its own call only.
        """
        mine: _Ticket[Item, Result] = _Ticket(items)
        try:
            with self._lock:
                self._waiting.append(mine)
            while mine.is_open:
                with self._turn:
                    # Another call may have taken this one along.
                    if mine.is_open:
                        self._run(self._next())
        finally:
            # Each call takes itself off, answered or interrupted: until then its items are somebody's to run.
            with self._lock:
                self._waiting = [ticket for ticket in self._waiting if ticket is not mine]
        if mine.results is None:
            raise mine.error  # type: ignore[misc]
        return mine.results

    def _next(self) -> list[_Ticket[Item, Result]]:
        with self._lock:
            waiting = [ticket for ticket in self._waiting if ticket.is_open]
        taken, count = 0, 0
        while taken < len(waiting) and (not taken or count < self._limit):
            count += len(waiting[taken].items)
            taken += 1
        return waiting[:taken]

    def _run(self, batch: list[_Ticket[Item, Result]]) -> None:
        try:
            results = self._work([item for ticket in batch for item in ticket.items])
        except Exception as error:
            # A server that is out of reach is so for all, and asking again for each would take each its timeout.
            if len(batch) > 1 and isinstance(error, OODGuardError) and not isinstance(error, UnavailableError):
                for ticket in batch:
                    self._run([ticket])
                return
            for ticket in batch:
                ticket.error = error
            return
        start = 0
        for ticket in batch:
            ticket.results = results[start : start + len(ticket.items)]
            start += len(ticket.items)
