from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression

from rm_ood.detectors import ConditionalMahalanobis, MahalanobisDetector
from rm_ood.errors import FormatError, InputError, MismatchError
from rm_ood.moments import ClassMoments

PLAIN = {"shrinkage": 0.0, "floor": 0.0, "dtype": torch.float64}


def data(n=400, g=3, r=4, k=1, seed=0):
    """[given | rest] with rest a linear map of given plus noise and, with classes, a class mean."""
    rng = np.random.default_rng(seed)
    link = np.random.default_rng(77).normal(size=(g, r))
    given_ = rng.normal(size=(n, g)) * np.arange(1, g + 1) + 10
    y = np.arange(n) % k
    rest = given_ @ link + rng.normal(size=(n, r)) + 2 * y[:, None]
    return np.concatenate([given_, rest], 1), y


def test_scores_are_those_of_a_regressions_residuals():
    x, _ = data()
    probe, _ = data(seed=1)
    regression = LinearRegression().fit(x[:, :3], x[:, 3:])
    left = x[:, 3:] - regression.predict(x[:, :3])
    cov = left.T @ left / (len(x) - 1)
    gap = probe[:, 3:] - regression.predict(probe[:, :3])
    expected = np.einsum("ij,ji->i", gap, np.linalg.solve(cov, gap.T))
    np.testing.assert_allclose(ConditionalMahalanobis(3, **PLAIN).fit(x).score(probe), expected, rtol=1e-8)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**16), st.sampled_from([0.0, 0.1, "oas"]))
def test_the_chain_rule(g, k, seed, shrinkage):
    x, y = data(k=k, seed=seed)
    probe = data(seed=seed + 1)[0]
    settings = {**PLAIN, "shrinkage": shrinkage}
    detector = ConditionalMahalanobis(g, **settings).fit(x, y)
    given_part, rest_part = detector.part_sq_distances(probe)
    joint = MahalanobisDetector(**settings).fit(x, y)
    assert torch.equal(detector.sq_distances(probe), rest_part)
    torch.testing.assert_close(given_part + rest_part, joint.sq_distances(probe), rtol=1e-9, atol=1e-9)
    assert torch.equal(detector.score(probe), rest_part.min(1).values)
    assert given_part.shape == rest_part.shape == (len(probe), k)
    # By Schur's complement: the rest given the given is the joint less the marginal.
    if shrinkage == 0.0:
        marginal = MahalanobisDetector(**settings).fit(x[:, :g], y)
        torch.testing.assert_close(given_part, marginal.sq_distances(probe[:, :g]), rtol=1e-8, atol=1e-8)


def test_the_given_part_is_of_the_jointly_shrunk_covariance():
    x, _ = data()
    detector = ConditionalMahalanobis(3, shrinkage=0.3, dtype=torch.float64).fit(x)
    centred = x - x.mean(0)
    cov = centred.T @ centred / (len(x) - 1)
    cov = 0.7 * cov + 0.3 * np.trace(cov) / 7 * np.eye(7)
    expected = np.einsum("ij,ji->i", centred[:, :3], np.linalg.solve(cov[:3, :3], centred[:, :3].T))
    np.testing.assert_allclose(detector.part_sq_distances(x)[0][:, 0], expected, rtol=1e-8)


def test_a_rest_that_does_not_follow_from_its_given_is_strange_though_each_part_is_not():
    x, _ = data(n=2000)
    swapped = np.concatenate([x[:, :3], np.roll(x[:, 3:], 1, 0)], 1)
    detector = ConditionalMahalanobis(3).fit(x)
    rest_alone = MahalanobisDetector().fit(x[:, 3:])
    assert rest_alone.score(swapped[:, 3:]).median() == pytest.approx(rest_alone.score(x[:, 3:]).median().item())
    assert detector.score(swapped).median() > 5 * detector.score(x).median()


def test_from_moments_equals_fit():
    x, y = data(k=2)
    streamed = ConditionalMahalanobis.from_moments(ClassMoments(7, 2).update(x, y), 3, dtype=torch.float64)
    expected = ConditionalMahalanobis(3, dtype=torch.float64).fit(x, y).score(x)
    torch.testing.assert_close(streamed.score(x), expected, rtol=1e-9, atol=1e-12)


