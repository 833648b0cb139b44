"""What pairs of rewards say, against definitions written out the long way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_ood.errors import InputError, NonFiniteError
from rm_ood.study import rewards

quarters = st.integers(-20, 20).map(lambda i: i / 4)
pairs = st.lists(st.tuples(quarters, quarters), min_size=1, max_size=40)


@given(pairs)
def test_confidence_is_the_softmax_of_the_winner(rows):
    chosen, rejected = np.array(rows).T
    e = np.exp(np.stack([chosen, rejected]))
    np.testing.assert_allclose(rewards.confidence(chosen, rejected), (e / e.sum(0)).max(0), rtol=1e-12)


def test_rewards_at_the_ends_of_the_float_range_do_not_overflow():
    largest = np.finfo(np.float64).max
    # Warnings are errors here.
    assert rewards.confidence([largest], [-largest])[0] == 1.0
    assert rewards.energy_score([largest], [-largest])[0] == -largest


@given(pairs, st.sampled_from([0.1, 1.0, 5.0]))
def test_energy_is_minus_the_soft_maximum_whatever_the_order(rows, temperature):
    chosen, rejected = np.array(rows).T
    expected = -temperature * np.log(np.exp(chosen / temperature) + np.exp(rejected / temperature))
    np.testing.assert_allclose(rewards.energy_score(chosen, rejected, temperature), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(rewards.energy_score(chosen, rejected), rewards.energy_score(rejected, chosen))


def test_energy_is_larger_off_the_ground():
    assert rewards.energy_score([-3.0], [-4.0])[0] > rewards.energy_score([3.0], [2.0])[0]


def test_a_tie_counts_as_asked():
    chosen, rejected = [1.0, 2.0, 0.0], [1.0, 0.0, 2.0]
    assert rewards.pair_accuracy(chosen, rejected) == 0.5
    assert rewards.pair_accuracy(chosen, rejected, ties="correct") == pytest.approx(2 / 3)
    assert rewards.pair_credits(chosen, rejected).tolist() == [0.5, 1.0, 0.0]
    assert rewards.pair_credits(chosen, rejected, "correct").tolist() == [1.0, 1.0, 0.0]
    assert rewards.tie_count(chosen, rejected) == 1


@given(pairs, st.sampled_from([0.25, 1.0, 3.0, math.inf]))
def test_a_temperature_divides_the_rewards(rows, temperature):
    chosen, rejected = np.array(rows).T
    expected = rewards.confidence(chosen / temperature, rejected / temperature)
    np.testing.assert_allclose(rewards.confidence(chosen, rejected, temperature), expected, rtol=1e-12)


@given(pairs)
def test_max_softmax_ranks_as_the_confidence_and_does_not_round(rows):
    chosen, rejected = np.array(rows).T
    score, conf = rewards.max_softmax_score(chosen, rejected), rewards.confidence(chosen, rejected)
    # Quarters are far enough apart for their order to survive rounding.
    np.testing.assert_array_equal(np.sign(np.subtract.outer(score, score)), -np.sign(np.subtract.outer(conf, conf)))
    sure = rewards.max_softmax_score([60.0, 50.0], [0.0, 0.0])
    assert sure[0] < sure[1]
    assert (rewards.confidence([60.0, 50.0], [0.0, 0.0]) == 1).all()


@pytest.mark.parametrize("name", ["pair_accuracy", "tie_count", "confidence", "energy_score", "max_softmax_score"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_refused_by_row(name, bad):
    with pytest.raises(NonFiniteError, match=r"rejected: 1 of 3 .*rows \[1\]"):
        getattr(rewards, name)([1.0, 2.0, 3.0], [1.0, bad, 3.0])


def test_options_and_shapes_are_checked():
    with pytest.raises(InputError, match="as many chosen as rejected, got 2 and 1"):
        rewards.pair_accuracy([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match=r"chosen: expected a vector .* shape \(1, 1\)"):
        rewards.pair_accuracy([[1.0]], [1.0])
    with pytest.raises(InputError, match="ties='wrong'"):
        rewards.pair_accuracy([1.0], [2.0], ties="wrong")
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="positive temperature"):
            rewards.energy_score([1.0], [2.0], T=temperature)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="positive temperature"):
            rewards.confidence([1.0], [2.0], temperature)
