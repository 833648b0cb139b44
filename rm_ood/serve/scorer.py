"""What a server scores with: a guard on its reward model, behind the few calls that the server needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rm_ood.artifact import guard_digest
from rm_ood.card import GuardCard
from rm_ood.config import GuardConfig
from rm_ood.decision import Decisions
from rm_ood.dialogue import Response, Text
from rm_ood.embed import Embedded, span_facts
from rm_ood.errors import MismatchError
from rm_ood.guard import OODGuard
from rm_ood.monitor import TrafficMonitor
from rm_ood.read_back import ReadBack
from rm_ood.serve.refusal import Refusal, internal
from rm_ood.state import ChannelScores, FittedState
from rm_ood.text import Encoded


@dataclass(frozen=True)
class Query:
    """One item of a request.

    Attributes:
        name: its id in the reply.
        prompt, response: checked texts.
        session: whose traffic it is; items of one session are not independent.
        group: for a guard with a grouping column.
        where: what an error calls it.
    """

    name: str
    prompt: Text
    response: Response
    session: Hashable
    group: str | None = None
    where: str = "item"


@dataclass(frozen=True)
class Work:
    """A query, tokenised."""

    query: Query
    encoded: Encoded

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.encoded.input_ids)


class Scorer(Protocol):
    """What the server asks of whoever scores. Calls come from threads, `score` from `concurrency` of them at a time."""

    @property
    def digest(self) -> str:
        """Which guard this is."""

    @property
    def config(self) -> GuardConfig:
        """The guard's settings."""

    @property
    def batch_size(self) -> int:
        """Most items that `score` takes at once."""

    @property
    def concurrency(self) -> int:
        """How many calls of `score` may run at once."""

    @property
    def problem(self) -> str | None:
        """Why nothing can be scored now, in fixed words; None: it can."""

    @property
    def card(self) -> GuardCard:
        """The guard's card."""

    @property
    def withheld_reward(self) -> float:
        """What stands for the reward of an item whose reward is not given out."""

    def split(self, text: str, prompt: str | None, where: str) -> tuple[Text, str]:
        """Prompt and response of a rendered text. Raises InputError where they cannot be told apart."""

    def encode(self, queries: Sequence[Query]) -> list[Work]:
        """Tokenise. Raises InputError for an item that cannot be encoded."""

    def score(self, works: Sequence[Work]) -> Decisions:
        """Rewards and verdicts of one batch.

        Raises Refusal where no item could be scored now; any other error may be one item's fault.
        """

    def failure(self) -> Refusal:
        """The answer to a request of which every item failed."""

    def failed(self, works: Sequence[Work], reason: str) -> Decisions:
        """Verdicts on items that could not be scored: no reward, flagged, with the reason."""

    def monitor(self, path: Path | None) -> TrafficMonitor:
        """An alarm on this guard's traffic, going on from a saved state."""

    def close(self) -> None:
        """Let go of the model."""


class StateScorer(ABC):
    """What every scorer does with a guard's fitted state, wherever the scores come from.

    Args:
        guard: calibrated; `state` is its fitted state.
        tokenizer: the reward model's.
        batch_size: items that `score` takes.

    Raises:
        NotFittedError: the guard is not fitted or not calibrated.
    """

    concurrency = 1
    problem: str | None = None

    def __init__(self, guard: OODGuard, state: FittedState, tokenizer: Any, batch_size: int) -> None:
        # One that is not calibrated says so before it is served.
        state.profile(state.config.joined)
        self.guard = guard
        self.config = guard.config
        self.batch_size = batch_size
        self._state = state
        self._read_back = ReadBack(tokenizer, state.config.text_format)
        self.digest = guard_digest(*state.to_saved())
        self.card = guard.report()
        self.withheld_reward = state.reward_floor

    def split(self, text: str, prompt: str | None, where: str) -> tuple[Text, str]:
        """See `Scorer`."""
        return self._read_back.split(text, prompt, where)

    def encode(self, queries: Sequence[Query]) -> list[Work]:
        """See `Scorer`."""
        encoded = self._encode([(query.prompt, query.response) for query in queries])
        return [Work(query, item) for query, item in zip(queries, encoded, strict=True)]

    @abstractmethod
    def _encode(self, items: Sequence[tuple[Text, Response]]) -> list[Encoded]:
        """Tokenise."""

    def failure(self) -> Refusal:
        """See `Scorer`."""
        return internal()

    def failed(self, works: Sequence[Work], reason: str) -> Decisions:
        """See `Scorer`."""
        n, state = len(works), self._state
        names = state.channel_names
        classes = {
            name: np.full((n, len(d.classes_)), np.nan) for name, d in state.detectors.items() if len(d.classes_) > 1
        }
        scores = ChannelScores(names, np.full((n, len(names)), np.nan), classes)
        lengths, reasons, truncated = span_facts([work.encoded for work in works])
        return self._decide(works, scores, Embedded({}, np.full(n, np.nan), lengths, [reason] * n, reasons, truncated))

    def _decide(self, works: Sequence[Work], scored: ChannelScores, part: Embedded) -> Decisions:
        groups = None
        if self.config.group_column is not None:
            groups = [str(work.query.group) for work in works]
        return self._state.decide(scored, part, groups=groups)

    def monitor(self, path: Path | None) -> TrafficMonitor:
        """See `Scorer`."""
        return self.guard.monitor(path)


class GuardScorer(StateScorer):
    """A guard with its model.

    Args:
        guard: calibrated, with its model.
        batch_size: items in one forward, at most the guard's own; None: as many.

    Raises:
        NotFittedError: the guard is not fitted or not calibrated. MismatchError: it has no model.
    """

    def __init__(self, guard: OODGuard, batch_size: int | None = None) -> None:
        if guard.model is None:
            raise MismatchError("this guard has no reward model: load it with one to serve it")
        self._scoring = guard.scoring()
        own = guard.config.batch_size
        size = own if batch_size is None else min(own, batch_size)
        super().__init__(guard, self._scoring.state, guard.tokenizer, size)

    def _encode(self, items: Sequence[tuple[Text, Response]]) -> list[Encoded]:
        return self._scoring.encode(items)

    def score(self, works: Sequence[Work]) -> Decisions:
        """See `Scorer`."""
        scored, part = self._scoring.score([work.encoded for work in works])
        return self._decide(works, scored, part)

    def close(self) -> None:
        """See `Scorer`."""
        self.guard.detach()