def test_a_far_given_part_costs_the_rest_no_digits():
    x, _ = data()
    far = x.copy()
    far[:, :3] += 1e6
    exact = ConditionalMahalanobis(3, **PLAIN).fit(far).score(far)
    got = ConditionalMahalanobis(3, shrinkage=0.0, floor=0.0).fit(far).score(far)
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_given", [0, -1, 1.5, True, "3"])
def test_the_split_is_checked(n_given):
    with pytest.raises(InputError, match=r"n_given=.*expected a whole number from 1, or None"):
        ConditionalMahalanobis(n_given)


def test_a_rest_is_needed():
    x, _ = data()
    with pytest.raises(MismatchError, match="x: expected more than n_given=7 features, got 7"):
        ConditionalMahalanobis(7).fit(x)
    with pytest.raises(MismatchError, match="n_given=8"):
        ConditionalMahalanobis.from_moments(ClassMoments(7).update(x), 8)
    state = ConditionalMahalanobis(3).fit(x).state_tensors()
    with pytest.raises(FormatError, match="whitening: expected more than n_given=7 features, got 7"):
        ConditionalMahalanobis.from_state(state, n_given=7)


def test_the_split_is_in_the_middle_unless_it_is_said():
    x, y = data(g=4, r=4, k=2)
    half, said = ConditionalMahalanobis().fit(x, y), ConditionalMahalanobis(4).fit(x, y)
    assert half.n_given_ == said.n_given_ == 4
    assert torch.equal(half.sq_distances(x), said.sq_distances(x))
    assert half.clone().n_given is None
    streamed = ConditionalMahalanobis.from_moments(ClassMoments(8, 2).update(x, y))
    torch.testing.assert_close(streamed.score(x), said.score(x))
    loaded = ConditionalMahalanobis.from_state(half.state_tensors())
    assert torch.equal(loaded.score(x), half.score(x))
    odd, _ = data()
    with pytest.raises(MismatchError, match="x: expected an even number of features for two halves, got 7"):
        ConditionalMahalanobis().fit(odd)
    with pytest.raises(FormatError, match="whitening: expected an even number of features for two halves, got 7"):
        ConditionalMahalanobis.from_state(MahalanobisDetector().fit(odd).state_tensors())


def test_parts_of_vectors_that_are_all_longer_by_one_factor_stay_the_same():
    x, _ = data(n=600)
    detector = ConditionalMahalanobis(3, dtype=torch.float64).fit(x)
    scaled = detector.scaled(8.0)
    assert (scaled.n_given_, scaled.shrinkage_) == (3, detector.shrinkage_)
    for part, same in zip(scaled.part_sq_distances(8 * x), detector.part_sq_distances(x), strict=True):
        torch.testing.assert_close(part, same, rtol=1e-9, atol=1e-9)


def test_settings_are_checked_and_cloned():
    with pytest.raises(InputError, match="floor=2"):
        ConditionalMahalanobis(1, floor=2)
    twin = ConditionalMahalanobis(2, shrinkage=0.3, floor=1e-3, dtype=torch.float64).clone()
    assert (twin.n_given, twin.shrinkage, twin.floor, twin.dtype) == (2, 0.3, 1e-3, torch.float64)


def test_both_parts_are_infinite_only_for_what_they_see():
    x, _ = data()
    detector = ConditionalMahalanobis(3).fit(x)
    rest_bad, given_bad = x[:2].copy()
    rest_bad[5], given_bad[0] = np.nan, np.inf
    given_part, rest_part = detector.part_sq_distances(np.stack([rest_bad, given_bad]))
    assert given_part[:, 0].isfinite().tolist() == [True, False]
    assert rest_part[:, 0].tolist() == [np.inf, np.inf]


def test_to_moves_what_scores_as_well():
    x, _ = data()
    moved = ConditionalMahalanobis(3).fit(x).to("meta")
    assert moved.score(x).is_meta
    assert all(part.is_meta for part in moved.part_sq_distances(x))


def test_a_malformed_precision_is_refused_though_it_is_not_used():
    state = ConditionalMahalanobis(shrinkage=0.1).fit(np.random.default_rng(0).normal(size=(80, 4))).state_tensors()
    with pytest.raises(FormatError, match="expected a mode and a certificate"):
        ConditionalMahalanobis.from_state(state, precision="fp16")
