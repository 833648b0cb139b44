"""Pólya bets: fair on clean traffic whatever the calibration set, quick on a changed one."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from rm_ood.bets import LEVELS, LOW_LEVELS, RATIOS, PolyaBets, Wealth, tie_keys
from rm_ood.errors import CalibrationError, FormatError

AUROC_92 = math.sqrt(2) * stats.norm.ppf(0.92)


def play(calibration: np.ndarray, scores: np.ndarray, *, limit: float = 1e6, seed: int = 0) -> tuple[np.ndarray, ...]:
    bets = PolyaBets(calibration, RATIOS, 2 * seed)
    return bets.advance(scores, tie_keys(len(scores), 0, 2 * seed + 1), limit)


def by_hand(calibration: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Evidence after all scores, one bet at a time; no ties."""
    n, ordered = len(calibration), sorted(calibration)
    grid = [(level * ratio, level, 1) for level in LEVELS for ratio in RATIOS]
    grid += [(level * ratio, level, -1) for level in LOW_LEVELS for ratio in RATIOS]
    grid = [bet for bet in grid if bet[0] < 0.9]
    ever, recent = [], []
    for target, level, side in grid:
        k, hits, s, r = math.floor(level * (n + 1)), 0, 0.0, 0.0
        edge = ordered[-k] if side > 0 else ordered[k - 1]
        for t, score in enumerate(scores):
            rho = (k + hits) / (n + 1 + t)
            q = max(target, rho)
            hit = side * (score - edge) > 0
            factor = q / rho if hit else (1 - q) / (1 - rho)
            x = t + 1 + math.e
            s = (s + 1 / (x * math.log(x) ** 2)) * factor
            r = (r + 1) * factor
            hits += hit
        ever.append(s)
        recent.append(r)
    kept = sum(1 / ((t + math.e) * math.log(t + math.e) ** 2) for t in range(1, len(scores) + 1))
    return float(np.mean(ever)) + 1 - kept, float(np.mean(recent))


@pytest.mark.parametrize("shift", [0.0, 1.0, -1.0])
def test_evidence_is_the_formula_s(shift: float) -> None:
    rng = np.random.default_rng(0)
    calibration, scores = rng.normal(size=250), rng.normal(size=120) + shift
    evidence, recent = play(calibration, scores, limit=math.inf)
    expected = by_hand(calibration, scores)
    assert (evidence[-1], recent[-1]) == pytest.approx(expected, rel=1e-9)


def test_a_bet_is_fair_given_any_past() -> None:
    # The chance of a hit after the past is that of the urn; the factor's mean over hit and miss is then 1.
    rng = np.random.default_rng(1)
    bets = PolyaBets(rng.normal(size=99), RATIOS, 0)
    for _ in range(50):
        t, n = bets.wealth.t, 99
        chance = ((bets._ranks + bets.hits) / (n + 1 + t))[bets._which]
        factors = {}
        for name, score in (("high", 1e9), ("low", -1e9), ("middle", float(np.median(bets.calibration)))):
            other = PolyaBets(bets.calibration, RATIOS, 0)
            other.restore(bets.to_dict())
            other.wealth.ever[:] = 1.0
            share = 1 / ((t + 1 + math.e) * math.log(t + 1 + math.e) ** 2)
            other.advance(np.array([score]), tie_keys(1, t, 1), math.inf)
            factors[name] = other.wealth.ever / (1 + share)
        hit = np.where(np.arange(chance.size) < bets.high.stop, factors["high"], factors["low"])
        np.testing.assert_allclose(chance * hit + (1 - chance) * factors["middle"], 1.0, rtol=1e-9)
        bets.advance(rng.normal(size=1) * 2, tie_keys(1, t, 1), math.inf)


@pytest.mark.parametrize(("n", "step"), [(200, 0.0), (1000, 0.0), (200, 0.5)], ids=["n200", "n1000", "ties"])
def test_clean_traffic_rarely_alarms_ever(n: int, step: float) -> None:
    """Heavy tails, few calibration scores, ties: bets that take the calibration's own tail rates for the truth fail this."""
    alarms = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        scores = rng.standard_t(3, size=n + 3000)
        if step:
            scores = np.round(scores / step) * step
        evidence, _ = play(scores[:n], scores[n:], seed=seed)
        alarms += bool((evidence >= 10).any())
    # P(ever reaching 10) <= 1/10: the 99.9 % point of the binomial law.
    assert alarms <= stats.binom.ppf(0.999, 150, 0.1)


def test_recurring_alarms_are_as_rare_as_promised() -> None:
    limit, length, streams = 200.0, 2000, 150
    counts, early = [], 0
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        _, recent = play(rng.normal(size=200), rng.normal(size=length), limit=limit, seed=seed)
        counts.append((recent >= limit).sum())
        early += bool((recent[:40] >= limit).any())
    # Alarms within T: T / limit on average at most; three standard errors of room.
    assert np.mean(counts) - 3 * np.std(counts) / math.sqrt(streams) <= length / limit
    assert np.mean(counts) > 0.2 * length / limit
    assert early <= stats.binom.ppf(0.999, streams, 40 / limit)


