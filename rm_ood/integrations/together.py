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
        self.error: BaseException | None = None


class Together(Generic[Item, Result]):
    """Runs `work` on the items of all calls that wait, one run at a time; nobody waits for a batch to fill.

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
        with self._lock:
            self._waiting.append(mine)
        while mine.results is None and mine.error is None:
            with self._turn:
                # Another call may have taken this one along.
                if mine.results is None and mine.error is None:
                    self._run(self._next())
        if mine.results is None:
            raise mine.error  # type: ignore[misc]
        return mine.results

    def _next(self) -> list[_Ticket[Item, Result]]:
        with self._lock:
            taken, count = 0, 0
            while taken < len(self._waiting) and (not taken or count < self._limit):
                count += len(self._waiting[taken].items)
                taken += 1
            batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return batch

    def _run(self, batch: list[_Ticket[Item, Result]]) -> None:
        try:
            results = self._work([item for ticket in batch for item in ticket.items])
        except BaseException as error:
            # A server that is out of reach is so for all, and asking again for each would take each its timeout.
            if len(batch) > 1 and isinstance(error, OODGuardError) and not isinstance(error, UnavailableError):
                for ticket in batch:
                    self._run([ticket])
                return
            # Nobody else will run them: what ends this thread ends their wait, too.
            for ticket in batch:
                ticket.error = error
            return
        start = 0
        for ticket in batch:
            ticket.results = results[start : start + len(ticket.items)]
            start += len(ticket.items)
