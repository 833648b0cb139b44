"""Micro-batches of items of like length, from a bounded queue through the model: one at a time, or a few in flight.

The oldest item is in every batch, and those whose length is nearest to its own fill it, out of twice as many; what is passed
over once, or would otherwise be too late, is in the next: little padding, and no item waits more than one batch longer than in
the order of arrival. Work that nobody waits for any more never reaches the model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rm_ood.serve.refusal import no_model, overloaded, stuck_model
from rm_ood.serve.worker import Worker

# What a batch weighs of the one after it, in the time that the next is expected to take.
_KEPT = 0.8


@dataclass(eq=False)
class Job:
    """One item that waits for the model.

    Attributes:
        work: what the model call takes. length: of the item, in tokens.
        key: jobs of one batch have the same.
        result: settled with the job's own outcome; cancelled by whoever no longer waits for it.
        passed_over: whether a batch was made of others that might have held it.
    """

    work: Any
    length: int
    key: Any
    result: asyncio.Future[Any]
    since: float = field(default_factory=time.monotonic)
    passed_over: bool = False


@dataclass(frozen=True)
class Ran:
    """What a batch was: items, tokens with and without padding, seconds that its oldest item waited, seconds it took."""

    size: int
    tokens: int
    padded: int
    waited_s: float
    took_s: float


@dataclass
class Pace:
    """How long a batch takes, by those that ran lately.

    Some models take as long whatever is in a batch, others by the item; which it is shows only once batches differ. So a batch is
    expected to take as long as lately one took, or as its items did, whichever is longer: full ones, after such of one item,
    rather too long than too short.
    """

    batches: float = 0.0
    items: float = 0.0
    seconds: float = 0.0
    _is_warm: bool = False

    def ran(self, size: int, took_s: float) -> None:
        """A batch of so many items took so long."""
        # The first one loads what later ones find: it counts until there is another.
        kept = _KEPT if self._is_warm else 0.0
        self._is_warm = self.batches > 0
        self.batches = kept * self.batches + 1
        self.items = kept * self.items + size
        self.seconds = kept * self.seconds + took_s

    def expects(self, size: int) -> float:
        """Seconds that a batch of so many items is expected to take; 0 where none has run."""
        return max(self.seconds / self.batches, size * self.seconds / self.items) if self.batches else 0.0


@dataclass(frozen=True)
class _Call:
    """A batch in the model, and since when."""

    since: float
    batch: Sequence[Job]


class Batcher:
    """A bounded queue before a model.

    Args:
        score: (key, works) -> one outcome per work; called in threads of its own.
        batch_size: items in one call.
        concurrency: calls at once, each in its own thread.
        max_queue: items that may wait, those being tokenised included.
        max_wait_s: what an item may be expected to wait for its outcome, by the time that batches took lately; more are not
            taken while the model has others. An idle model takes what it is given.
        timeout_s: how long a batch may be in the model before no more are taken.
        wait_s: how long an idle model waits for a batch to fill.
        observe: told of each batch.
        needs: threads without which no item gets as far as a batch.
    """

    def __init__(
        self,
        score: Callable[[Any, Sequence[Any]], Sequence[Any]],
        *,
        batch_size: int,
        max_queue: int,
        max_wait_s: float,
        timeout_s: float,
        wait_s: float,
        concurrency: int = 1,
        observe: Callable[[Ran], None] = lambda ran: None,
        needs: Sequence[Worker] = (),
    ) -> None:
        self._score = score
        self.batch_size = batch_size
        self._max_queue = max_queue
        self._max_wait_s = max_wait_s
        self._timeout_s = timeout_s
        self._wait_s = wait_s
        self._observe = observe
        self._needs = needs
        self._queue: list[Job] = []
        self._reserved = 0
        self._arrived = asyncio.Event()
        self._workers = [Worker("rm-ood-model") for _ in range(concurrency)]
        self._free: asyncio.Queue[Worker] = asyncio.Queue()
        self._calls: dict[asyncio.Task[None], _Call] = {}
        self._task: asyncio.Task[None] | None = None
        self.pace = Pace()

    @property
    def busy_since(self) -> float | None:
        """When the call began that has been running for the longest; None: none runs."""
        return min((call.since for call in self._calls.values()), default=None)

    @property
    def stuck(self) -> bool:
        """Whether a batch has been in the model for longer than one may be."""
        return (busy := self.busy_since) is not None and time.monotonic() - busy > self._timeout_s

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
        """Take no more batches; what waits is cancelled, and so is what is in the model: nobody will hear of it."""
        tasks = [*([] if self._task is None else [self._task]), *self._calls]
        running = [job for call in self._calls.values() for job in call.batch]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in (*running, *self._queue):
            job.result.cancel()
        self._queue.clear()
        for worker in self._workers:
            worker.stop()

    def reserve(self, n: int) -> None:
        """Hold n places, for `put` or `release`.

        Raises:
            Refusal: see `check`.
        """
        self.check(n)
        self._reserved += n

    def check(self, n: int) -> None:
        """Whether n more items would be taken now.

        Raises:
            Refusal: the queue has no room for them, or they would wait too long (429); there is no thread to score them, or
                the model does not answer (503).
        """
        if not (self.alive and all(worker.alive for worker in self._needs)):
            raise no_model()
        if self.stuck:
            raise stuck_model(self._timeout_s)
        self._drop_cancelled()
        waiting = self.waiting
        idle = not waiting and len(self._calls) < len(self._workers)
        if waiting + n > self._max_queue or (not idle and self.wait_s(waiting + n) > self._max_wait_s):
            raise overloaded(waiting, self.wait_s(waiting))

    def wait_s(self, n: int) -> float:
        """Seconds until n waiting items are expected to have their outcomes, the batches before them done first."""
        workers, now = len(self._workers), time.monotonic()
        left = 0.0
        if len(self._calls) == workers:
            # One that is overdue is expected to take as long again as it is late.
            left = min(abs(c.since + self.pace.expects(len(c.batch)) - now) for c in self._calls.values())
        rounds, rest = divmod(n, self.batch_size * workers)
        last = self.pace.expects(min(rest, self.batch_size)) if rest else 0.0
        return left + rounds * self.pace.expects(self.batch_size) + last

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
        return any(call.batch[0].key is key for call in self._calls.values())

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
                self._calls[task] = _Call(time.monotonic(), batch)
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
        alike = [job for job in self._queue if job.key is oldest.key][: 2 * self.batch_size]
        # Those first that the next batch would be too late for.
        late = time.monotonic() + 2 * self.pace.expects(self.batch_size) - self._max_wait_s
        due = [job for job in alike if job.passed_over or job.since < late][: self.batch_size]
        others = [job for job in alike if job not in due]
        alike = due + sorted(others, key=lambda job: abs(job.length - oldest.length))
        batch = alike[: self.batch_size]
        for job in alike[self.batch_size :]:
            job.passed_over = True
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
        self.pace.ran(len(batch), took)
        longest = max(job.length for job in batch)
        waited = start - min(job.since for job in batch)
        self._observe(Ran(len(batch), sum(job.length for job in batch), longest * len(batch), waited, took))
        for job, outcome in pairs:
            if not job.result.done():
                job.result.set_result(outcome)
