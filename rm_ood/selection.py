"""Best-of-n that does not pick what the reward model cannot judge, with a false-alarm rate that holds for the winner.

Flagging each of n candidates at alpha takes away an in-distribution winner up to n alpha of the time, since high rewards and
high OOD scores go together. Two rules hold alpha for the winner itself:

- **alpha / n**: each candidate at alpha / n, by a union bound; needs n times the calibration prompts.
- **winner**: best-of-n is played on calibration prompts, and the winners' scores give the threshold (`Winners`). A prompt
  with its n candidates is one draw, so it is exact, and needs no more prompts than `alpha` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from rm_ood.calls import read_call
from rm_ood.conformal import Pool, guaranteed_rank, minimum_calibration
from rm_ood.decision import Decisions
from rm_ood.dialogue import Response, Text, check_prompt
from rm_ood.errors import CalibrationError, InputError, MismatchError, NonFiniteError
from rm_ood.fit import check_overlap
from rm_ood.guard import OODGuard
from rm_ood.penalty import RESPONSE, verdict_scores
from rm_ood.power import share_interval
from rm_ood.preferences import prompt_key

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
HIGHEST, PASSED_OVER, LEAST_OOD = "highest_reward", "passed_over", "least_ood"


@dataclass(frozen=True)
class Winners:
    """Winners of best-of-n on calibration prompts: `Winners.fit(guard, prompts, responses)`.

    Attributes:
        n: candidates per prompt. axis: whose OOD score is read, as in `best_of_n`.
        alpha, confidence: what the threshold promises. pool: the winners' scores, their k and threshold.
        calibration: axis -> digest of the guard's calibration scores, which the winners' scores are in the unit of.
    """

    n: int
    axis: str | None
    alpha: float
    confidence: float | None
    pool: Pool = field(repr=False)
    calibration: Mapping[str, str] = field(repr=False)

    @classmethod
    def fit(
        cls,
        guard: OODGuard,
        prompts: Sequence[Text],
        responses: Sequence[Sequence[Response]],
        *,
        alpha: float | None = None,
        axis: str | None = RESPONSE,
        groups: Sequence[str] | None = None,
        progress: bool = False,
    ) -> Winners:
        """Play best-of-n on prompts that are neither fitted nor calibrated on; they do not count as traffic.

        Args:
            prompts: in-distribution prompts, as many as `alpha` needs (299 for 1 % at 95 %). Of prompts whose first user
                turn is the same only the first is played.
            responses: n in-distribution answers to each, from the kind of policy that will be guarded.
            alpha: by default the guard's; the confidence is the guard's.
            groups: one label per prompt, for a guard with a grouping column.
        Raises:
            InputError: prompts with differing numbers of answers, or none. CalibrationError: too few prompts, or some that
                were fitted on.
            NonFiniteError: a prompt none of whose answers has a reward.
        """
        counts = _candidates(responses)
        if len(counts) != 1:
            raise InputError(f"responses: expected as many answers to each prompt, got {sorted(counts)}")
        config = guard.config
        level = config.alpha if alpha is None else alpha
        first: dict[int, int] = {}
        for i, prompt in enumerate(prompts):
            text = check_prompt(prompt, f"prompts[{i}]", allow_empty=config.allow_empty, max_chars=config.max_chars)
            first.setdefault(prompt_key(text), i)
        _enough(len(first), level, config.confidence, "")
        check_overlap(first, guard.state.fit_keys)
        if len(responses) != len(prompts) or (groups is not None and len(groups) != len(prompts)):
            sizes = f"{len(responses)} lists of responses" if groups is None else f"{len(groups)} labels"
            raise InputError(f"{len(prompts)} prompts and {sizes}: expected as many of each")
        rows = list(first.values())
        labels = None if groups is None else [groups[i] for i in rows]
        rounds = _rounds(guard, [prompts[i] for i in rows], [responses[i] for i in rows], labels, progress)
        scores = [float(verdict_scores(d, axis)[_highest(d.rewards)]) for d in rounds]
        calibrated = np.where(np.isfinite(scores), scores, np.inf)
        pool = Pool.fit(calibrated, level, config.confidence)
        return cls(counts.pop(), axis, level, config.confidence, pool, _calibration(rounds[0], axis))


@dataclass(frozen=True)
class BestOfN:
    """What was picked, and why.

    Attributes:
        index, response, reward: the pick.
        why: `"highest_reward"`; `"passed_over"`: the highest reward among those that are not flagged; `"least_ood"`: all
            are flagged, and this is the least strange.
        unguarded: index of the highest reward, what plain best-of-n picks.
        flagged: (n,) candidates that may not win, at the level that holds `alpha` for the winner.
        rule: `"alpha / n"` or `"winner"`.
        decisions: the guard's own verdicts on the candidates.
    """

    index: int
    response: Response
    reward: float
    why: str
    unguarded: int
    flagged: Bools
    alpha: float
    rule: str
    decisions: Decisions

    @property
    def given_up(self) -> float:
        """Reward that the unguarded pick has more, >= 0; on in-distribution candidates this is the regret."""
        return float(self.decisions.rewards[self.unguarded]) - self.reward

    @property
    def explanation(self) -> str:
        """One sentence for a log."""
        n, flagged = len(self.flagged), int(self.flagged.sum())
        if self.why == HIGHEST:
            return f"candidate {self.index} of {n} has the highest reward and is not flagged"
        if self.why == PASSED_OVER:
            return (
                f"candidate {self.unguarded} has the highest reward but is out-of-distribution at {self.rule}, alpha "
                f"{self.alpha:g}; of the {n - flagged} others candidate {self.index} has the highest, {self.given_up:.3g} less"
            )
        return f"all {n} candidates are out-of-distribution; candidate {self.index} is the least so"


@dataclass(frozen=True)
class Regret:
    """What guarding best-of-n costs on in-distribution prompts, in the reward model's own units.

    Attributes:
        prompts: how many were played. changed: how often another response was picked than without a guard.
        interval: exact 95 % interval of that share. mean: reward given up per prompt. in_sd: the same in standard deviations
            of the reward on the fit data. largest: the most that one prompt lost.
    """

    prompts: int
    changed: int
    interval: tuple[float, float]
    mean: float
    in_sd: float
    largest: float


def best_of_n(
    prompt: Text,
    responses: Sequence[Response],
    guard: OODGuard,
    alpha: float | None = None,
    *,
    axis: str | None = RESPONSE,
    winners: Winners | None = None,
    group: str | None = None,
) -> BestOfN:
    """The response with the highest reward among those that the reward model can judge.

    Where all n responses are in-distribution, the one with the highest reward is passed over with probability `alpha` at
    most, given a calibration set of the guard's confidence. Where all are flagged, the least strange one is returned and
    `why` says so.

    Args:
        prompt: a string, messages, or a `Dialogue`.
        responses: n candidates, at least one.
        guard: calibrated, on its model.
        alpha: by default the guard's, or that of `winners`.
        axis: whose verdict counts: by default the response's, which is what the candidates differ in; None: the whole.
        winners: threshold from best-of-n on calibration prompts with as many candidates; without it the rule is alpha / n.
        group: the prompt's group, for a guard with a grouping column.
    Raises:
        InputError: no response, or winners of another n, alpha or axis.
        MismatchError: winners of another guard, or of this one before it was calibrated anew.
        CalibrationError: too few calibration prompts for alpha / n; names the number missing.
        NonFiniteError: no response has a finite reward.
    """
    if isinstance(responses, str) or not len(responses):
        raise InputError("responses: expected a list of at least one candidate")
    # A message by itself would be read as a conversation.
    candidates = [[one] if isinstance(one, Mapping) else one for one in responses]
    level, n = _level(guard, alpha, winners), len(candidates)
    _fits(guard, n, level, axis, winners)
    decisions = guard.check([prompt], [candidates], groups=None if group is None else [group] * n)
    return choose(decisions, responses, guard, level, axis=axis, winners=winners)


def choose(
    decisions: Decisions,
    responses: Sequence[Response],
    guard: OODGuard,
    alpha: float | None = None,
    *,
    axis: str | None = RESPONSE,
    winners: Winners | None = None,
) -> BestOfN:
    """`best_of_n` on verdicts that are there already, such as `guard.check_embeddings` gives; arguments as there.

    Args:
        decisions: of the n candidates of one prompt.
    """
    if len(decisions) != len(responses):
        raise InputError(f"{len(responses)} responses and {len(decisions)} verdicts: expected as many of each")
    if not len(responses):
        raise InputError("responses: expected at least one candidate")
    level = _level(guard, alpha, winners)
    _fits(guard, len(decisions), level, axis, winners)
    if winners is not None and any(_calibration(decisions, axis).values()):
        _same(winners, _calibration(decisions, axis))
    scores, p = verdict_scores(decisions, axis), decisions.p_values if axis is None else decisions.axis(axis).p_values
    scored = np.isfinite(decisions.rewards)
    if winners is None:
        flagged = p <= level / len(decisions)
    else:
        flagged = winners.pool.p_value(scores, winners.confidence) <= winners.alpha
    flagged = flagged | ~scored
    unguarded = _highest(decisions.rewards)
    if not flagged[unguarded]:
        index, why = unguarded, HIGHEST
    elif not flagged.all():
        index, why = _highest(np.where(flagged, np.nan, decisions.rewards)), PASSED_OVER
    else:
        strangeness = np.where(scored & np.isfinite(scores), scores, np.inf)
        # Of equally strange ones the one with the highest reward; what has no reward comes last.
        order = np.lexsort((np.where(scored, -decisions.rewards, np.inf), ~scored, strangeness))
        index, why = int(order[0]), LEAST_OOD
    return BestOfN(
        index=index,
        response=responses[index],
        reward=float(decisions.rewards[index]),
        why=why,
        unguarded=unguarded,
        flagged=flagged,
        alpha=level,
        rule="alpha / n" if winners is None else "winner",
        decisions=decisions,
    )


def id_regret(
    guard: OODGuard,
    prompts: Sequence[Text],
    responses: Sequence[Sequence[Response]],
    alpha: float | None = None,
    *,
    axis: str | None = RESPONSE,
    winners: Winners | None = None,
    groups: Sequence[str] | None = None,
    progress: bool = False,
) -> Regret:
    """Play guarded and plain best-of-n on in-distribution prompts; they do not count as traffic.

    Args:
        prompts: fresh prompts, at least one. responses: candidates for each.
        alpha, axis, winners: as in `best_of_n`. groups: one label per prompt.
    Raises:
        As `best_of_n`.
    """
    if not len(prompts):
        raise InputError("prompts: got none")
    for n in _candidates(responses):
        _fits(guard, n, _level(guard, alpha, winners), axis, winners)
    rounds = _rounds(guard, prompts, responses, groups, progress)
    picks = [
        choose(d, answers, guard, alpha, axis=axis, winners=winners)
        for d, answers in zip(rounds, responses, strict=True)
    ]
    lost = np.array([pick.given_up for pick in picks])
    changed = sum(pick.index != pick.unguarded for pick in picks)
    mean = float(lost.mean())
    return Regret(
        len(picks), changed, share_interval(changed, len(picks)), mean, mean / guard.state.reward_sd, float(lost.max())
    )


def _rounds(
    guard: OODGuard,
    prompts: Sequence[Text],
    responses: Sequence[Sequence[Response]],
    groups: Sequence[str] | None,
    progress: bool,
) -> list[Decisions]:
    """Verdicts on each prompt's candidates, apart from the guard's traffic."""
    scoring = guard.scoring()
    scoring = replace(scoring, ends=copy(scoring.ends))
    nested = [[[one] if isinstance(one, Mapping) else one for one in answers] for answers in responses]
    call = read_call(list(prompts), nested, guard.config)
    if groups is not None and len(groups) != len(prompts):
        raise InputError(f"groups: {len(groups)} labels for {len(prompts)} prompts")
    labels = None if groups is None else [groups[i] for i in call.prompt_index]
    scored, part = scoring.score(scoring.encode(call.items), progress=progress)
    decisions = scoring.state.decide(scored, part, groups=labels, prompt_index=call.prompt_index)
    return [decisions[np.flatnonzero(call.prompt_index == i)] for i in range(len(prompts))]


def _candidates(responses: Sequence[Sequence[Response]]) -> set[int]:
    """How many answers the prompts have.

    Raises:
        InputError: a prompt with one bare answer, which would be read letter by letter, or with none.
    """
    for i, answers in enumerate(responses):
        if isinstance(answers, (str, Mapping)) or not len(answers):
            raise InputError(f"responses[{i}]: expected a list of at least one candidate")
    return {len(answers) for answers in responses}


def _highest(rewards: Floats) -> int:
    finite = np.where(np.isfinite(rewards), rewards, -np.inf)
    if not np.isfinite(rewards).any():
        raise NonFiniteError("no response has a finite reward, so none can be picked")
    return int(finite.argmax())


def _level(guard: OODGuard, alpha: float | None, winners: Winners | None) -> float:
    if winners is not None:
        return winners.alpha if alpha is None else alpha
    return guard.config.alpha if alpha is None else alpha


def _fits(guard: OODGuard, n: int, alpha: float, axis: str | None, winners: Winners | None) -> None:
    """Whether alpha can be held for the winner of n; before the forwards."""
    if winners is not None:
        if (winners.n, winners.alpha, winners.axis) != (n, alpha, axis):
            raise InputError(
                f"winners of n={winners.n}, alpha={winners.alpha}, axis={winners.axis!r}: asked for n={n}, alpha={alpha}, "
                f"axis={axis!r}. Fit Winners for those"
            )
        digests = guard.state.profile(guard.config.joined).digests
        _same(winners, digests if axis is None else {axis: digests.get(axis, "")})
        return
    state = guard.state
    smallest = min(scores.size for scores, _ in state.profile(state.config.joined).axis_pools(axis))
    _enough(smallest, alpha / n, state.config.confidence, f"alpha={alpha} for the winner of {n}: ")


def _calibration(decisions: Decisions, axis: str | None) -> dict[str, str]:
    """Axis -> digest of the calibration, of the axes whose scores are read."""
    return {name: one.calibration for name, one in decisions.axes.items() if axis in (None, name)}


def _same(winners: Winners, calibration: Mapping[str, str]) -> None:
    if winners.calibration != calibration:
        raise MismatchError(
            f"winners: their scores are of another calibration on {sorted(winners.calibration)}, by another guard, or by this "
            "one before calibrate(), fit() or keep(), or of vectors without span lengths. Fit Winners anew"
        )


def _enough(prompts: int, alpha: float, confidence: float | None, what: str) -> None:
    if guaranteed_rank(prompts, alpha, confidence) == 0:
        need = minimum_calibration(alpha, confidence)
        raise CalibrationError(
            f"{what}a level of {alpha:g} at confidence {confidence} needs {need} prompts to rank among: have {prompts}, need "
            f"{need - prompts} more. Calibrate on more prompts, raise alpha, or fit Winners on prompts with as many candidates"
        )
