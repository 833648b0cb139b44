from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import OAS

from rm_ood.detectors import MahalanobisDetector, NormalisedMahalanobis, SingleGaussian
from rm_ood.errors import CalibrationError, InputError, MismatchError, NonFiniteError
from rm_ood.moments import ClassMoments
from rm_ood.vectors import unit_rows

WIDE = {"dtype": torch.float64}


def data(n=300, d=6, k=2, seed=0):
    """Classes far apart, about a mean of several standard deviations."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % k
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 4 * rng.normal(size=(k, d))[y] + 5, y


# One Gaussian.


def test_single_gaussian_reads_no_labels():
    x, y = data()
    probe = data(seed=1)[0]
    expected = MahalanobisDetector(**WIDE).fit(x).score(probe)
    assert torch.equal(SingleGaussian(**WIDE).fit(x, y).score(probe), expected)
    assert torch.equal(SingleGaussian(**WIDE).fit(x, object()).score(probe), expected)
    assert not torch.allclose(MahalanobisDetector(**WIDE).fit(x, y).score(probe), expected, rtol=0.1)


def test_single_gaussian_equals_scikit_learns_oas():
    x, _ = data()
    # Scikit-learn's OAS divides by n where this divides by n - 1.
    expected = OAS().fit(x).mahalanobis(x) * (len(x) - 1) / len(x)
    np.testing.assert_allclose(SingleGaussian(floor=0.0, **WIDE).fit(x).score(x), expected, rtol=1e-9)


@given(st.integers(1, 4), st.integers(0, 2**16))
def test_single_gaussian_pools_the_classes_of_moments(k, seed):
    x, y = data(k=k, seed=seed)
    moments = ClassMoments(6, k).update(x, y)
    pooled = SingleGaussian.from_moments(moments, **WIDE)
    torch.testing.assert_close(pooled.score(x), SingleGaussian(**WIDE).fit(x).score(x), rtol=1e-9, atol=1e-12)
    assert pooled.classes_.tolist() == [0]
    assert moments.counts.tolist() == np.bincount(y).tolist()  # the moments are as they were


def test_single_gaussian_fits_an_empty_class():
    x, _ = data()
    moments = ClassMoments(6, 2).update(x, np.zeros(len(x), dtype=int))
    assert SingleGaussian.from_moments(moments).class_counts_.tolist() == [300]


def test_single_gaussian_pools_the_halves_that_the_likelihood_is_between():
    x, y = data()
    # Each half has rows of one class alone.
    halves = [ClassMoments(6, 2).update(x[y == c], y[y == c]) for c in range(2)]
    pooled = [ClassMoments(6).update(x[y == c]) for c in range(2)]
    made, same = (SingleGaussian.from_moments(a, other_half=b, shrinkage="likelihood") for a, b in (halves, pooled))
    assert made.shrinkage_ == same.shrinkage_
    torch.testing.assert_close(made.score(x), same.score(x))


# Unit vectors.


def test_normalised_scores_are_those_of_unit_vectors():
    x, y = data()
    probe = data(seed=1)[0]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    inner = MahalanobisDetector(**WIDE).fit(unit, y)
    got = NormalisedMahalanobis(**WIDE).fit(x, y)
    expected = inner.sq_distances(probe / np.linalg.norm(probe, axis=1, keepdims=True))
    torch.testing.assert_close(got.sq_distances(probe), expected, rtol=1e-8, atol=1e-10)
    streamed = NormalisedMahalanobis.from_moments(ClassMoments(6, 2).update(unit_rows(torch.from_numpy(x)), y), **WIDE)
    torch.testing.assert_close(streamed.score(probe), got.score(probe), rtol=1e-8, atol=1e-10)


@given(st.integers(0, 2**16), st.floats(-200, 200))
def test_normalised_scores_do_not_depend_on_the_length(seed, log_scale):
    x, y = data(n=100)
    detector = NormalisedMahalanobis(**WIDE).fit(x, y)
    probe = data(n=20, seed=seed)[0]
    torch.testing.assert_close(detector.score(probe * 10.0**log_scale), detector.score(probe), rtol=1e-7, atol=1e-9)


def test_rows_of_zeros_have_no_direction():
    x, y = data()
    x[[2, 5]] = 0
    with pytest.raises(CalibrationError, match="x: 2 of 300 rows are all zeros and have no direction"):
        NormalisedMahalanobis().fit(x, y)
    x[5] = np.nan
    with pytest.raises(NonFiniteError, match=r"1 of 300 rows hold NaN or infinity \(rows 5\)"):
        NormalisedMahalanobis().fit(x, y)
    detector = NormalisedMahalanobis().fit(*data())
    assert detector.score(np.zeros((2, 6))).tolist() == [np.inf, np.inf]
    with pytest.raises(MismatchError, match="expected 6 features, got 5"):
        detector.sq_distances(np.zeros((1, 5)))


def test_a_normalised_detector_of_scaled_vectors_is_the_same():
    x, y = data()
    detector = NormalisedMahalanobis().fit(x, y)
    scaled = detector.scaled(3.0)
    assert torch.equal(scaled.score(x), detector.score(x))
    assert isinstance(scaled, NormalisedMahalanobis)
    with pytest.raises(InputError, match="factor=0: expected a finite number above 0"):
        detector.scaled(0)
