"""Conformal ranks: exact properties first, then simulations against exact binomial and beta-binomial bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from rm_ood import conformal
from rm_ood.conformal import (
    ConformalCalibrator,
    false_alarm_interval,
    guaranteed_rank,
    minimum_calibration,
    p_values,
    pool_groups,
)
from rm_ood.errors import CalibrationError, InputError, NotFittedError

ONE_IN_A_THOUSAND = (0.0005, 0.9995)
finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 1))
scores = st.lists(finite, min_size=1, max_size=60)
confidences = st.sampled_from([None, 0.5, 0.9, 0.95])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261123)


# Ranks and thresholds


@pytest.mark.parametrize(
    ("confidence", "expected"),
    [
        (None, [2, 3, 5, 10, 20, 50, 100, 500, 1000]),
        (0.95, [0, 1, 2, 5, 13, 39, 84, 464, 949]),
        (0.99, [0, 0, 1, 3, 10, 34, 78, 449, 928]),
    ],
)
def test_ranks_at_one_percent(confidence: float | None, expected: list[int]) -> None:
    sizes = (298, 299, 500, 1000, 2000, 5000, 10_000, 50_000, 100_000)
    assert [guaranteed_rank(n, 0.01, confidence) for n in sizes] == expected


@pytest.mark.parametrize("confidence", [None, 0.95, 0.99])
def test_minimum_calibration(confidence: float | None) -> None:
    expected = {None: [19, 99, 999], 0.95: [59, 299, 2995], 0.99: [90, 459, 4603]}[confidence]
    assert [minimum_calibration(alpha, confidence) for alpha in (0.05, 0.01, 0.001)] == expected
    for alpha, n in zip((0.05, 0.01, 0.001), expected, strict=True):
        assert guaranteed_rank(n, alpha, confidence) == 1
        assert guaranteed_rank(n - 1, alpha, confidence) == 0


def test_minimum_calibration_of_extreme_promises() -> None:
    assert minimum_calibration(0.9999, None) == 1
    assert minimum_calibration(0.999, 0.5) == 1
    assert minimum_calibration(1e-9, None) == 999_999_999
    assert minimum_calibration(1e-6, 0.95) == math.ceil(math.log(0.05) / math.log1p(-1e-6))


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_flagged_ranks_are_those_whose_beta_law_reaches_the_confidence(confidence: float) -> None:
    for n in [*range(1, 320), 999, 1000, 2995]:
        rank = np.arange(1, n + 1)
        # The scores 0..n-1 calibrate; n - r + .5 has rank r, and every finite score has one of these ranks.
        p = p_values(np.arange(n), n - np.arange(1, n + 2) + 0.5, confidence)
        for alpha in (0.01, 0.05, 0.1, 0.3, 0.5):
            by_law = int((special.betainc(rank, n + 1 - rank, alpha) >= confidence).sum())
            assert guaranteed_rank(n, alpha, confidence) == by_law == int((p <= alpha).sum())


def test_rank_is_the_largest_binomial_one() -> None:
    for n in range(59, 2000, 13):
        k = guaranteed_rank(n, 0.05, 0.95)
        assert stats.binom.sf(k - 1, n, 0.05) >= 0.95 > stats.binom.sf(k, n, 0.05)


@pytest.mark.parametrize("confidence", [None, 0.5, 0.95])
@pytest.mark.parametrize("n", [*range(1, 40), 299, 1000, 5000])
def test_an_alpha_that_is_itself_a_p_value_is_reached(n: int, confidence: float | None) -> None:
    ranks = np.unique(np.linspace(1, n, 25).astype(int))
    for rank, alpha in zip(ranks, p_values(np.arange(n), n - ranks + 0.5, confidence), strict=True):
        assert guaranteed_rank(n, float(alpha), confidence) == rank
        assert guaranteed_rank(n, float(np.nextafter(alpha, 0)), confidence) == rank - 1


@pytest.mark.parametrize(
    ("n", "rank", "confidence", "exact"),
    [
        (1, 1, 0.5, 0.5),
        (3, 2, 0.5, 0.5),
        (999, 500, 0.5, 0.5),
        (2, 1, 0.75, 0.5),
        (1, 1, 0.95, 0.95),
        (2, 2, 0.81, 0.9),
    ],
)
def test_p_values_known_in_closed_form(n: int, rank: int, confidence: float, exact: float) -> None:
    p = p_values(np.arange(n), [n - rank + 0.5], confidence)[0]
    assert p == pytest.approx(exact, rel=1e-14)
    assert guaranteed_rank(n, exact, confidence) == rank


@given(n=st.integers(1, 3000), confidence=st.floats(0.01, 0.999))
def test_guaranteed_p_values_invert_the_beta_law(n: int, confidence: float) -> None:
    rank = np.unique(np.linspace(1, n, 9).astype(int))
    p = p_values(np.arange(n), n - rank + 0.5, confidence)
    np.testing.assert_allclose(special.betainc(rank, n + 1 - rank, p), confidence, rtol=1e-9)
    np.testing.assert_allclose(p, stats.beta.ppf(confidence, rank, n + 1 - rank), rtol=1e-9)


def test_false_alarm_interval_is_the_beta_law() -> None:
    mean, low, high = false_alarm_interval(1000, 0.01, None)
    assert (round(100 * low, 2), round(100 * high, 2)) == (0.54, 1.57)
    assert mean == pytest.approx(10 / 1001)
    mean, low, high = false_alarm_interval(500, 0.01, 0.95, level=0.5)
    assert (low, high) == pytest.approx(tuple(stats.beta(2, 499).ppf([0.25, 0.75])))
    assert mean == pytest.approx(2 / 501)


def test_row15_too_few_for_the_interval_names_the_number_missing() -> None:
    with pytest.raises(CalibrationError, match="needs 299 calibration prompts: have 290, need 9 more"):
        false_alarm_interval(290, 0.01, 0.95)
    with pytest.raises(CalibrationError, match="on average needs 99 calibration prompts: have 98, need 1 more"):
        false_alarm_interval(98, 0.01, None)


# p-values


@given(values=st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5, 7.0]) | finite, min_size=2, max_size=40))
def test_p_values_are_exact_over_exchangeable_sets_with_ties(values: list[float]) -> None:
    """Each of n + 1 values against the other n: p <= j / (n + 1) for at most j of them, which is the whole promise."""
    n = len(values) - 1
    p = np.array([p_values(values[:i] + values[i + 1 :], values[i : i + 1], None)[0] for i in range(n + 1)])
    for j in range(n + 2):
        assert (p <= j / (n + 1)).sum() <= j
    if len(set(values)) == n + 1:
        np.testing.assert_array_equal(np.sort(p), np.arange(1, n + 2) / (n + 1))


def test_counting_only_larger_scores_would_flag_too_many_under_ties() -> None:
    """The contrast to the test above: what `>` instead of `>=` does to 20 equal scores."""
    assert p_values(np.ones(20), [1.0], None)[0] == 1.0
    assert (1 + (np.ones(20) > 1).sum()) / 21 < 0.05


@given(calibration=scores, queries=scores, confidence=confidences)
def test_p_values_fall_as_scores_rise_and_stay_in_range(
    calibration: list[float], queries: list[float], confidence: float | None
) -> None:
    p = p_values(calibration, np.sort(queries), confidence)
    assert (np.diff(p) <= 0).all()
    n = len(calibration)
    smallest = 1 / (n + 1) if confidence is None else stats.beta.ppf(confidence, 1, n)
    assert p.min() >= smallest * (1 - 1e-12)
    assert p.max() <= 1
    assert p_values(calibration, [min(calibration)], confidence)[0] == 1


@given(calibration=scores, queries=scores, confidence=confidences)
def test_p_values_see_only_the_order(calibration: list[float], queries: list[float], confidence: float | None) -> None:
    increasing = [np.arctan, np.cbrt, lambda x: 3.0 * x + 1]
    order = np.unique([*calibration, *queries])
    for f in increasing:
        mapped = np.asarray(f(order))
        assert (np.diff(mapped) > 0).all()
        there = dict(zip(order, mapped, strict=True))
        np.testing.assert_array_equal(
            p_values(calibration, queries, confidence),
            p_values([there[x] for x in calibration], [there[x] for x in queries], confidence),
        )


@given(st.lists(finite, min_size=60, max_size=90), st.lists(finite, max_size=20), st.sampled_from([None, 0.95]))
def test_is_ood_is_exactly_p_at_most_alpha(
    calibration: list[float], queries: list[float], confidence: float | None
) -> None:
    c = ConformalCalibrator(alpha=0.05, confidence=confidence).fit(calibration)
    judged = np.array([*queries, *calibration, *np.nextafter(calibration, np.inf)])
    np.testing.assert_array_equal(c.p_value(judged) <= 0.05, judged > c.threshold_)
    assert c.threshold_ == sorted(calibration)[-c.k_]
    assert c.n_ == len(calibration)


@pytest.mark.parametrize("confidence", [None, 0.95])
def test_row1_what_cannot_be_scored_gets_the_smallest_p_value(confidence: float | None) -> None:
    calibration = np.arange(500.0)
    p = p_values(calibration, [np.nan, np.inf, -np.inf, 1e300, 3.0], confidence)
    assert p[0] == p[1] == p[2] == p[3] < p[4]
    c = ConformalCalibrator(0.05, confidence).fit(calibration)
    assert (c.p_value([np.nan, np.inf, -np.inf]) <= 0.05).all()


def test_infinite_calibration_scores_are_ranked() -> None:
    calibration = [1.0, 2.0, math.inf]
    np.testing.assert_array_equal(p_values(calibration, [3.0, 2.0, 1.0], None), [0.5, 0.75, 1.0])


def test_shapes_and_no_queries() -> None:
    assert p_values([1.0], [], 0.95).shape == (0,)
    assert p_values([[1.0], [2.0]], np.ones((2, 2)), None).shape == (4,)
    assert p_values([1, 2], 3, None).dtype == np.float64


# Refusals


def test_row10_no_calibration_scores() -> None:
    with pytest.raises(CalibrationError, match="got none"):
        p_values([], [1.0], None)
    with pytest.raises(CalibrationError, match="got none"):
        ConformalCalibrator().fit([])


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_row5_nan_in_calibration_scores_is_refused(bad: float) -> None:
    values = np.r_[np.arange(300.0), np.full(12, bad)]
    with pytest.raises(CalibrationError, match=r"12 of 312 are NaN or -inf \(rows 300, 301, .*, 309, \.\.\.\)"):
        ConformalCalibrator().fit(values)
    with pytest.raises(CalibrationError, match=r"1 of 2 are NaN or -inf \(rows 1\)"):
        p_values([0.0, bad], [1.0], None)


def test_row15_too_few_to_calibrate_names_the_number_missing() -> None:
    with pytest.raises(CalibrationError, match=r"alpha=0.01 at confidence 0.95 needs 299 .*have 100, need 199 more"):
        ConformalCalibrator().fit(np.arange(100))


def test_so_many_infinite_scores_that_nothing_could_be_flagged() -> None:
    values = np.r_[np.arange(299.0), np.inf]
    with pytest.raises(CalibrationError, match="1 of 300 are infinite, and the threshold is the 1-th largest"):
        ConformalCalibrator().fit(values)
    assert ConformalCalibrator(0.05).fit(values).threshold_ < np.inf


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1e-12, math.nan])
def test_alpha_outside_its_range(alpha: float) -> None:
    for call in (guaranteed_rank, false_alarm_interval):
        with pytest.raises(InputError, match="alpha"):
            call(100, alpha, 0.95)
    with pytest.raises(InputError, match="alpha"):
        minimum_calibration(alpha, 0.95)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 2.0, math.nan])
def test_confidence_outside_its_range(confidence: float) -> None:
    for call in (
        lambda: p_values([1.0], [1.0], confidence),
        lambda: guaranteed_rank(9, 0.05, confidence),
        lambda: minimum_calibration(0.05, confidence),
    ):
        with pytest.raises(InputError, match="confidence"):
            call()


def test_use_before_fit() -> None:
    c = ConformalCalibrator()
    for use in (lambda: c.p_value([1.0]), lambda: c.threshold_, lambda: c.k_):
        with pytest.raises(NotFittedError, match="call fit"):
            use()


# Groups


def test_groups_that_are_large_enough_stay_alone() -> None:
    assert pool_groups({"b": 10, "a": 10}, 10) == {"a": ("a",), "b": ("b",)}


def test_small_groups_are_pooled() -> None:
    pooled = pool_groups({"a": 10, "b": 6, "c": 5, "d": 0}, 10)
    assert pooled == {"a": ("a",), **dict.fromkeys("bcd", ("b", "c", "d"))}


def test_a_rest_that_is_too_small_joins_the_smallest_group_that_is_not() -> None:
    pooled = pool_groups({"a": 30, "b": 12, "c": 5, "e": 20}, 10)
    assert pooled == {"a": ("a",), "e": ("e",), "b": ("b", "c"), "c": ("b", "c")}


def test_only_small_groups_are_all_one() -> None:
    assert pool_groups({"a": 3, "b": 4}, 10) == {"a": ("a", "b"), "b": ("a", "b")}
    assert pool_groups({}, 10) == {}


def test_each_group_is_ranked_in_its_own_pool(rng: np.random.Generator) -> None:
    labels = np.array(["en"] * 300 + ["de"] * 200 + ["fr"] * 30)
    values = rng.normal(size=530) + 10 * (labels == "de")
    c = ConformalCalibrator(0.05, 0.95).fit(values, list(labels))
    assert c.n_ == 530
    assert list(c.pools_) == ["de", "en", "fr"]
    # 30 French prompts are too few alone: they share the pool of the smallest group that is large enough.
    assert c.pools_["de"] is c.pools_["fr"]
    queries, groups = np.array([11.0, 11.0, 3.5, 11.0, -5.0]), ["en", "de", "en", "fr", "en"]
    p = c.p_value(queries, groups)
    expected = [
        p_values(values[np.isin(labels, own)], [q], 0.95)[0]
        for q, own in zip(queries, [["en"], ["de", "fr"], ["en"], ["de", "fr"], ["en"]], strict=True)
    ]
    np.testing.assert_array_equal(p, expected)
    assert list(p <= 0.05) == [q > c.pools_[g].threshold for q, g in zip(queries, groups, strict=True)]
    assert c.pools_["en"].k == guaranteed_rank(300, 0.05, 0.95)


def test_groups_are_needed_known_and_one_per_score() -> None:
    c = ConformalCalibrator(0.05, 0.95).fit(np.arange(160), ["a"] * 80 + ["b"] * 80)
    with pytest.raises(InputError, match=r"\['klingon'\] were not there at calibration; known: \['a', 'b'\]"):
        c.p_value([1.0, 2.0], ["a", "klingon"])
    with pytest.raises(InputError, match="2 labels needed, one per input, got None"):
        c.p_value([1.0, 2.0])
    with pytest.raises(InputError, match="2 labels needed, one per input, got 1"):
        c.p_value([1.0, 2.0], ["a"])
    for single in (lambda: c.k_, lambda: c.threshold_):
        with pytest.raises(InputError, match=r"pools_\[group\], groups \['a', 'b'\]"):
            single()
    with pytest.raises(InputError, match="1 labels for 2 scores"):
        c.fit([1.0, 2.0], ["a"])
    with pytest.raises(InputError, match="fitted without groups"):
        ConformalCalibrator(0.05).fit(np.arange(100)).p_value([1.0], ["a"])


def test_groups_too_small_altogether_are_an_error() -> None:
    with pytest.raises(CalibrationError, match="have 40, need 19 more"):
        ConformalCalibrator(0.05).fit(np.arange(40), ["a"] * 20 + ["b"] * 20)


# Simulations


def test_5000_benign_inputs_against_4999_scores(rng: np.random.Generator) -> None:
    low, high = (int(x) for x in stats.betabinom.ppf(ONE_IN_A_THOUSAND, 5000, 50, 4950))
    assert (low, high) == (22, 88)
    c = ConformalCalibrator(0.01, None).fit(rng.standard_t(3, 4999))
    assert c.k_ == 50
    benign = rng.standard_t(3, 5000)
    assert low <= (c.p_value(benign) <= 0.01).sum() <= high
    # Both ends bite: a threshold at 0.3 % or 3 % is seen.
    for wrong in (0.003, 0.03):
        assert not low <= (c.p_value(benign) <= wrong).sum() <= high


@pytest.mark.parametrize("law", ["uniform", "cauchy"])
def test_the_guarantee_fails_in_one_calibration_of_twenty(law: str, rng: np.random.Generator) -> None:
    """2,000 calibrations of 299 scores; the true rate of each is known exactly."""
    sf = {"uniform": stats.uniform.sf, "cauchy": stats.cauchy.sf}[law]
    draw = {"uniform": rng.uniform, "cauchy": rng.standard_cauchy}[law]
    rates = np.array([sf(ConformalCalibrator(0.01, 0.95).fit(draw(size=299)).threshold_) for _ in range(2000)])
    low = stats.binom.ppf(ONE_IN_A_THOUSAND[0], 2000, 0.99**299)
    assert low <= (rates > 0.01).sum() <= 131


def test_the_marginal_rule_holds_on_average_only(rng: np.random.Generator) -> None:
    rates = np.array([1 - ConformalCalibrator(0.01, None).fit(rng.uniform(size=299)).threshold_ for _ in range(2000)])
    law = stats.beta(3, 297)
    assert abs(rates.mean() - law.mean()) < 3.3 * law.std() / math.sqrt(2000)
    assert (rates > 0.01).mean() > 0.35


def test_quantiles_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    p = p_values(np.arange(777), [700.5, 3.5], 0.95)
    monkeypatch.setattr(conformal, "_beta_quantile", None)
    np.testing.assert_array_equal(p_values(np.arange(777), [3.5, 700.5], 0.95), p[::-1])