@pytest.mark.parametrize(("share", "goal"), [(0.1, 500), (0.25, 110), (0.5, 45), (1.0, 16)])
def test_a_change_after_clean_traffic_is_found_soon(share: float, goal: int) -> None:
    delays = []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=4000)
        scores[3000:] += AUROC_92 * (rng.random(1000) < share)
        evidence, _ = play(rng.normal(size=2000), scores, seed=seed)
        found = np.flatnonzero(evidence >= 100)
        delays.append(found[0] - 2999 if found.size else math.inf)
    assert 0 < np.median(delays) <= goal


def test_scores_that_shrink_are_found_too() -> None:
    delays = []
    for seed in range(15):
        rng = np.random.default_rng(seed)
        scores = np.concatenate([rng.normal(size=1000), rng.normal(-1, 0.5, size=300)])
        evidence, _ = play(rng.normal(size=2000), scores, seed=seed)
        delays.append(np.argmax(evidence >= 100) - 999)
        bets = PolyaBets(scores[:1000], RATIOS, seed)
        bets.advance(scores[1000:], tie_keys(300, 0, 1), math.inf)
        assert bets.wealth.evidence_of(bets.low) > 100 > bets.wealth.evidence_of(bets.high)
    assert 0 < np.median(delays) <= 80


def test_traffic_that_equals_one_calibrated_value_says_nothing() -> None:
    # Every comparison is a tie: broken by noise, a tie hits as often as a fresh score would.
    evidence, recent = play(np.zeros(400), np.zeros(3000))
    assert evidence.max() < 10
    assert recent.max() < 1e5
    bets = PolyaBets(np.zeros(400), RATIOS, 0)
    bets.advance(np.zeros(20_000), tie_keys(20_000, 0, 1), math.inf)
    low, high = stats.betabinom.ppf([0.0005, 0.9995], 20_000, bets._ranks[:, None], 401 - bets._ranks[:, None]).T
    assert ((low <= bets.hits) & (bets.hits <= high)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_has_no_score_is_the_largest(value: float) -> None:
    rng = np.random.default_rng(2)
    calibration, scores = rng.normal(size=500), rng.normal(size=30)
    scores[5:25] = value
    np.testing.assert_array_equal(
        play(calibration, scores), play(calibration, np.where(np.isfinite(scores), scores, 1e9))
    )
    assert play(calibration, scores)[0][-1] > 100


def test_unscored_items_that_the_calibration_had_as_well_are_no_news() -> None:
    rng = np.random.default_rng(3)
    calibration, scores = rng.normal(size=1000), rng.normal(size=4000)
    calibration[:50], scores[rng.random(4000) < 0.05] = math.inf, math.nan
    assert play(calibration, scores)[0].max() < 10


def test_evidence_stays_finite_under_a_flood() -> None:
    evidence, recent = play(np.random.default_rng(4).normal(size=2000), np.full(3000, 9.0), limit=math.inf)
    assert np.isfinite(evidence).all()
    assert np.isfinite(recent).all()
    assert evidence[-1] > 1e280


def test_too_few_scores_for_both_tails_are_refused() -> None:
    with pytest.raises(CalibrationError, match="need 4"):
        PolyaBets(np.arange(3.0), RATIOS, 0)
    PolyaBets(np.arange(19.0), RATIOS, 0)
    with pytest.raises(CalibrationError, match="NaN"):
        PolyaBets(np.array([math.nan] * 50), RATIOS, 0)


def test_shares_of_the_capital_never_exceed_it() -> None:
    wealth = Wealth(1)
    wealth.advance(np.ones((20_000, 1)), math.inf)
    assert 0 < wealth.cash < 1
    # Nothing was won or lost.
    assert wealth.evidence == pytest.approx(1.0)


def test_another_number_of_bets_is_not_taken_up() -> None:
    saved = PolyaBets(np.arange(500.0), RATIOS, 0).to_dict()
    with pytest.raises(FormatError):
        PolyaBets(np.arange(500.0), RATIOS[:2], 0).restore(saved)
    with pytest.raises(FormatError):
        PolyaBets(np.arange(500.0), RATIOS, 0).restore({**saved, "hits": [9, 0, 0, 0, 0]})


def test_a_long_update_takes_no_more_memory_than_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(12)
    calibration, scores = rng.normal(size=200), rng.normal(size=60_000)
    tracemalloc.start()
    try:
        evidence, recent = play(calibration, scores)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # At once, 60,000 requests' bets are 60,000 x 21 numbers, several times over.
    assert peak < 40e6
    monkeypatch.setattr("rm_ood.bets._CHUNK", 999)
    for whole, pieces in zip((evidence, recent), play(calibration, scores), strict=True):
        np.testing.assert_array_equal(whole, pieces)


@pytest.mark.parametrize(("shift", "side"), [(3.0, "larger"), (-3.0, "smaller")])
def test_the_tail_that_had_it_is_kept(shift: float, side: str) -> None:
    rng = np.random.default_rng(13)
    bets = PolyaBets(rng.normal(size=500), RATIOS, 0)
    bets.advance(rng.normal(size=50), tie_keys(50, 0, 1), 1e4, 100.0)
    assert (bets.reached_side, bets.fired_side) == (None, None)
    bets.advance(rng.normal(size=50) + shift, tie_keys(50, 50, 1), 1e4, 100.0)
    assert (bets.reached_side, bets.fired_side) == (side, side)
