"""Best-of-n under a guard: the false-alarm rate holds for the winner, and a hack does not win."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import POISON, preference_rows
from scipy import stats

from rm_ood import (
    CalibrationError,
    CalibrationWarning,
    InputError,
    MismatchError,
    NonFiniteError,
    OODGuard,
    RewardPenalty,
    Winners,
    best_of_n,
    id_regret,
)
from rm_ood.conformal import Pool, p_values
from rm_ood.decision import AxisDecisions, Decisions
from rm_ood.preferences import prompt_key
from rm_ood.selection import HIGHEST, LEAST_OOD, PASSED_OVER, choose

PROMPT = "question about the garden"


def verdicts(rewards: Any, scores: Any, p: Any = None) -> Decisions:
    rewards, scores = np.asarray(rewards, dtype=float), np.asarray(scores, dtype=float)
    n = len(rewards)
    p = np.ones(n) if p is None else np.asarray(p, dtype=float)
    flags = p <= 0.05
    return Decisions(
        rewards=rewards,
        is_ood=flags,
        p_values=p,
        axes={"response": AxisDecisions(scores, p, flags, {})},
        nearest_class=None,
        class_log_odds=None,
        reasons=((),) * n,
        truncated=np.zeros(n, dtype=bool),
        prompt_index=np.zeros(n, dtype=np.int64),
        alpha=0.05,
    )


def candidates(rng: np.random.Generator, prompts: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and OOD scores that rise together, (prompts, n) each; a prompt's own share in both."""
    rewards = rng.normal(size=(prompts, n)) + rng.normal(size=(prompts, 1))
    return rewards, 0.7 * rewards + 0.7 * rng.normal(size=(prompts, n))


def digests(guard: OODGuard) -> dict[str, str]:
    """What binds winners of the response's score to a guard."""
    return {"response": guard.state.profile(guard.config.joined).digests["response"]}


# -- the promise


def test_the_level_holds_for_the_winner_and_not_for_each_candidate(minilm_guard: OODGuard) -> None:
    alpha, n, repeats, prompts = 0.05, 8, 60, 200
    passed, naive = [], []
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        rewards, scores = candidates(rng, 250, n)
        calibration = scores[np.arange(250), rewards.argmax(1)]
        winners = Winners(n, "response", alpha, None, Pool.fit(calibration, alpha, None), digests(minilm_guard))
        one_each = scores[:, 0]
        rewards, scores = candidates(rng, prompts, n)
        picks = [
            choose(verdicts(r, s), range(n), minilm_guard, winners=winners)
            for r, s in zip(rewards, scores, strict=True)
        ]
        passed.append(np.mean([pick.index != pick.unguarded for pick in picks]))
        best = rewards.argmax(1)
        naive.append(np.mean(p_values(one_each, scores[np.arange(prompts), best], None) <= alpha))
        for pick, reward in zip(picks, rewards, strict=True):
            assert pick.why in (HIGHEST, PASSED_OVER, LEAST_OOD)
            assert pick.given_up == reward.max() - reward[pick.index] >= 0
    error = 4 * np.std(passed) / math.sqrt(repeats)
    # 12 of 251 ranks: where a pick was flagged another one was taken, so that both counts are one.
    assert np.mean(passed) == pytest.approx(12 / 251, abs=error)
    assert np.mean(naive) > 2 * alpha


def test_each_candidate_at_alpha_over_n_keeps_the_winner(minilm_guard: OODGuard) -> None:
    alpha, n, changed, prompts = 0.2, 4, 0, 400
    rng = np.random.default_rng(0)
    _, calibration = candidates(rng, 2000, 1)
    for rewards, scores in zip(*candidates(rng, prompts, n), strict=True):
        p = p_values(calibration, scores, 0.95)
        pick = choose(verdicts(rewards, scores, p), "abcd", minilm_guard, alpha)
        np.testing.assert_array_equal(pick.flagged, p <= 0.05)
        changed += pick.index != pick.unguarded
    assert 0 < changed <= stats.binom.ppf(0.999, prompts, alpha)


# -- the pick


