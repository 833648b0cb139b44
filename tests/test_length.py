"""Length standardisation: even false alarms over lengths, and no length or score that breaks it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_ood.length import LengthStandardiser

Draw = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def _spread(lengths: np.ndarray) -> np.ndarray:
    """Of the log score: the noise of a mean over tokens, above a floor that every length has."""
    return np.sqrt(0.08**2 + 1.44 / (lengths + 3))


LAWS: dict[str, Draw] = {
    "normal": lambda rng, n: _spread(n) * rng.normal(size=n.size),
    "exponential": lambda rng, n: _spread(n) * rng.exponential(size=n.size),
    "gumbel": lambda rng, n: _spread(n) * rng.gumbel(size=n.size),
    "t4": lambda rng, n: _spread(n) * rng.standard_t(4, size=n.size),
    "one in twelve is odd": lambda rng, n: _spread(n) * (rng.normal(size=n.size) + 2.5 * (rng.random(n.size) < 0.08)),
    "skewness shrinks": lambda rng, n: _spread(n) * (rng.gamma(1 + n / 20) - 1 - n / 20) / np.sqrt(1 + n / 20),
    "document and token noise": lambda rng, n: np.log(rng.gamma(30, size=n.size) / 30 + 12 * rng.gamma(n / 2) / n**2),
}


def _prompts(rng: np.random.Generator, n: int, law: Draw) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.clip(np.exp(rng.normal(4.2, 0.9, n)), 1, 1024).astype(np.int64)
    return np.exp(np.log1p(8 / (lengths + 1)) + law(rng, lengths)), lengths


def _worst_quintile(z: np.ndarray, lengths: np.ndarray, alpha: float) -> np.ndarray:
    """False alarms in each length quintile over alpha, at the threshold that gives alpha overall."""
    edges = np.quantile(lengths, [0.2, 0.4, 0.6, 0.8])
    quintile = np.searchsorted(edges, lengths, side="left")
    flagged = z > np.quantile(z, 1 - alpha)
    return np.array([flagged[quintile == i].mean() / alpha for i in range(5)])


@pytest.mark.parametrize("law", LAWS)
def test_false_alarms_are_even_over_lengths(law: str) -> None:
    rng = np.random.default_rng(5)
    fitted, plain = [], []
    for _ in range(8):
        standardise = LengthStandardiser.fit(*_prompts(rng, 1000, LAWS[law]), logarithmic=True)
        scores, lengths = _prompts(rng, 20_000, LAWS[law])
        fitted.append(_worst_quintile(standardise(scores, lengths), lengths, 0.05))
        plain.append(_worst_quintile(scores, lengths, 0.05))
    assert np.mean(fitted, axis=0).max() <= 1.25
    # Without it, nearly all alarms fall on short spans.
    assert np.mean(plain, axis=0).max() >= 2.5


@pytest.mark.parametrize("law", LAWS)
def test_fifty_prompts_are_enough_to_be_better_than_nothing(law: str) -> None:
    rng = np.random.default_rng(6)
    gain = []
    for _ in range(20):
        standardise = LengthStandardiser.fit(*_prompts(rng, 50, LAWS[law]), logarithmic=True)
        scores, lengths = _prompts(rng, 5000, LAWS[law])
        z = standardise(scores, lengths)
        gain.append(_worst_quintile(z, lengths, 0.05).max() / _worst_quintile(scores, lengths, 0.05).max())
    assert np.mean(gain) < 0.7


def test_z_is_centred_and_scaled_alike_at_every_length() -> None:
    rng = np.random.default_rng(7)
    standardise = LengthStandardiser.fit(*_prompts(rng, 4000, LAWS["normal"]), logarithmic=True)
    scores, lengths = _prompts(rng, 40_000, LAWS["normal"])
    z = standardise(scores, lengths)
    for low, high in ((1, 20), (20, 50), (50, 100), (100, 1025)):
        inside = z[(lengths >= low) & (lengths < high)]
        # The unit is the mean absolute deviation, .8 of a standard deviation.
        assert abs(np.median(inside)) < 0.15
        assert np.abs(inside).mean() == pytest.approx(1.0, abs=0.12)


def test_a_few_wild_prompts_hardly_move_the_curves() -> None:
    rng = np.random.default_rng(8)
    scores, lengths = _prompts(rng, 400, LAWS["normal"])
    clean = LengthStandardiser.fit(scores, lengths, logarithmic=True)
    scores[:12] *= 1e6
    dirty = LengthStandardiser.fit(scores, lengths, logarithmic=True)
    fresh, at = _prompts(rng, 2000, LAWS["normal"])
    assert np.abs(dirty(fresh, at) - clean(fresh, at)).mean() < 0.35


def test_lengths_outside_part_a_are_read_as_its_ends() -> None:
    rng = np.random.default_rng(9)
    scores, lengths = _prompts(rng, 100, LAWS["normal"])
    standardise = LengthStandardiser.fit(scores, lengths, logarithmic=True)
    ends = standardise(np.full(2, 3.0), np.array([lengths.min(), lengths.max()]))
    np.testing.assert_array_equal(standardise(np.full(2, 3.0), np.array([0, 10**9])), ends)


@pytest.mark.parametrize("logarithmic", [True, False])
def test_equal_scores_do_not_divide_by_zero(logarithmic: bool) -> None:
    lengths = np.arange(1, 61)
    standardise = LengthStandardiser.fit(np.full(60, 4.0), lengths, logarithmic=logarithmic)
    z = standardise(np.array([4.0, 4.1, 3.9]), np.array([5, 5, 5]))
    assert z[0] == 0
    assert z[1] > 1e3
    assert z[2] < -1e3
    assert np.isfinite(z).all()


@pytest.mark.parametrize("lengths", [np.zeros(60, int), np.full(60, 37), np.repeat([3, 400], 30)])
def test_one_or_two_distinct_lengths(lengths: np.ndarray) -> None:
    scores = np.exp(np.random.default_rng(1).normal(size=60))
    z = LengthStandardiser.fit(scores, lengths, logarithmic=True)(scores, lengths)
    assert np.isfinite(z).all()
    for length in np.unique(lengths):
        inside = lengths == length
        np.testing.assert_array_equal(np.argsort(z[inside]), np.argsort(scores[inside]))
        assert abs(np.median(z[inside])) < 0.6


def test_two_lengths_have_their_own_location_and_scale() -> None:
    rng = np.random.default_rng(2)
    lengths = np.repeat([3, 400], 1000)
    scores = np.exp(np.where(lengths == 3, 2 + rng.normal(size=2000), 0.1 * rng.normal(size=2000)))
    z = LengthStandardiser.fit(scores, lengths, logarithmic=True)(scores, lengths)
    for length in (3, 400):
        assert np.quantile(z[lengths == length], [0.1, 0.5, 0.9]) == pytest.approx([-1.6, 0, 1.6], abs=0.15)


def test_zero_scores_are_far_below_everything_and_finite() -> None:
    rng = np.random.default_rng(3)
    scores, lengths = _prompts(rng, 100, LAWS["normal"])
    scores[7] = 0.0
    z = LengthStandardiser.fit(scores, lengths, logarithmic=True)(scores, lengths)
    assert np.isfinite(z).all()
    assert z.argmin() == 7
    assert np.abs(np.median(z)) < 0.3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_infinitely_far(bad: float) -> None:
    rng = np.random.default_rng(4)
    standardise = LengthStandardiser.fit(*_prompts(rng, 100, LAWS["normal"]), logarithmic=True)
    z = standardise(np.array([1.0, bad]), np.array([10, 10]))
    assert z[1] == np.inf
    assert np.isfinite(z[0])


@given(power=st.floats(0.1, 4), factor=st.floats(1e-6, 1e6))
def test_units_and_powers_of_the_score_do_not_matter(power: float, factor: float) -> None:
    """A squared distance, a distance and a distance in other units give the same z."""
    scores, lengths = _prompts(np.random.default_rng(10), 80, LAWS["exponential"])
    z = LengthStandardiser.fit(scores, lengths, logarithmic=True)(scores, lengths)
    other = factor * scores**power
    np.testing.assert_allclose(
        LengthStandardiser.fit(other, lengths, logarithmic=True)(other, lengths), z, rtol=1e-8, atol=1e-8
    )


@given(shift=st.floats(-1e3, 1e3), factor=st.floats(1e-2, 1e3))
def test_linear_scores_shift_and_scale(shift: float, factor: float) -> None:
    scores, lengths = _prompts(np.random.default_rng(10), 80, LAWS["exponential"])
    z = LengthStandardiser.fit(scores, lengths, logarithmic=False)(scores, lengths)
    other = factor * scores + shift
    np.testing.assert_allclose(
        LengthStandardiser.fit(other, lengths, logarithmic=False)(other, lengths), z, rtol=1e-8, atol=1e-8
    )


def test_one_at_a_time_is_bit_identical_to_a_batch() -> None:
    rng = np.random.default_rng(11)
    standardise = LengthStandardiser.fit(*_prompts(rng, 60, LAWS["normal"]), logarithmic=True)
    scores, lengths = _prompts(rng, 203, LAWS["normal"])
    whole = standardise(scores, lengths)
    one_by_one = [standardise(scores[i : i + 1], lengths[i : i + 1])[0] for i in range(203)]
    np.testing.assert_array_equal(whole, one_by_one)
    np.testing.assert_array_equal(whole[::-1], standardise(scores[::-1], lengths[::-1]))
