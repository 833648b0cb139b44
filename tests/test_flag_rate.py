"""The time-uniform band of the flag rate, and bets against a budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rm_ood.bets import RATIOS
from rm_ood.conformal import guaranteed_rank
from rm_ood.errors import FormatError, InputError
from rm_ood.flag_rate import BudgetBets, default_budget, rate_band


def test_the_band_at_one_percent_is_as_wide_as_known() -> None:
    assert rate_band(10, 1000) == pytest.approx((0.0030, 0.0236), abs=1e-4)
    assert rate_band(100, 10_000) == pytest.approx((0.0069, 0.0139), abs=1e-4)


def test_the_edges_solve_the_likelihood_ratio() -> None:
    def ratio(p: float, hits: int, n: int) -> float:
        mixture = stats.betabinom.pmf(hits, n, 0.5, 9.5)
        return float(mixture / stats.binom.pmf(hits, n, p))

    for hits, n in ((3, 50), (40, 60), (1, 2000)):
        for edge in rate_band(hits, n):
            assert ratio(edge, hits, n) == pytest.approx(20, rel=1e-6)
    for hits, n, edge in ((0, 40, 1), (40, 40, 0)):
        band = rate_band(hits, n)
        assert band[1 - edge] == 1 - edge
        assert ratio(band[edge], hits, n) == pytest.approx(20, rel=1e-6)


def test_the_band_holds_at_all_times_at_once() -> None:
    rng = np.random.default_rng(0)
    streams, length, rate = 400, 1000, 0.03
    hits = np.cumsum(rng.random((streams, length)) < rate, axis=1)
    n = np.arange(1, length + 1)
    mixture = stats.betabinom.logpmf(np.arange(length + 1)[None, :], n[:, None], 0.5, 9.5)[n - 1, hits]
    # What the edges solve, at the true rate: outside the band at some time.
    missed = (mixture - stats.binom.logpmf(hits, n, rate) >= math.log(20)).any(axis=1)
    assert missed.sum() <= stats.binom.ppf(0.999, streams, 0.05)
    for stream in (0, int(np.flatnonzero(missed)[0])):
        inside = [
            rate_band(int(h), i)[0] <= rate <= rate_band(int(h), i)[1] for h, i in zip(hits[stream], n, strict=True)
        ]
        assert all(inside) != missed[stream]


def test_before_the_first_item_anything_is_possible() -> None:
    assert rate_band(0, 0) == (0.0, 1.0)
    bets = BudgetBets(0.01, RATIOS, 100)
    assert math.isnan(bets.state.rate)
    assert bets.state.band() == (0.0, 1.0)


@pytest.mark.parametrize(("hits", "n", "level"), [(-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0)])
def test_impossible_counts_are_refused(hits: int, n: int, level: float) -> None:
    with pytest.raises(InputError):
        rate_band(hits, n, level)


def test_a_rate_within_the_budget_rarely_alarms() -> None:
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(150):
        bets = BudgetBets(0.02, RATIOS, 10)
        bets.advance(rng.random(1000) < 0.02)
        alarms += bets.state.alarm
    assert alarms <= stats.binom.ppf(0.999, 150, 0.1)


def test_flags_that_hold_on_average_only_rarely_alarm_at_their_own_budget() -> None:
    """Half of all calibration sets flag more than alpha; the default budget is what 95 % of them stay within."""
    alpha, n, streams = 0.05, 199, 100
    k = guaranteed_rank(n, alpha, None)
    budget = default_budget([n], alpha, None)
    assert budget == pytest.approx(stats.beta.ppf(0.95, k, n + 1 - k))
    alarms = at_alpha = 0
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        flags = rng.random(5000) < rng.beta(k, n + 1 - k)
        for tolerated in (budget, alpha):
            bets = BudgetBets(tolerated, RATIOS, 100)
            bets.advance(flags)
            alarms += bets.state.alarm and tolerated == budget
            at_alpha += bets.state.alarm and tolerated == alpha
    most = stats.binom.ppf(0.999, streams, 0.05 + 0.01)
    assert alarms <= most < at_alpha


def test_the_default_budget_holds_for_all_groups_at_once() -> None:
    assert default_budget([99, 999], 0.05, 0.95) == 0.05
    assert default_budget([99, 999], 0.05, None) == pytest.approx(stats.beta.ppf(0.975, 5, 95))
    # No flag at all: nothing to bound.
    assert default_budget([9], 0.05, None) == 0.05


@pytest.mark.parametrize("budget", [0.01, 0.95])
def test_a_rate_above_the_budget_alarms_and_stays(budget: float) -> None:
    bets = BudgetBets(budget, RATIOS, 100)
    rng = np.random.default_rng(2)
    bets.advance(rng.random(1000) < budget)
    assert not bets.state.alarm
    bets.advance(rng.random(1000) < min(3 * budget, 1.0))
    assert bets.state.alarm
    bets.advance(np.zeros(2000, dtype=bool))
    assert bets.state.alarm
    assert bets.state.e_value < 100


def test_a_slow_drift_is_not_absorbed() -> None:
    # The rate creeps from .01 to .03 over 30,000 items.
    rng = np.random.default_rng(3)
    bets = BudgetBets(0.01, RATIOS, 100)
    bets.advance(rng.random(30_000) < np.linspace(0.01, 0.03, 30_000))
    assert bets.state.alarm


def test_a_state_of_impossible_counts_is_not_taken_up() -> None:
    bets = BudgetBets(0.01, RATIOS, 100)
    bets.advance(np.array([True, False]))
    with pytest.raises(FormatError, match="3 of 2"):
        bets.restore({**bets.to_dict(), "flagged": 3})
