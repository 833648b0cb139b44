import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.covariance import OAS, EmpiricalCovariance

from rm_ood import covariance
from rm_ood.detectors import MahalanobisDetector
from rm_ood.errors import CalibrationError, InputError
from rm_ood.moments import ClassMoments


def centred_rows(n, d, seed, spread=2.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * 10.0 ** rng.uniform(-spread, spread, d)
    return x - x.mean(0)


def scatter_of(x):
    return torch.from_numpy(x.T @ x)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 2**16), st.sampled_from([1e-150, 1e-3, 1.0, 1e100]))
def test_oas_equals_scikit_learn(n, d, seed, scale):
    x = centred_rows(n, d, seed)
    # Scikit-learn squares the covariance and leaves the range of float64 where this does not.
    expected = OAS(assume_centered=True).fit(x).shrinkage_
    assert covariance.oas_shrinkage(scatter_of(x * scale), n) == pytest.approx(expected, abs=1e-10)


def test_oas_on_pooled_centred_classes_equals_scikit_learn():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 6)) * np.arange(1, 7), rng.integers(0, 2, 300)
    pooled = np.concatenate([x[y == c] - x[y == c].mean(0) for c in (0, 1)])
    expected = OAS(assume_centered=True).fit(pooled).shrinkage_
    assert 0 < expected < 1
    assert covariance.oas_shrinkage(scatter_of(pooled), 300) == pytest.approx(expected, abs=1e-10)


def test_oas_limits():
    assert covariance.oas_shrinkage(torch.zeros(3, 3, dtype=torch.float64), 10) == 1.0
    assert covariance.oas_shrinkage(torch.eye(3, dtype=torch.float64), 10) == 1.0
    assert covariance.oas_shrinkage(torch.full((1, 1), 4.0, dtype=torch.float64), 10) == 0.0


# Shrinkage by held-out likelihood.


def halves(n, d, seed, k=1, part=0.5):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % k
    x = rng.normal(size=(n, d)) * 10 ** rng.uniform(-1, 1, d) + 3 * rng.normal(size=(k, d))[y]
    return [(x[half], y[half]) for half in (slice(None, int(n * part)), slice(int(n * part), None))]


def within(x, y):
    return scatter_of(np.concatenate([x[y == c] - x[y == c].mean(0) for c in np.unique(y)]))


@pytest.mark.parametrize("part", [0.5, 0.2, 0.8])
@pytest.mark.parametrize(("n", "d", "k"), [(40, 12, 1), (90, 5, 2), (16, 20, 1), (400, 3, 3)])
def test_likelihood_shrinkage_is_the_best_of_a_brute_force_search(n, d, k, part):
    (xa, ya), (xb, yb) = halves(n, d, seed=n, k=k, part=part)
    grid = np.geomspace(1e-4, 1, 41).tolist()

    def log_likelihood(fit, fit_y, held, held_y, a):
        cov = covariance.shrunk_covariance(within(fit, fit_y), len(fit), k, a).numpy()
        rows = np.concatenate([held[held_y == c] - held[held_y == c].mean(0) for c in range(k)])
        # Centred on their own means, the rows have n - k degrees of freedom.
        density = stats.multivariate_normal(cov=cov)
        return density.logpdf(rows).sum() + k / 2 * (np.linalg.slogdet(cov)[1] + d * math.log(2 * math.pi))

    by_hand = [log_likelihood(xa, ya, xb, yb, a) + log_likelihood(xb, yb, xa, ya, a) for a in grid]
    got = covariance.likelihood_shrinkage(within(xa, ya), len(xa), within(xb, yb), len(xb), k, grid=grid)
    assert got == grid[int(np.argmax(by_hand))]


def chosen(x, y, scale=1.0):
    (xa, ya), (xb, yb) = x, y
    return covariance.likelihood_shrinkage(within(xa * scale, ya), len(xa), within(xb * scale, yb), len(xb))


def test_likelihood_shrinkage_falls_with_more_rows_and_ignores_the_unit():
    few, many = (chosen(*halves(n, 10, seed=1)) for n in (24, 20_000))
    assert 1e-3 < few < 1
    assert many < few / 10
    for scale in (1e-140, 1e100):
        assert chosen(*halves(24, 10, seed=1), scale=scale) == few
    (xa, ya), (xb, yb) = halves(24, 10, seed=1)
    assert chosen((xb, yb), (xa, ya)) == few


