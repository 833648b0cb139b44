from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import logsumexp, softmax

from rm_ood.detectors import EnergyScore, MaxSoftmax, RewardLevel
from rm_ood.errors import CalibrationError, FormatError, InputError, MismatchError, NonFiniteError

PAIRS = hnp.arrays(np.float64, st.tuples(st.integers(1, 20), st.just(2)), elements=st.floats(-1e6, 1e6))
TEMPERATURES = st.sampled_from([0.01, 0.5, 1.0, 30.0])


@given(PAIRS, TEMPERATURES)
def test_energy_is_the_definition(x, temperature):
    expected = -temperature * logsumexp(x / temperature, axis=1)
    got = EnergyScore(temperature).fit(x).score(x)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(EnergyScore(temperature).score(x[:, ::-1]), got)


@given(PAIRS, TEMPERATURES)
def test_max_softmax_is_the_definition(x, temperature):
    expected = -softmax(x / temperature, axis=1).max(1)
    got = MaxSoftmax(temperature).fit(x).score(x)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert ((got >= -1) & (got <= -0.5)).all()


@pytest.mark.parametrize("kind", [EnergyScore, MaxSoftmax])
def test_rewards_near_the_end_of_float64_are_finite(kind):
    x = np.array([[1.7e308, -1.7e308], [-1.7e308, -1.7e308], [1e-320, 0.0]])
    assert kind(1e-3).score(x).isfinite().all()


@pytest.mark.parametrize("kind", [EnergyScore, MaxSoftmax])
def test_pairs_are_checked(kind):
    with pytest.raises(NonFiniteError, match="1 of 2 rows"):
        kind().fit([[0.0, 1.0], [np.nan, 0.0]])
    for call in (kind().fit, kind().score):
        with pytest.raises(MismatchError, match="expected 2 features, got 3"):
            call(np.zeros((4, 3)))
    for temperature in (0, -1.0, np.inf, np.nan):
        with pytest.raises(InputError, match=r"temperature=.*expected a finite number above 0"):
            kind(temperature)
    assert kind(0.5).clone().temperature == 0.5
    assert kind().state_tensors() == {}


@given(hnp.arrays(np.float64, 20, elements=st.integers(-1000, 1000).map(lambda i: i / 7), unique=True))
def test_reward_levels_are_the_definition(rewards):
    x = rewards[:, None]
    low, both = (RewardLevel(side).fit(x) for side in ("low", "both"))
    assert torch.equal(low.score(x), -torch.from_numpy(rewards))
    expected = np.abs(rewards - rewards.mean()) / rewards.std(ddof=1)
    np.testing.assert_allclose(both.score(x), expected, rtol=1e-9, atol=1e-9)
    # In standard deviations: the reward's unit and zero do not matter.
    torch.testing.assert_close(RewardLevel("both").fit(3 * x + 5).score(3 * x + 5), both.score(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("x", [np.zeros((0, 1)), np.ones((1, 1)), np.full((30, 1), 0.1)])
def test_rewards_without_spread_are_refused(x):
    with pytest.raises(CalibrationError, match=f"x: {len(x)} rewards without spread"):
        RewardLevel().fit(x)


def test_reward_level_inputs_are_checked():
    with pytest.raises(InputError, match="side='high': expected 'low' or 'both'"):
        RewardLevel("high")
    with pytest.raises(MismatchError, match="expected 1 features, got 2"):
        RewardLevel().fit(np.zeros((4, 2)))
    with pytest.raises(FormatError, match=r"spread: expected a number above 0, got 0\.0"):
        RewardLevel.from_state(
            {"mean": torch.zeros((), dtype=torch.float64), "spread": torch.zeros((), dtype=torch.float64)}
        )
    assert RewardLevel("both").clone().side == "both"
