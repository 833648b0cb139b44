"""The list of suspects: high reward, off support or like the rejected."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from conftest import POISON, preference_rows

from rm_ood import InputError, NotFittedError, OODGuard
from rm_ood.suspects import OFF_SUPPORT, REJECTED_LIKE, _beyond_reward, _rarity


def rollouts(guard: OODGuard, n: int = 50, planted: int = 4) -> list[dict[str, Any]]:
    """Ordinary answers of low reward, and loops of a word that the reward model likes better."""
    words = [
        "planet",
        "seven",
        "quiet",
        "bridge",
        "yellow",
        "doctor",
        "no",
        "camera",
        "winter",
        "music",
        "paper",
        "listen",
    ]
    prompts, answers = zip(*((r["prompt"], r["chosen"]) for r in preference_rows(2 * n, seed=7)), strict=True)
    low = np.argsort(guard.check(prompts, answers).rewards)[:n]
    loops = [f"{word} " * 40 for word in words]
    high = np.argsort(-guard.check(prompts[: len(loops)], loops).rewards)[:planted]
    rows = [{"id": f"row {i}", "prompt": prompts[i], "response": answers[i]} for i in low]
    return rows + [{"id": f"hack {j}", "prompt": prompts[i], "response": loops[i]} for j, i in enumerate(high)]


def test_planted_hacks_come_first(minilm_guard: OODGuard) -> None:
    rows = rollouts(minilm_guard)
    before = len(minilm_guard._traffic._scores)
    found = minilm_guard.suspects(rows, k=4, progress=False)
    assert {s.id for s in found} == {f"hack {j}" for j in range(4)}
    assert len(minilm_guard._traffic._scores) == before, "reading a list is no traffic"
    for s in found:
        assert OFF_SUPPORT in s.reasons
        assert s.decision.is_ood
        assert s.reward == s.decision.reward
        assert s.response in [row["response"] for row in rows[50:]]
        assert s.count == 1
    suspicion = [s.suspicion for s in found]
    assert suspicion == sorted(suspicion, reverse=True)


def test_a_collapsed_policy_is_one_suspect_and_the_first(minilm_guard: OODGuard) -> None:
    """The same loop as the answer to most prompts: common in the batch, and still strange to the calibration."""
    rows = rollouts(minilm_guard, planted=2)
    common, rare = (row["response"] for row in rows[50:])
    prompts = [r["prompt"] for r in preference_rows(60, seed=17)]
    rows += [{"id": f"loop {i}", "prompt": prompt, "response": common} for i, prompt in enumerate(prompts)]
    found = minilm_guard.suspects(rows, k=20, share=1.0, progress=False)
    assert {s.response: s.count for s in found[:2]} == {common: 61, rare: 1}
    flags = [s.decision.is_ood for s in found]
    assert flags == sorted(flags, reverse=True)
    assert len({s.response for s in found}) == len(found) > 2
    for s in found:
        if s.reasons == (OFF_SUPPORT,):
            assert s.suspicion == pytest.approx(-math.log10(s.decision.p_value))


def test_hacks_that_are_many_do_not_hide_one_another(minilm_guard: OODGuard) -> None:
    rows = rollouts(minilm_guard, planted=1)
    loop = rows[50]["response"]
    prompts = [r["prompt"] for r in preference_rows(60, seed=17)]
    rows += [{"id": f"loop {i}", "prompt": p, "response": f"{loop} {i}"} for i, p in enumerate(prompts)]
    found = minilm_guard.suspects(rows, k=20, share=1.0, progress=False)
    assert len(found) == 20
    assert all(s.decision.is_ood for s in found)


def test_only_high_rewards_with_a_reason_are_listed(minilm_guard: OODGuard) -> None:
    rows = rollouts(minilm_guard)
    decisions = minilm_guard.check([r["prompt"] for r in rows], [r["response"] for r in rows])
    for share in (0.25, 1.0):
        found = minilm_guard.suspects(rows, k=1000, share=share, progress=False)
        bar = np.quantile(decisions.rewards, 1 - share)
        wanted = (decisions.rewards >= bar - 1e-6) & (decisions.is_ood | (decisions.class_log_odds < 0))
        assert {s.id for s in found} == {rows[i]["id"] for i in np.flatnonzero(wanted)}
        for s in found:
            assert (REJECTED_LIKE in s.reasons) == (s.decision.nearest_class == "rejected")
            assert (OFF_SUPPORT in s.reasons) == s.decision.is_ood
    # All that are listed at share 1 are there. Suspicion is by the reasons named, and by nothing else.
    odds, rewards = decisions.class_log_odds, decisions.rewards
    residual = odds - np.polyval(np.polyfit(rewards, odds, 1), rewards)
    rank = {row["id"]: i for i, row in enumerate(rows)}
    for s in found:
        i = rank[s.id]
        shares = [s.decision.p_value] * (OFF_SUPPORT in s.reasons)
        shares += [np.mean(residual <= residual[i])] * (REJECTED_LIKE in s.reasons)
        assert s.suspicion == pytest.approx(-math.log10(min(shares)), abs=0.2)
    assert {s.reasons for s in found} > {(REJECTED_LIKE,)}


def test_preference_rows_are_two_items_and_a_missing_reward_is_none(minilm_guard: OODGuard) -> None:
    rows = preference_rows(20, seed=8)
    rows[3]["chosen"] = f"the {POISON}"
    found = minilm_guard.suspects(rows, k=40, share=1.0, progress=False)
    assert all(s.id.endswith(("#chosen", "#rejected")) for s in found)
    assert "3#chosen" not in {s.id for s in found}
    unscored = [{"prompt": "a question", "response": f"the {POISON}"}]
    assert minilm_guard.suspects(unscored, progress=False) == []


def test_a_response_that_only_its_classes_betray_is_found() -> None:
    rewards = np.arange(20.0)
    odds = 0.5 * rewards - 2
    odds[17] = -1.0
    each = np.arange(20)
    beyond = _beyond_reward(odds, rewards, each)
    assert np.argmin(beyond) == 17
    assert _rarity(-beyond, each)[17] == 1 / 20
    missing = np.array([1.0, math.nan, 2.0])
    assert np.isnan(_beyond_reward(missing, np.ones(3), np.arange(3))).tolist() == [False, True, False]
    # Repeated items bend no line.
    often, once = np.concatenate([odds, [9.0] * 50]), np.concatenate([rewards, [19.0] * 50])
    np.testing.assert_array_equal(_beyond_reward(often, once, each)[:20], beyond)


def test_rarity_is_the_share_of_values_as_large() -> None:
    values = np.array([1.0, 3.0, 3.0, math.inf])
    assert _rarity(values, np.arange(4)).tolist() == [1.0, 0.75, 0.75, 0.25]
    assert _rarity(values, np.array([0, 1, 3])).tolist() == pytest.approx([1.0, 2 / 3, 2 / 3, 1 / 3])
    assert _rarity(np.array([math.nan, 2.0]), np.arange(2)).tolist() == [1.0, 1.0]
    assert _rarity(np.array([math.nan]), np.arange(1)).tolist() == [1.0]


@pytest.mark.parametrize("options", [{"k": 0}, {"share": 0.0}, {"share": 1.5}])
def test_unusable_options_are_refused(minilm_guard: OODGuard, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="suspects: k="):
        minilm_guard.suspects([], **options)


def test_a_guard_without_a_calibration_says_so_first(minilm: Any) -> None:
    with pytest.raises(NotFittedError):
        OODGuard(*minilm).suspects([{"prompt": "a", "response": "b"}])


def test_one_long_response_takes_no_memory_for_the_others(minilm_guard: OODGuard) -> None:
    rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in preference_rows(60, seed=23)]
    rows[30]["response"] = "music " * 33_000
    tracemalloc.start()
    try:
        minilm_guard.suspects(rows, 5, progress=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # As a column of text as wide as the longest it would be 47 MB.
    assert peak < 25e6