def test_likelihood_shrinkage_of_a_sphere_is_large_and_of_a_hyperplane_positive():
    rng = np.random.default_rng(0)
    sphere = [(rng.normal(size=(50, 30)), np.zeros(50)) for _ in range(2)]
    assert chosen(*sphere) > 0.5
    flat = [(x - x.mean(1, keepdims=True), y) for x, y in halves(500, 6, seed=0)]
    assert 0 < chosen(*flat) < 0.1


def test_likelihood_shrinkage_is_the_least_on_ties():
    one = torch.full((1, 1), 4.0, dtype=torch.float64)  # one feature: shrinkage changes nothing
    assert covariance.likelihood_shrinkage(one, 5, one, 5) == pytest.approx(1e-6)
    assert covariance.likelihood_shrinkage(one, 5, one, 5, grid=[0.5, 0.25]) == 0.25


def test_likelihood_shrinkage_refuses_what_it_cannot_use():
    eye = torch.eye(3, dtype=torch.float64)
    with pytest.raises(CalibrationError, match="more samples than classes, got 2 samples in 2 classes"):
        covariance.likelihood_shrinkage(eye, 9, eye, 2, 2)
    with pytest.raises(CalibrationError, match="no variance"):
        covariance.likelihood_shrinkage(eye * 0, 9, eye, 9)
    with pytest.raises(CalibrationError, match="different widths, 3 and 2 features"):
        covariance.likelihood_shrinkage(eye, 9, eye[:2, :2], 9)
    for grid in ([], [0.0, 0.5], [1.5], [math.nan]):
        with pytest.raises(InputError, match=r"grid=.*expected fractions in \(0, 1\]"):
            covariance.likelihood_shrinkage(eye, 9, eye, 9, grid=grid)


def test_effective_shrinkage_is_never_below_the_floor():
    scatter = scatter_of(centred_rows(10_000, 3, 0))
    oas = covariance.oas_shrinkage(scatter, 10_000)
    assert 0 < oas < 0.01
    assert covariance.effective_shrinkage("oas", 0.0, scatter, 10_000) == oas
    assert covariance.effective_shrinkage("oas", 0.25, scatter, 10_000) == 0.25
    assert covariance.effective_shrinkage(0.5, 0.25, scatter, 10_000) == 0.5
    assert covariance.effective_shrinkage(0, 0.0, scatter, 10_000) == 0.0


@pytest.mark.parametrize("shrinkage", ["oas", "likelihood", 0, 0.5, 1])
def test_valid_settings_pass(shrinkage):
    covariance.check_shrinkage(shrinkage, 0.0)


@pytest.mark.parametrize(
    ("shrinkage", "floor", "message"),
    [
        ("ledoit", 0.0, "shrinkage='ledoit': expected 'oas', 'likelihood' or a number"),
        (-0.1, 0.0, "shrinkage=-0.1"),
        (1.5, 0.0, "shrinkage=1.5"),
        (math.nan, 0.0, "shrinkage=nan"),
        (True, 0.0, "shrinkage=True"),
        (None, 0.0, "shrinkage=None"),
        ("oas", -1e-9, "floor=-1e-09: expected a number in"),
        ("oas", "oas", "floor='oas'"),
    ],
)
def test_invalid_settings_are_refused(shrinkage, floor, message):
    with pytest.raises(InputError, match=message):
        covariance.check_shrinkage(shrinkage, floor)


@pytest.mark.parametrize("k", [1, 3])
def test_covariance_is_scikit_learns_with_the_other_divisor(k):
    x = centred_rows(50, 5, 1)
    ours = covariance.shrunk_covariance(scatter_of(x), 50, k, 0.0).numpy()
    expected = EmpiricalCovariance(assume_centered=True).fit(x).covariance_ * 50 / (50 - k)
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())
    shrunk = covariance.shrunk_covariance(scatter_of(x), 50, k, 0.3).numpy()
    identity = np.trace(expected) / 5 * np.eye(5)
    np.testing.assert_allclose(shrunk, 0.7 * expected + 0.3 * identity, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 2**16), st.sampled_from([1e-4, 1e-2, 0.5, 1.0]))
def test_shrinkage_bounds_the_smallest_eigenvalue(n, d, seed, shrinkage):
    scatter = scatter_of(centred_rows(n, d, seed))
    cov = covariance.shrunk_covariance(scatter, n, 1, shrinkage)
    trace = float(scatter.trace()) / (n - 1)
    assert float(cov.trace()) == pytest.approx(trace, rel=1e-12)
    assert float(torch.linalg.eigvalsh(cov)[0]) >= shrinkage * trace / d * (1 - 1e-9) - 1e-13 * trace


