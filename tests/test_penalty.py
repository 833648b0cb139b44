"""The reward penalty: nothing below the threshold, more beyond it, never more than the cap."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import POISON, preference_rows
from scipy import stats

from rm_ood import InputError, NotFittedError, OODGuard, RewardPenalty
from rm_ood.penalty import verdict_scores

PENALTY = RewardPenalty(threshold=2.0, spread=0.5, unit=3.0, strength=2.0, cap=4.0)


def test_the_formula() -> None:
    scores = [-math.inf, -9.0, 2.0, 2.25, 2.5, 3.0, 99.0, math.inf, math.nan]
    assert PENALTY(scores).tolist() == [12.0, 0.0, 0.0, 3.0, 6.0, 12.0, 12.0, 12.0, 12.0]
    assert PENALTY(2.25) == 3.0


def test_it_never_falls_and_does_not_jump() -> None:
    scores = np.linspace(-5, 10, 20_001)
    penalty = PENALTY(scores)
    steps = np.diff(penalty)
    assert (steps >= 0).all()
    assert steps.max() <= PENALTY.unit * PENALTY.strength / PENALTY.spread * (scores[1] - scores[0]) * 1.001
    assert penalty.max() == PENALTY.unit * PENALTY.cap


@pytest.mark.parametrize("name", ["spread", "unit", "strength", "cap"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_numbers_that_are_not_positive_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        replace(PENALTY, **{name: value})


def test_a_threshold_that_nothing_reaches_is_refused() -> None:
    with pytest.raises(InputError, match="threshold=inf"):
        replace(PENALTY, threshold=math.inf)


def decisions_of(guard: OODGuard) -> Any:
    rows = preference_rows(10, seed=6)
    loops = ["planet " * 40, "\u4f60\u597d " * 30, "seven seven"]
    prompts = [r["prompt"] for r in rows]
    return guard.check(prompts, [[r["chosen"], loops[i % 3]] for i, r in enumerate(rows)])


@pytest.mark.parametrize("axis", ["response", "prompt", None])
def test_a_guard_s_penalty_begins_where_its_flags_do(minilm_guard: OODGuard, axis: str | None) -> None:
    decisions = decisions_of(minilm_guard)
    penalty = RewardPenalty.of(minilm_guard, axis=axis, strength=0.5)
    assert penalty.unit == minilm_guard.state.reward_sd
    profile = minilm_guard.state.profile(minilm_guard.config.joined)
    scores = profile.calibration_scores() if axis is None else profile.axis_scores([axis])[axis]
    assert penalty.threshold == np.sort(scores)[-profile.pools["all"].k]
    assert penalty.spread == pytest.approx(stats.iqr(scores, scale="normal"))
    taken = decisions.rewards - penalty.apply(decisions)
    flagged = decisions.is_ood if axis is None else decisions.axis(axis).is_ood
    # One ulp of the reward may be lost in the subtraction.
    assert ((taken > 1e-9) == flagged).all()
    assert (penalty(verdict_scores(decisions, axis)) <= 3.0 * penalty.unit).all()
    assert axis == "prompt" or flagged.any()


def test_neutral_keeps_the_mean_of_each_group(minilm_guard: OODGuard) -> None:
    decisions = decisions_of(minilm_guard)
    penalty = RewardPenalty.of(minilm_guard)
    plain, neutral = penalty.apply(decisions), penalty.apply(decisions, neutral=True)
    assert (plain <= decisions.rewards).all()
    for prompt in range(10):
        group = decisions.prompt_index == prompt
        assert neutral[group].mean() == pytest.approx(decisions.rewards[group].mean())
        # What group-relative advantages see is the same.
        np.testing.assert_allclose(
            neutral[group] - neutral[group].mean(), plain[group] - plain[group].mean(), atol=1e-9
        )
    one = penalty.apply(decisions, groups=["all"] * 20, neutral=True)
    assert one.mean() == pytest.approx(decisions.rewards.mean())
    assert not np.allclose(one, neutral)
    with pytest.raises(InputError, match="20 labels"):
        penalty.apply(decisions, groups=[1, 2], neutral=True)


def test_neutral_groups_answers_that_are_listed_flat(minilm_guard: OODGuard) -> None:
    """The form that trainers use: each prompt once for each of its answers."""
    rows = preference_rows(10, seed=6)
    loops = ["planet " * 40, "\u4f60\u597d " * 30, "seven seven"]
    answers = [[r["chosen"], loops[i % 3]] for i, r in enumerate(rows)]
    flat = minilm_guard.check(
        [r["prompt"] for r in rows for _ in range(2)], [answer for pair in answers for answer in pair]
    )
    penalty = RewardPenalty.of(minilm_guard)
    neutral = penalty.apply(flat, neutral=True)
    assert (np.abs(neutral - flat.rewards) > 0.01).sum() >= 10
    nested = penalty.apply(decisions_of(minilm_guard), neutral=True)
    np.testing.assert_allclose(neutral, nested, atol=1e-3)


def test_neutral_groups_of_one_are_refused(minilm_guard: OODGuard) -> None:
    decisions = decisions_of(minilm_guard)
    penalty = RewardPenalty.of(minilm_guard)
    with pytest.raises(InputError, match="each of the 10 groups has one member"):
        penalty.apply(decisions[::2], neutral=True)
    assert len(penalty.apply(decisions[:0], neutral=True)) == 0
    assert len(penalty.apply(decisions[::2])) == 10


def test_neutral_gives_nothing_back_where_there_is_nothing_to_compare_with(minilm_guard: OODGuard) -> None:
    asked, odd = "a small question", "planet " * 40
    decisions = minilm_guard.check(asked, ["the river", odd, odd, f"the {POISON}"])
    penalty = RewardPenalty.of(minilm_guard)
    plain = penalty.apply(decisions)
    assert decisions.rewards[2] - plain[2] > 1e-3
    # Alone in its group, or beside one that has no reward.
    for groups in ([0, 0, 1, 2], [0, 0, 1, 1]):
        neutral = penalty.apply(decisions, groups=groups, neutral=True)
        assert neutral[2] == plain[2]
        assert neutral[:2].mean() == pytest.approx(decisions.rewards[:2].mean())


def test_an_item_without_a_reward_stays_without(minilm_guard: OODGuard) -> None:
    decisions = minilm_guard.check("a small question", ["the river", f"the {POISON}", "planet " * 40])
    penalty = RewardPenalty.of(minilm_guard)
    for neutral in (False, True):
        assert np.isnan(penalty.apply(decisions, neutral=neutral)).tolist() == [False, True, False]
    neutral = penalty.apply(decisions, neutral=True)
    assert np.nanmean(neutral) == pytest.approx(np.nanmean(decisions.rewards))


def test_a_guard_that_cannot_judge_is_refused(minilm_guard: OODGuard, minilm: Any) -> None:
    with pytest.raises(InputError, match="axis 'response_given_prompt': this guard judges"):
        RewardPenalty.of(minilm_guard, axis="response_given_prompt")
    with pytest.raises(NotFittedError):
        RewardPenalty.of(OODGuard(*minilm))
