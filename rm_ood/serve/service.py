"""The server's one state: scorer, batcher, metrics, readiness; and the path of queries to verdicts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rm_ood.decision import Decision, Decisions
from rm_ood.errors import InputError
from rm_ood.serve.batcher import Batcher, Job
from rm_ood.serve.logs import log
from rm_ood.serve.metrics import Metrics
from rm_ood.serve.reading import TextRules, text_refusal
from rm_ood.serve.refusal import Refusal, internal, slow_model
from rm_ood.serve.scorer import Query, Scorer, Work
from rm_ood.serve.settings import ServeSettings
from rm_ood.serve.worker import Worker

SCORING_FAILED = "scoring_failed"


@dataclass(frozen=True)
class Outcome:
    """A verdict, and whether it stands for an item whose scoring failed."""

    decision: Decision
    failed: bool


class Service:
    """What the routes share; lives in one event loop.

    Args:
        scorer: scores; another one may take its place while requests run.
        settings: of the server.
    """

    def __init__(self, scorer: Scorer, settings: ServeSettings) -> None:
        self.settings = settings
        self.scorer = scorer
        self.metrics = Metrics()
        self.draining = False
        self.connections: Callable[[], int] = lambda: 0
        self.batcher = Batcher(
            self._score,
            batch_size=scorer.batch_size,
            max_queue=settings.max_queue,
            wait_s=settings.batch_wait_s,
            observe=self.metrics.ran,
        )
        self._tokenizer = Worker("rm-ood-tokenizer")

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

    async def stop(self) -> None:
        """Take no more work."""
        await self.batcher.stop()
        self._tokenizer.stop()

    # -- scoring

    async def decide(self, queries: Sequence[Query]) -> list[Decision]:
        """Verdicts on the queries of one request, in their order.

        Raises:
            Refusal: the queue is full (429), a text cannot be encoded (422), the model is too slow (504), or it failed on
                every item (500).
        """
        scorer, n = self.scorer, len(queries)
        self.batcher.reserve(n)
        jobs: list[Job] = []
        try:
            async with asyncio.timeout(self.settings.model_timeout_s):
                try:
                    works = await self._tokenizer.run(scorer.encode, queries)
                    loop = asyncio.get_running_loop()
                    jobs = [Job(work, work.length, scorer, loop.create_future()) for work in works]
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
            for job in jobs:
                job.result.cancel()
        if all(outcome.failed for outcome in outcomes):
            raise internal()
        return [outcome.decision for outcome in outcomes]

    def _score(self, scorer: Scorer, works: Sequence[Work]) -> list[Outcome]:
        """One batch, in the model's thread; an item that the model fails on is flagged, and spoils no other."""
        outcomes: list[Outcome] = []
        for part, decisions, failed in _isolated(scorer, works):
            self._count(part, decisions, failed)
            outcomes += [Outcome(decision, failed) for decision in decisions]
        return outcomes

    def _count(self, works: Sequence[Work], decisions: Decisions, failed: bool) -> None:
        self.metrics.scored(decisions)
        if failed:
            self.metrics.unscored.labels(SCORING_FAILED).inc(len(works))

    # -- readiness

    def unready(self) -> list[str]:
        """Why the server should get no traffic; empty when it should."""
        busy = self.batcher.busy_since
        stuck = busy is not None and time.monotonic() - busy > self.settings.model_timeout_s
        found = {
            "draining": self.draining,
            "model thread ended": not self.batcher.alive,
            "model does not answer": stuck,
        }
        return [reason for reason, holds in found.items() if holds]

    def refresh(self) -> None:
        """Set the gauges that nobody counts up and down."""
        self.metrics.ready.set(not self.unready())
        self.metrics.queue_depth.set(self.batcher.waiting)
        self.metrics.connections.set(self.connections())


def _isolated(scorer: Scorer, works: Sequence[Work]) -> list[tuple[Sequence[Work], Decisions, bool]]:
    """A batch in pieces, each scored or failed: a piece that raises is halved until the item that does it is alone."""
    try:
        return [(works, scorer.score(works), False)]
    except Exception as error:
        log("scoring_failed", level="error", error=type(error).__name__, items=len(works))
        if len(works) == 1:
            return [(works, scorer.failed(works, SCORING_FAILED), True)]
    half = len(works) // 2
    return [*_isolated(scorer, works[:half]), *_isolated(scorer, works[half:])]


def refusal_of(error: BaseException) -> Refusal:
    """What the sender is told of an error: nothing but that there was one."""
    return error if isinstance(error, Refusal) else internal()