def test_covariance_leaves_the_scatter_as_it_was():
    scatter = scatter_of(centred_rows(20, 3, 0))
    before = scatter.clone()
    covariance.shrunk_covariance(scatter, 20, 1, 0.5)
    assert torch.equal(scatter, before)


@pytest.mark.parametrize(("n", "k", "got"), [(1, 1, "got 1 sample;"), (2, 2, "got 2 samples in 2 classes")])
def test_no_degrees_of_freedom(n, k, got):
    with pytest.raises(CalibrationError, match=got):
        covariance.shrunk_covariance(torch.eye(2, dtype=torch.float64), n, k, 0.5)


def test_no_variance():
    with pytest.raises(CalibrationError, match="no variance: all 9 vectors"):
        covariance.shrunk_covariance(torch.zeros(2, 2, dtype=torch.float64), 9, 1, 0.5)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(1, 20), st.integers(0, 2**16))
def test_whitening_inverts_the_covariance(d, seed):
    cov = covariance.shrunk_covariance(scatter_of(centred_rows(3 * d + 2, d, seed)), 3 * d + 2, 1, 1e-3)
    w = covariance.whitening(cov)
    assert torch.equal(w, w.tril())
    assert (w.diagonal() > 0).all()
    assert w.is_contiguous()
    torch.testing.assert_close(w @ cov @ w.T, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-9)


def test_singular_covariance_is_refused():
    with pytest.raises(CalibrationError, match=r"singular: direction 2 of 2 .* Set floor or shrinkage"):
        covariance.whitening(torch.ones(2, 2, dtype=torch.float64))


def test_effective_rank_of_sphere_and_line():
    assert covariance.effective_rank(torch.eye(7, dtype=torch.float64)) == pytest.approx(7)
    assert covariance.effective_rank(torch.ones(7, 7, dtype=torch.float64)) == pytest.approx(1)
    for scale in (1e-200, 1e200):
        assert covariance.effective_rank(scale * torch.eye(7, dtype=torch.float64)) == pytest.approx(7)
    assert math.isnan(covariance.effective_rank(torch.zeros(2, 2, dtype=torch.float64)))


# Blind directions.


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(3, 12), st.integers(1, 2), st.integers(0, 2**16), st.sampled_from([1e-6, 1.0, 1e5]))
def test_blinded_distances_are_those_of_the_vectors_without_the_directions(d, c, seed, length):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(12 * d, d)) @ rng.normal(size=(d, d)) + 2
    directions = torch.from_numpy(length * rng.normal(size=(c, d)))
    given = ClassMoments(d).update(x)
    options = {"shrinkage": 0.1, "floor": 0.0, "dtype": torch.float64}
    blind = MahalanobisDetector.from_moments(given, blind_to=directions, **options)
    cov = covariance.shrunk_covariance(given.within_scatter(), 12 * d, 1, 0.1)
    # The part that is left of each vector, under its own covariance: by projecting both.
    rest = torch.linalg.svd(directions).Vh[c:]
    probe = torch.from_numpy(rng.normal(size=(20, d)) + 2)
    gaps = (probe - given.means[0]) @ rest.T
    expected = (gaps @ torch.linalg.inv(rest @ cov @ rest.T) * gaps).sum(1)
    torch.testing.assert_close(blind.score(probe), expected, rtol=1e-3, atol=1e-3)
    moved = probe + 3 * torch.nn.functional.normalize(directions, dim=1).sum(0)
    torch.testing.assert_close(blind.score(moved), blind.score(probe), rtol=2e-3, atol=2e-3)


def test_blinding_leaves_the_covariance_as_it_was_and_takes_any_dtype():
    cov = covariance.shrunk_covariance(scatter_of(centred_rows(30, 4, 0)), 30, 1, 0.1)
    before = cov.clone()
    one = covariance.blinded(cov, torch.tensor([[1.0, 2.0, 0.0, 0.0]]))
    two = covariance.blinded(cov, torch.tensor([[-3.0, -6.0, 0.0, 0.0]], dtype=torch.bfloat16))
    assert torch.equal(cov, before)
    torch.testing.assert_close(one, two)
    w = torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64) / math.sqrt(5)
    assert float(w @ one @ w) == pytest.approx((1e6 + 1) * float(w @ cov @ w))
