"""Intervals against scipy, shifts against their definitions and against simulated tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rm_ood.errors import InputError
from rm_ood.power import batch_shift, batch_size, item_shift, share_interval, spread

# Quarters make ties common; a score may be infinite.
quarters = st.lists(st.integers(-20, 20).map(lambda i: i / 4) | st.just(math.inf), min_size=2, max_size=40)


@pytest.mark.parametrize(("count", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (7, 60), (30, 60)])
def test_share_interval_is_clopper_and_pearsons(count: int, n: int) -> None:
    exact = stats.binomtest(count, n).proportion_ci(method="exact")
    assert share_interval(count, n) == pytest.approx((exact.low, exact.high), abs=1e-12)


@pytest.mark.parametrize(("count", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_a_share_of_nothing_is_refused(count: int, n: int) -> None:
    with pytest.raises(InputError, match=f"{count} in {n}"):
        share_interval(count, n)


@given(quarters, st.sampled_from([0.5, 0.8, 1.0]), st.integers(-20, 20).map(lambda i: i / 4))
def test_item_shift_is_the_smallest_that_reaches_the_power(scores: list[float], power: float, threshold: float) -> None:
    s = np.sort(np.array(scores))
    shift = item_shift(s, threshold, power)
    assert (s + shift + 1e-9 > threshold).mean() >= power - 1e-12
    assert shift == 0 or (s + shift - 1e-9 > threshold).mean() < power


def test_item_shift_in_an_example() -> None:
    s = np.arange(10.0)  # threshold at 8: half of the items are at 5 and above
    assert item_shift(s, 8.0, 0.5) == 3.0
    assert item_shift(s, 8.0, 0.8) == 6.0
    assert item_shift(s, 3.0, 0.5) == 0.0


def test_spread_leaves_infinite_scores_out() -> None:
    assert spread(np.array([1.0, 3.0, math.inf])) == pytest.approx(math.sqrt(2))
    assert spread(np.array([2.0, 2.0])) is None
    assert spread(np.array([2.0, math.inf])) is None


@pytest.mark.parametrize(("n", "m"), [(300, 100), (200, 1000)])
def test_batch_shift_has_the_power_it_names(n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    law = np.sort(rng.standard_t(5, size=20_000))
    # The law of n scores would add its own noise: n counts, 20,000 draws give the shape.
    few = np.quantile(law, (np.arange(n) + 0.5) / n)
    shift = batch_shift(few, m)
    assert shift is not None
    found = [
        stats.mannwhitneyu(rng.choice(law, n), rng.choice(law, m) + shift, method="asymptotic").pvalue < 1e-3
        for _ in range(400)
    ]
    assert 0.85 <= np.mean(found) <= 0.96


def test_batch_shift_shrinks_with_the_batch_and_is_none_where_nothing_can_be_found() -> None:
    s = np.sort(np.random.default_rng(1).normal(size=200))
    shifts = [batch_shift(s, m) for m in (30, 100, 1000)]
    assert shifts == sorted(shifts, reverse=True)
    assert batch_shift(s, 1) is None
    assert batch_shift(np.ones(200), 100) == pytest.approx(0, abs=1e-12)
    half = np.concatenate([s[:100], np.full(100, math.inf)])
    # An infinite score outranks every shift: this batch would have to win more than it can.
    assert batch_shift(s, 8) is not None
    assert batch_shift(half, 8) is None


def test_batch_size_is_the_inverse_of_batch_shift() -> None:
    s = np.sort(np.random.default_rng(2).normal(size=1000))
    shift = batch_shift(s, 150)
    assert shift is not None
    assert batch_size(s, shift) == pytest.approx(150, abs=2)
    assert batch_size(s, 0.01) is None
    assert batch_size(np.zeros(5), 0.0) is None