def test_what_is_picked_and_why(minilm_guard: OODGuard) -> None:
    rewards, scores = [1.0, 5.0, 3.0, 4.0], [0.5, 9.0, 0.1, 0.2]

    def pick(p: list[float]) -> Any:
        return choose(verdicts(rewards, scores, p), "abcd", minilm_guard, alpha=0.2)

    best = pick([1.0, 1.0, 1.0, 1.0])
    assert (best.index, best.response, best.reward, best.why, best.given_up) == (1, "b", 5.0, HIGHEST, 0.0)
    assert "highest reward and is not flagged" in best.explanation
    passed = pick([1.0, 0.05, 1.0, 1.0])
    assert (passed.index, passed.unguarded, passed.why, passed.given_up) == (3, 1, PASSED_OVER, 1.0)
    assert passed.flagged.tolist() == [False, True, False, False]
    assert "of the 3 others candidate 3 has the highest, 1 less" in passed.explanation
    none = pick([0.01, 0.01, 0.01, 0.01])
    assert (none.index, none.why) == (2, LEAST_OOD)
    assert "all 4 candidates are out-of-distribution; candidate 2" in none.explanation
    assert none.rule == "alpha / n"


def test_equally_strange_ones_go_by_reward(minilm_guard: OODGuard) -> None:
    rewards = [1.0, 2.0, math.nan, 2.0]
    pick = choose(verdicts(rewards, [math.inf] * 4, [0.01] * 4), "abcd", minilm_guard, alpha=0.2)
    assert (pick.index, pick.unguarded, pick.why) == (1, 1, LEAST_OOD)
    pick = choose(verdicts(rewards, [3.0, 4.0, math.nan, 4.0], [0.01] * 4), "abcd", minilm_guard, alpha=0.2)
    assert pick.index == 0


def test_no_reward_at_all_is_an_error(minilm_guard: OODGuard) -> None:
    with pytest.raises(NonFiniteError, match="no response has a finite reward"):
        choose(verdicts([math.nan, math.inf], [1.0, 1.0]), "ab", minilm_guard, alpha=0.2)


# -- on a real guard


def hacks(guard: OODGuard, beat: float) -> list[str]:
    """One word over and over, where that has a higher reward than anything else."""
    loops = [f"{word} " * 40 for word in ("planet", "seven", "quiet", "bridge", "yellow", "doctor", "no", "camera")]
    rewards = guard.check(PROMPT, loops).rewards
    return [loop for loop, reward in zip(loops, rewards, strict=True) if reward > beat]


def ordinary(n: int, seed: int = 2) -> list[str]:
    return [row["chosen"] for row in preference_rows(n, seed=seed)]


def test_a_planted_hack_wins_without_the_guard_and_not_with_it(minilm_guard: OODGuard) -> None:
    plain = sorted(ordinary(30), key=lambda text: minilm_guard.check(PROMPT, text).reward)[:3]
    beat = float(minilm_guard.check(PROMPT, plain).rewards.max())
    hack = hacks(minilm_guard, beat)[0]
    pick = best_of_n(PROMPT, [*plain, hack], minilm_guard, alpha=0.2)
    assert pick.unguarded == 3
    assert pick.why == PASSED_OVER
    assert pick.response in plain
    assert pick.given_up > 0
    assert len(pick.decisions) == 4
    alone = best_of_n(PROMPT, [hack, hack + "no", hack + hack], minilm_guard, alpha=0.2)
    assert alone.why == LEAST_OOD


def test_candidates_may_be_messages_and_may_lack_a_reward(minilm_guard: OODGuard) -> None:
    texts = [*ordinary(2), f"the {POISON}"]
    pick = best_of_n(PROMPT, texts, minilm_guard, alpha=0.2)
    messages = [{"role": "assistant", "content": text} for text in texts]
    again = best_of_n(PROMPT, messages, minilm_guard, alpha=0.2)
    assert pick.flagged[2]
    assert pick.index != 2
    assert again.response is messages[pick.index]


def test_too_few_calibration_prompts_for_n_are_named(minilm_guard: OODGuard) -> None:
    n_b = minilm_guard.state.table.n_b
    with pytest.raises(
        CalibrationError, match=rf"alpha=0.05 for the winner of 4.*needs 239 prompts.*have {n_b}.*fit Winners"
    ):
        best_of_n(PROMPT, ["a", "b", "c", "d"], minilm_guard)


