"""Verdicts on a trainer's rollouts: by a guard in this process, or by a served one beside a copy of it here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rm_ood.calls import read_call
from rm_ood.client import GuardClient, ScoreReply
from rm_ood.conformal import p_of_rank, ranks
from rm_ood.decision import Decisions
from rm_ood.dialogue import Dialogue, messages_of
from rm_ood.errors import InputError, MismatchError
from rm_ood.guard import OODGuard
from rm_ood.monitor_inputs import session_key
from rm_ood.penalty import verdict_scores

Items = Sequence[tuple[Any, Any]]


def judged_here(
    guard: OODGuard,
    items: Items,
    groups: Sequence[str] | None = None,
    *,
    tools: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Decisions:
    """Verdicts of a guard on its model, apart from the guard's own look at its traffic, which would count every answer.

    Args:
        items: (prompt, response) each, at least one.
        groups, tools, chat_template_kwargs: as in `OODGuard.check`.
    Raises:
        InputError: names the item as `items[i]`; nothing is scored.
    """
    scoring = guard.scoring()
    call = read_call(*_columns(items), guard.config, tools=tools, template_kwargs=chat_template_kwargs)
    scored, part = scoring.score(scoring.encode(call.items))
    return scoring.state.decide(scored, part, groups=groups, prompt_index=call.prompt_index)


class ServedGuard:
    """A served guard beside a copy of it: verdicts come from there, thresholds and spreads from here.

    Each reply has to be of the copy's calibration: its p-values must be the ranks of its scores among the copy's calibration
    scores, and its flags at the copy's alpha. So one that was replaced, or calibrated anew, is noticed at once.

    Args:
        client: of the served guard.
        guard: the same guard, calibrated; it needs no model (`OODGuard.from_pretrained(path)`).

    Raises:
        NotFittedError: the copy is not fitted or not calibrated.
    """

    def __init__(self, client: GuardClient, guard: OODGuard) -> None:
        guard.state.profile(guard.config.joined)
        self.client, self.guard = client, guard

    def score(
        self,
        items: Items,
        groups: Sequence[str] | None = None,
        sessions: Sequence[str] | None = None,
        *,
        tools: Any = None,
        chat_template_kwargs: Any = None,
    ) -> ScoreReply:
        """Verdicts on (prompt, response) items, at least one.

        Args:
            groups: for a guard with a grouping column.
            sessions: for the server's own alarm; it is sent a hash of each.
            tools, chat_template_kwargs: for every prompt, as in `OODGuard.check`.
        Raises:
            UnavailableError: no answer after every try. EngineError: refused, or another answer than was asked for.
            MismatchError: another guard, or calibration, than the copy. InputError: names the item as `items[i]`.
        """
        if self.guard.config.group_column is not None and groups is None:
            raise InputError(f"groups: this guard is calibrated by {self.guard.config.group_column!r}")
        keys = None if sessions is None else [f"{session_key(name):016x}" for name in sessions]
        alpha = self.guard.config.alpha
        prompts, responses = _columns(items)
        if tools or chat_template_kwargs:
            prompts = [Dialogue(messages_of(prompt), tools or [], chat_template_kwargs or {}) for prompt in prompts]
        reply = self.client.score(prompts, responses, sessions=keys, groups=groups, alpha=alpha)
        self._compare(reply.decisions)
        return reply

    def _compare(self, decisions: Decisions) -> None:
        profile = self.guard.state.profile(self.guard.config.joined)
        own = set(profile.axis_scores())
        if own != set(decisions.axes):
            raise MismatchError(f"the served guard judges {sorted(decisions.axes)}, the copy here {sorted(own)}")
        found = {axis: decisions.axis(axis).p_values for axis in decisions.axes}
        for axis, p_values in [(None, decisions.p_values), *found.items()]:
            scores = verdict_scores(decisions, axis)
            # Of several groups' pools the reply does not say which was ranked in.
            expected = [
                p_of_rank(ranks(pool, scores), pool.size, profile.confidence) for pool, _ in profile.axis_pools(axis)
            ]
            same = np.any([np.isclose(p_values, p, rtol=1e-9, atol=0) for p in expected], axis=0)
            if not same[np.isfinite(scores)].all():
                raise MismatchError(
                    "the served guard's p-values are not of the calibration of the copy here: another guard is served, or one "
                    "that was calibrated anew. Load the copy from the folder that the server was started with"
                )


def _columns(items: Items) -> tuple[list[Any], list[Any]]:
    return [prompt for prompt, _ in items], [response for _, response in items]
