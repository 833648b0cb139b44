"""Micro-batches of items of like length, from a bounded queue through the model: one at a time, or a few in flight.

The oldest item is in every batch, and those whose length is nearest to its own fill it: little padding, and no item waits
for ever. Work that nobody waits for any more never reaches the model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rm_ood.serve.refusal import overloaded
from rm_ood.serve.worker import Worker

# Weight of the newest batch in the time that an item is expected to take.
_SMOOTHING = 0.2


@dataclass(eq=False)
class Job:
    """One item that waits for the model.

    Attributes:
        work: what the model call takes. length: of the item, in tokens.
        key: jobs of one batch have the same.
        result: settled with the job's own outcome; cancelled by whoever no longer waits for it.
    """

    work: Any
    length: int
    key: Any
    result: asyncio.Future[Any]
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Ran:
    """What a batch was: items, tokens with and without padding, seconds that its oldest item waited, seconds it took."""

    size: int
    tokens: int
    padded: int
    waited_s: float
    took_s: float


class Batcher:
    """A bounded queue before a model.

    Args:
        score: (key, works) -> one outcome per work; called in threads of its own.
        batch_size: items in one call.
        concurrency: calls at once, each in its own thread.
        max_queue: items that may wait, those being tokenised included.
        wait_s: how long an idle model waits for a batch to fill.
        observe: told of each batch.
    """

    def __init__(
        self,
        score: Callable[[Any, Sequence[Any]], Sequence[Any]],
        *,
        batch_size: int,
        max_queue: int,
        wait_s: float,
        concurrency: int = 1,
        observe: Callable[[Ran], None] = lambda ran: None,
    ) -> None:
        self._score = score
        self.batch_size = batch_size
        self._max_queue = max_queue
        self._wait_s = wait_s
        self._observe = observe
        self._queue: list[Job] = []
        self._reserved = 0
        self._arrived = asyncio.Event()
        self._workers = [Worker("rm-ood-model") for _ in range(concurrency)]
        self._free: asyncio.Queue[Worker] = asyncio.Queue()
        # What runs: since when, and with which key.
        self._calls: dict[asyncio.Task[None], tuple[float, Any]] = {}
        self._task: asyncio.Task[None] | None = None
        self._item_s = 0.01

    @property
    def busy_since(self) -> float | None:
        """When the call began that has been running for the longest; None: none runs."""
        return min((since for since, _ in self._calls.values()), default=None)

    @property
    def waiting(self) -> int:
        """Items that wait, those being tokenised included."""
        return self._reserved + sum(not job.result.done() for job in self._queue)

    @property
    def alive(self) -> bool:
        """Whether batches are still taken."""
        is_running = self._task is not None and not self._task.done()
        return is_running and all(worker.alive for worker in self._workers)

    def start(self) -> None:
        """Take batches from now on; in the event loop."""
        for worker in self._workers:
            self._free.put_nowait(worker)
        self._task = asyncio.get_running_loop().create_task(self._run(), name="rm-ood-batcher")

    async def stop(self) -> None:
        """Take no more batches; what waits is cancelled."""
        tasks = [*([] if self._task is None else [self._task]), *self._calls]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in self._queue:
            job.result.cancel()
        self._queue.clear()
        for worker in self._workers:
            worker.stop()

    def reserve(self, n: int) -> None:
        """Hold n places, for `put` or `release`.

        Raises:
            Refusal: the queue has no room for them (429).
        """
        self._drop_cancelled()
        if self.waiting + n > self._max_queue:
            raise overloaded(self.waiting, self.waiting * self._item_s)
        self._reserved += n

    def release(self, n: int) -> None:
        """Give n reserved places back."""
        self._reserved -= n

    def put(self, jobs: Sequence[Job]) -> None:
        """Queue jobs in their reserved places."""
        self._reserved -= len(jobs)
        self._queue.extend(jobs)
        self._arrived.set()

    def runs(self, key: Any) -> bool:
        """Whether a batch with this key is in the model."""
        return any(one is key for _, one in self._calls.values())

    def _drop_cancelled(self) -> None:
        self._queue[:] = [job for job in self._queue if not job.result.done()]

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            # A batch fills while it waits for its turn.
            worker = await self._free.get()
            self._arrived.clear()
            self._drop_cancelled()
            if self._queue:
                await self._fill()
            self._drop_cancelled()
            batch = self._take()
            if batch:
                task = asyncio.get_running_loop().create_task(self._call(worker, batch), name="rm-ood-batch")
                self._calls[task] = time.monotonic(), batch[0].key
                task.add_done_callback(self._ended)
            else:
                self._free.put_nowait(worker)
            if self._queue:
                self._arrived.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._calls[task]

    async def _fill(self) -> None:
        """Wait for a full batch, but not longer than the oldest job may."""
        until = self._queue[0].since + self._wait_s
        while len(self._queue) < self.batch_size and (left := until - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return
            self._arrived.clear()

    def _take(self) -> list[Job]:
        if not self._queue:
            return []
        oldest = self._queue[0]
        alike = [job for job in self._queue if job.key is oldest.key]
        nearest = sorted(alike, key=lambda job: abs(job.length - oldest.length))
        batch = nearest[: self.batch_size]
        taken = set(map(id, batch))
        self._queue[:] = [job for job in self._queue if id(job) not in taken]
        return batch

    async def _call(self, worker: Worker, batch: list[Job]) -> None:
        start = time.monotonic()
        try:
            outcomes = await worker.run(self._score, batch[0].key, [job.work for job in batch])
            pairs = list(zip(batch, outcomes, strict=True))
        except Exception as error:
            for job in batch:
                if not job.result.done():
                    job.result.set_exception(error)
            return
        finally:
            self._free.put_nowait(worker)
        took = time.monotonic() - start
        self._item_s += _SMOOTHING * (took / len(batch) / len(self._workers) - self._item_s)
        longest = max(job.length for job in batch)
        waited = start - min(job.since for job in batch)
        self._observe(Ran(len(batch), sum(job.length for job in batch), longest * len(batch), waited, took))
        for job, outcome in pairs:
            if not job.result.done():
                job.result.set_result(outcome)