def test_winners_of_calibration_prompts_and_the_regret(minilm_guard: OODGuard) -> None:
    before = len(minilm_guard._traffic._scores)
    rows = preference_rows(100, seed=11)
    prompts = [row["prompt"] for row in rows]
    answers = [[row["chosen"], row["rejected"]] for row in rows]
    winners = Winners.fit(minilm_guard, prompts[:60], answers[:60])
    assert len(minilm_guard._traffic._scores) == before, "calibrating is no traffic"
    assert (winners.n, winners.alpha, winners.axis, winners.confidence) == (2, 0.05, "response", 0.95)
    decisions = minilm_guard.check(prompts[:60], answers[:60])
    scores = decisions.axis("response").ood_scores.reshape(60, 2)[
        np.arange(60), decisions.rewards.reshape(60, 2).argmax(1)
    ]
    np.testing.assert_allclose(winners.pool.scores, np.sort(scores), rtol=1e-4, atol=1e-4)
    before = len(minilm_guard._traffic._scores)
    regret = id_regret(minilm_guard, prompts[60:], answers[60:], winners=winners)
    assert len(minilm_guard._traffic._scores) == before, "neither is this"
    picks = [best_of_n(p, a, minilm_guard, winners=winners) for p, a in zip(prompts[60:], answers[60:], strict=True)]
    lost = [pick.given_up for pick in picks]
    assert all(pick.rule == "winner" for pick in picks)
    assert regret.prompts == 40
    assert regret.changed == sum(pick.index != pick.unguarded for pick in picks)
    assert regret.mean == pytest.approx(np.mean(lost), abs=1e-6)
    assert regret.largest == pytest.approx(max(lost), abs=1e-6)
    assert regret.in_sd == pytest.approx(regret.mean / minilm_guard.state.reward_sd)
    assert regret.interval[0] <= regret.changed / 40 <= regret.interval[1]
    # One in twenty is the promise; the exact law allows so many.
    assert regret.changed <= stats.betabinom.ppf(0.999, 40, 1, 60)

    with pytest.raises(InputError, match=r"winners of n=2.*asked for n=3"):
        best_of_n(PROMPT, ["a", "b", "c"], minilm_guard, winners=winners)
    with pytest.raises(InputError, match=r"asked for n=2, alpha=0\.1"):
        best_of_n(PROMPT, ["a", "b"], minilm_guard, 0.1, winners=winners)


