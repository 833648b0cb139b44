"""The server's one state: scorer, batcher, metrics, readiness; and the path of queries to verdicts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from rm_ood.artifact import package_version
from rm_ood.canaries import CANARIES
from rm_ood.decision import Decision, Decisions
from rm_ood.errors import InputError, MismatchError
from rm_ood.serve.batcher import Batcher, Job
from rm_ood.serve.logs import log
from rm_ood.serve.metrics import Metrics
from rm_ood.serve.reading import TextRules, text_refusal
from rm_ood.serve.refusal import Refusal, internal, no_model, slow_model
from rm_ood.serve.scorer import Query, Scorer, Work
from rm_ood.serve.settings import ServeSettings
from rm_ood.serve.tracing import Tracing
from rm_ood.serve.traffic import Traffic
from rm_ood.serve.worker import Worker, WorkerEnded

T = TypeVar("T")
SCORING_FAILED = "scoring_failed"
_SWAP_POLL_S = 0.02


@dataclass(frozen=True)
class Outcome:
    """A verdict, whether it stands for an item whose scoring failed, and the item's length in tokens."""

    decision: Decision
    failed: bool
    tokens: int


@dataclass(eq=False)
class Served:
    """A scorer and the alarm on its traffic: what one swap replaces; `requests` still use them."""

    scorer: Scorer
    traffic: Traffic
    requests: int = 0


class Service:
    """What the routes share; lives in one event loop.

    Args:
        scorer: scores; another one may take its place while requests run.
        settings: of the server.
    """

    def __init__(self, scorer: Scorer, settings: ServeSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.tracing = Tracing()
        self.served = Served(scorer, self.watching(scorer, resume=True))
        self.draining = False
        self.load: Callable[[], Scorer] | None = None
        self.connections: Callable[[], int] = lambda: 0
        self._tokenizer = Worker("rm-ood-tokenizer")
        self.batcher = Batcher(
            self._score,
            batch_size=scorer.batch_size,
            max_queue=settings.max_queue,
            max_wait_s=settings.model_timeout_s if settings.max_wait_s is None else settings.max_wait_s,
            timeout_s=settings.model_timeout_s,
            wait_s=settings.batch_wait_s,
            concurrency=scorer.concurrency,
            observe=self.metrics.ran,
            needs=(self._tokenizer,),
        )
        self._loader = Worker("rm-ood-loader")
        self._swapping = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self.metrics.serves(scorer, package_version())

    @property
    def scorer(self) -> Scorer:
        """That of now."""
        return self.served.scorer

    def watching(self, scorer: Scorer, *, resume: bool) -> Traffic:
        """An alarm on a scorer's traffic, going on from the saved state or beginning anew."""
        return Traffic(scorer, self.settings, self.metrics, resume=resume)

    def rules(self) -> TextRules:
        """Of the texts that the scorer of now takes."""
        config = self.scorer.config
        return TextRules(
            max_items=self.settings.max_items,
            max_chars=min(self.settings.max_chars, config.max_chars),
            allow_empty=config.allow_empty,
            grouped=config.group_column is not None,
        )

    async def start(self) -> None:
        """Begin to take work."""
        self.batcher.start()
        self._keeper = asyncio.get_running_loop().create_task(self._keep(), name="rm-ood-monitor")

    async def stop(self) -> None:
        """Take no more work."""
        await self.batcher.stop()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self.served.traffic.save()
        for worker in (self._tokenizer, self._loader):
            worker.stop()
        self.served.traffic.stop()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self.settings.monitor_save_s)
            await self.served.traffic.save()

    # -- scoring

    async def read(self, queries_of: Callable[..., T], *args: Any) -> T:
        """`queries_of(*args)` in the tokenizer's thread, for what needs the chat template to be read: nobody else waits for it.

        Raises:
            Refusal: that of `queries_of`; it takes too long (504). WorkerEnded: the thread ended.
        """
        try:
            async with asyncio.timeout(self.settings.model_timeout_s):
                return await self._tokenizer.run(queries_of, *args)
        except TimeoutError:
            raise slow_model(self.settings.model_timeout_s) from None

    async def decide(self, queries: Sequence[Query]) -> list[Outcome]:
        """Verdicts on the queries of one request, in their order.

        Raises:
            Refusal: too much waits (429), a text cannot be encoded (422), the model is too slow (504), it failed on every item
                (500), or the scorer's own; there is no thread for it (503).
            WorkerEnded: a thread ended while it was waited for.
        """
        served, n = self.served, len(queries)
        self.batcher.reserve(n)
        served.requests += 1
        jobs: list[Job] = []
        try:
            async with asyncio.timeout(self.settings.model_timeout_s):
                try:
                    works = await self._tokenizer.run(served.scorer.encode, queries)
                    loop = asyncio.get_running_loop()
                    jobs = [Job(work, work.length, served, loop.create_future()) for work in works]
                except InputError as error:
                    raise text_refusal(error, queries) from None
                finally:
                    if not jobs:
                        self.batcher.release(n)
                self.batcher.put(jobs)
                outcomes: list[Outcome] = await asyncio.gather(*(job.result for job in jobs))
        except TimeoutError:
            raise slow_model(self.settings.model_timeout_s) from None
        finally:
            served.requests -= 1
            for job in jobs:
                job.result.cancel()
        if all(outcome.failed for outcome in outcomes):
            raise served.scorer.failure()
        return outcomes

    def _score(self, served: Served, works: Sequence[Work]) -> list[Outcome]:
        """One batch, in a thread of the model's; an item that the model fails on is flagged, and spoils no other."""
        outcomes: list[Outcome] = []
        for part, decisions, failed in _isolated(served.scorer, works):
            self.metrics.scored(decisions)
            served.traffic.watch(part, decisions)
            outcomes += [Outcome(d, failed, work.length) for d, work in zip(decisions, part, strict=True)]
        return outcomes

    # -- the guard's replacement

    async def reload(self) -> bool:
        """Put a newly loaded guard in the place of this one; a guard that fails its checks changes nothing.

        Requests that were accepted before are scored by the guard that tokenised them. The traffic monitor goes on where
        both guards have the same calibration, and begins anew where they have not; the state of before is kept (`.old`).

        Returns:
            Whether it was replaced.
        """
        if self.load is None:
            return False
        async with self._swapping:
            try:
                scorer = await self._loader.run(_checked, self.load)
            except Exception as error:
                self.metrics.reloads.labels("rolled_back").inc()
                log("guard_rolled_back", level="error", error=type(error).__name__, guard=self.scorer.digest[:12])
                return False
            traffic = self.served.traffic
            if not traffic.watches_as(scorer.monitor(None)):
                await traffic.set_aside()
                traffic = self.watching(scorer, resume=False)
            before, self.served = self.served, Served(scorer, traffic)
            self.batcher.batch_size = scorer.batch_size
            self.metrics.serves(scorer, package_version())
            self.metrics.reloads.labels("replaced").inc()
            log("guard_replaced", guard=scorer.digest[:12], monitor_goes_on=traffic is before.traffic)
            # A batch may run on after those who asked for it have gone.
            while before.requests or self.batcher.runs(before):
                await asyncio.sleep(_SWAP_POLL_S)
            if traffic is not before.traffic:
                await before.traffic.save()
                before.traffic.stop()
            before.scorer.close()
            return True

    # -- readiness

    def unready(self) -> list[str]:
        """Why the server should get no traffic; empty when it should."""
        found = {
            "draining": self.draining,
            "traffic alarm": self.settings.unready_on_alarm and self.served.traffic.state.alarm,
        }
        problem = self.scorer.problem
        own = [reason for reason, holds in found.items() if holds]
        return [*([] if problem is None else [problem]), *self.broken(), *own]

    def broken(self) -> list[str]:
        """What only a new process mends."""
        found = {
            "model thread ended": not self.batcher.alive,
            "tokenizer thread ended": not self._tokenizer.alive,
            "model does not answer": self.batcher.stuck,
        }
        return [reason for reason, holds in found.items() if holds]

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """What `/metrics` shows, and its content type."""
        self.refresh()
        return self.metrics.text(accept)

    def refresh(self) -> None:
        """Set the gauges that nobody counts up and down."""
        self.metrics.ready.set(not self.unready())
        self.metrics.queue_depth.set(self.batcher.waiting)
        self.metrics.connections.set(self.connections())
        self.served.traffic.show()