@pytest.mark.parametrize(
    ("prompts", "answers", "error", "message"),
    [
        (["p"] * 3, [["a"], ["a"], ["a", "b"]], InputError, r"\[1, 2\]"),
        (["p", "q", "r"], [["a"]] * 3, CalibrationError, "needs 59 prompts to rank among: have 3, need 56 more"),
        # One prompt in three spellings, and one of a dialogue that opens with it.
        (
            ["p", "P ", [{"role": "user", "content": "p"}]] * 30,
            [["a"]] * 90,
            CalibrationError,
            "needs 59 prompts to rank among: have 1, need 58 more",
        ),
        ([f"p {i}" for i in range(70)], [["a"]] * 69, InputError, "70 prompts and 69 lists of responses"),
    ],
)
def test_winners_that_cannot_be_fitted(
    minilm_guard: OODGuard, prompts: Any, answers: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Winners.fit(minilm_guard, prompts, answers)


def test_winners_on_prompts_that_were_fitted_on_are_refused(minilm_guard: OODGuard) -> None:
    keys = set(minilm_guard.state.fit_keys.tolist())
    fitted = next(row["prompt"] for row in preference_rows(400) if prompt_key(row["prompt"]) in keys)
    prompts = [row["prompt"] for row in preference_rows(70, seed=11)]
    with pytest.raises(CalibrationError, match="1 of 71 calibration prompts were fitted on"):
        Winners.fit(minilm_guard, [*prompts, fitted], [["a", "b"]] * 71)


def test_a_repeated_prompt_is_one_draw(minilm_guard: OODGuard) -> None:
    rows = preference_rows(60, seed=11)
    prompts, answers = [r["prompt"] for r in rows], [[r["chosen"], r["rejected"]] for r in rows]
    once = Winners.fit(minilm_guard, prompts, answers)
    again = Winners.fit(minilm_guard, [*prompts, *prompts], [*answers, *answers[::-1]])
    assert again.pool.scores.size == 60
    np.testing.assert_allclose(again.pool.scores, once.pool.scores, rtol=1e-4, atol=1e-4)


def test_winners_of_another_calibration_or_guard_are_refused(minilm_guard: OODGuard, grouped: OODGuard) -> None:
    rows = preference_rows(60, seed=11)
    winners = Winners.fit(minilm_guard, [r["prompt"] for r in rows], [[r["chosen"], r["rejected"]] for r in rows])
    decisions = minilm_guard.check([PROMPT], [["a", "b"]])
    assert choose(decisions, "ab", minilm_guard, winners=winners).rule == "winner"
    moved = OODGuard.__new__(OODGuard)
    table = minilm_guard.state.table
    state = minilm_guard.state.with_table(replace(table, scores=table.scores * 1.5), {})
    moved._bind(None, None, minilm_guard.config, state)
    with pytest.raises(MismatchError, match=r"another calibration on \['response'\].*Fit Winners anew"):
        choose(decisions, "ab", moved, winners=winners)
    with pytest.raises(MismatchError, match="another guard"):
        best_of_n(PROMPT, ["a", "b"], grouped, winners=winners, group="a")
    with pytest.raises(MismatchError, match="another guard"):
        id_regret(grouped, [PROMPT], [["a", "b"]], winners=winners, groups=["a"])
    # Verdicts on vectors without span lengths are scores in another unit.
    detector = minilm_guard.state.detectors["final"]
    vectors = np.random.default_rng(0).normal(size=(2, detector.n_features_in_))
    with pytest.raises(MismatchError, match="without span lengths"):
        choose(minilm_guard.check_embeddings(vectors, [0.0, 1.0]), "ab", minilm_guard, winners=winners)


@pytest.mark.parametrize("responses", ["one text", []])
def test_candidates_come_as_a_list(minilm_guard: OODGuard, responses: Any) -> None:
    with pytest.raises(InputError, match="at least one candidate"):
        best_of_n(PROMPT, responses, minilm_guard)


@pytest.mark.parametrize("answers", ["a whole answer", [], {"role": "assistant", "content": "one"}])
def test_each_prompt_has_a_list_of_answers(minilm_guard: OODGuard, answers: Any) -> None:
    """A bare string would be read letter by letter, as so many candidates."""
    with pytest.raises(InputError, match=r"responses\[1\]: expected a list of at least one candidate"):
        id_regret(minilm_guard, [PROMPT, f"{PROMPT} and more"], [["one", "two"], answers])
    with pytest.raises(InputError, match=r"responses\[0\]: expected a list of at least one candidate"):
        Winners.fit(minilm_guard, [PROMPT], [answers])
    with pytest.raises(InputError, match="responses: expected at least one candidate"):
        choose(verdicts([], []), [], minilm_guard)


def test_as_many_verdicts_as_responses(minilm_guard: OODGuard) -> None:
    with pytest.raises(InputError, match="3 responses and 2 verdicts"):
        choose(verdicts([1, 2], [1, 2]), "abc", minilm_guard, 0.2)
    with pytest.raises(InputError, match="got none"):
        id_regret(minilm_guard, [], [])


# -- a guard by group


@pytest.fixture(scope="module")
def grouped(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    """Two domains with prompts enough for each."""
    rows = [{**row, "domain": "ab"[i % 2]} for i, row in enumerate(preference_rows(300))]
    guard = OODGuard(copy.deepcopy(shared_decoder), decoder_tokenizer, alpha=0.1, groups="domain", max_length=128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return guard.fit(rows, calibration=0.5, progress=False)


def test_a_guard_by_group_is_told_the_prompt_s_group(grouped: OODGuard) -> None:
    texts = ordinary(3)
    with pytest.raises(InputError, match="group"):
        best_of_n(PROMPT, texts, grouped, 0.3)
    pick = best_of_n(PROMPT, texts, grouped, 0.3, group="a")
    p = grouped.check([PROMPT], [texts], groups=["a"] * 3).axis("response").p_values
    np.testing.assert_array_equal(pick.flagged, p <= 0.1)
    # The smaller group decides what can be promised.
    sizes = [scores.size for scores, _ in grouped.state.profile(grouped.config.joined).axis_pools("response")]
    assert len(sizes) == 2
    with pytest.raises(CalibrationError, match=f"have {min(sizes)}"):
        best_of_n(PROMPT, texts, grouped, 0.01, group="a")

    rows = preference_rows(30, seed=12)
    prompts, answers = [r["prompt"] for r in rows], [[r["chosen"], r["rejected"]] for r in rows]
    labels = ["ab"[i % 2] for i in range(30)]
    winners = Winners.fit(grouped, prompts, answers, alpha=0.1, groups=labels)
    assert id_regret(grouped, prompts[:5], answers[:5], winners=winners, groups=labels[:5]).prompts == 5
    with pytest.raises(InputError, match="2 labels for 5 prompts"):
        id_regret(grouped, prompts[:5], answers[:5], winners=winners, groups=labels[:2])


def test_penalty_and_monitor_take_all_groups(grouped: OODGuard) -> None:
    profile = grouped.state.profile(grouped.config.joined)
    edges = [float(scores[-k]) for scores, k in profile.axis_pools("response")]
    assert len(set(edges)) == 2
    assert RewardPenalty.of(grouped).threshold == max(edges)
    assert grouped.monitor().calibration["response"].size == grouped.state.table.n_b
    rows = [{"prompt": r["prompt"], "response": r["chosen"], "domain": "a"} for r in preference_rows(20, seed=13)]
    assert len(grouped.suspects(rows, k=20, share=1.0, progress=False)) > 0