def _isolated(scorer: Scorer, works: Sequence[Work]) -> list[tuple[Sequence[Work], Decisions, bool]]:
    """A batch in pieces, each scored or failed: a piece that raises is halved until the item that does it is alone."""
    try:
        return [(works, scorer.score(works), False)]
    except Refusal:
        # Of all items, whichever they are.
        raise
    except Exception as error:
        log("scoring_failed", level="error", error=type(error).__name__, items=len(works))
        if len(works) == 1:
            return [(works, scorer.failed(works, SCORING_FAILED), True)]
    half = len(works) // 2
    return [*_isolated(scorer, works[:half]), *_isolated(scorer, works[half:])]


def _checked(load: Callable[[], Scorer]) -> Scorer:
    """A scorer that scores: the canary texts get rewards and verdicts.

    Raises:
        MismatchError: they do not.
    """
    scorer = load()
    try:
        queries = [Query(str(i), prompt, response, None) for i, (prompt, response) in enumerate(CANARIES)]
        works = scorer.encode(queries)
        for start in range(0, len(works), scorer.batch_size):
            decisions = scorer.score(works[start : start + scorer.batch_size])
            if not np.isfinite(decisions.rewards).all() or not np.isfinite(decisions.p_values).all():
                raise MismatchError("the guard gives canary texts no verdict on this reward model")
        scorer.monitor(None)
    except BaseException:
        scorer.close()
        raise
    return scorer


def refusal_of(error: BaseException) -> Refusal:
    """What the sender is told of an error: nothing but that there was one, or that no other try can end better."""
    if isinstance(error, WorkerEnded):
        return no_model()
    return error if isinstance(error, Refusal) else internal()
