import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import EmpiricalCovariance

from rm_ood import covariance
from rm_ood.detectors import Detector, MahalanobisDetector
from rm_ood.errors import (
    CalibrationError,
    CalibrationWarning,
    FormatError,
    InputError,
    MismatchError,
    NonFiniteError,
    NotFittedError,
)
from rm_ood.moments import ClassMoments

PLAIN = {"shrinkage": 0.0, "floor": 0.0, "dtype": torch.float64}


def data(n=200, d=6, k=2, seed=0):
    """Correlated classes with a mean of about 10 standard deviations, float64."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % k
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=(k, d))[y] + 10
    return x, y


def by_hand(x, y, probe, shrinkage):
    """Squared distances (m, k) from the definition, solving with the covariance."""
    classes = np.unique(y)
    means = np.stack([x[y == c].mean(0) for c in classes])
    centred = np.concatenate([x[y == c] - m for c, m in zip(classes, means, strict=True)])
    cov = centred.T @ centred / (len(x) - len(classes))
    cov = (1 - shrinkage) * cov + shrinkage * np.trace(cov) / len(cov) * np.eye(len(cov))
    return np.stack([np.einsum("ij,ji->i", probe - m, np.linalg.solve(cov, (probe - m).T)) for m in means], 1)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3, "oas"])
def test_scores_are_the_definition(k, shrinkage):
    x, y = data(k=k)
    probe = data(seed=1)[0]
    detector = MahalanobisDetector(shrinkage=shrinkage, floor=0.0, dtype=torch.float64).fit(x, y)
    expected = by_hand(x, y, probe, detector.shrinkage_)
    np.testing.assert_allclose(detector.sq_distances(probe), expected, rtol=1e-9)
    assert detector.sq_distances(probe).is_contiguous()
    np.testing.assert_allclose(detector.score(probe), expected.min(1), rtol=1e-9)


def test_equals_scikit_learns_empirical_covariance_after_the_divisor():
    x, _ = data(k=1)
    probe = data(seed=1)[0]
    expected = EmpiricalCovariance().fit(x).mahalanobis(probe) * (len(x) - 1) / len(x)
    np.testing.assert_allclose(MahalanobisDetector(**PLAIN).fit(x).score(probe), expected, rtol=1e-9)


def test_learned_state():
    x, y = data(n=300)
    detector = MahalanobisDetector(shrinkage=0.1).fit(x, np.array(["yes", "no"])[y])
    assert isinstance(detector, Detector)
    assert detector.classes_.tolist() == ["no", "yes"]
    assert detector.class_counts_.tolist() == [150, 150]
    assert (detector.n_samples_, detector.n_features_in_) == (300, 6)
    assert detector.shrinkage_ == 0.1
    np.testing.assert_allclose(detector.means_, np.stack([x[y == 1].mean(0), x[y == 0].mean(0)]), rtol=1e-12)
    assert {n: t.dtype for n, t in detector.state_tensors().items()} == {
        "whitening": torch.float32,
        "center": torch.float32,
        "offsets": torch.float32,
        "means": torch.float64,
        "class_counts": torch.int64,
    }
    sphere = np.random.default_rng(0).normal(size=(5000, 6))
    assert MahalanobisDetector().fit(sphere).effective_rank_ == pytest.approx(6, rel=0.01)


def test_from_moments_equals_fit():
    x, y = data()
    moments = ClassMoments(6, 2)
    for i in range(0, 200, 30):
        moments.merge(ClassMoments(6, 2).update(x[i : i + 30], y[i : i + 30]))
    streamed = MahalanobisDetector.from_moments(moments, dtype=torch.float64)
    torch.testing.assert_close(
        streamed.score(x), MahalanobisDetector(dtype=torch.float64).fit(x, y).score(x), rtol=1e-10, atol=1e-12
    )
    assert streamed.classes_.tolist() == [0, 1]


# Shrinkage by held-out likelihood.


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_likelihood_shrinkage_is_that_of_the_two_halves_and_the_fit_is_on_both():
    x, y = data(n=90, d=12)
    rows = np.arange(90) < 30
    half, other = (ClassMoments(12, 2).update(x[part], y[part]) for part in (rows, ~rows))
    made = MahalanobisDetector.from_moments(half, other_half=other, shrinkage="likelihood", dtype=torch.float64)
    expected = covariance.likelihood_shrinkage(half.within_scatter(), 30, other.within_scatter(), 60, 2)
    assert made.shrinkage_ == expected
    assert expected > 1e-4
    assert made.clone().shrinkage == "likelihood"
    np.testing.assert_allclose(made.sq_distances(x), by_hand(x, y, x, expected), rtol=1e-9)
    assert (half.n_samples, other.n_samples) == (30, 60)
    both = MahalanobisDetector.from_moments(half, other_half=other, shrinkage=0.2, dtype=torch.float64)
    np.testing.assert_allclose(both.sq_distances(x), by_hand(x, y, x, 0.2), rtol=1e-9)


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_likelihood_halves_of_a_fit_are_drawn_by_row_and_always_the_same():
    x, _ = data(n=61, d=12, k=1)
    # In order, so that halves as they come would each have a mean of their own far from the other's.
    x = x[np.argsort(x[:, 0])]
    made, again = (MahalanobisDetector(shrinkage="likelihood", floor=0.0).fit(x) for _ in range(2))
    assert made.shrinkage_ == again.shrinkage_
    assert made.n_samples_ == 61
    assert torch.equal(made.score(x), again.score(x))
    drawn = torch.randperm(61, generator=torch.Generator().manual_seed(0)).numpy()
    half, other = (ClassMoments(12).update(x[rows]) for rows in (drawn[:31], drawn[31:]))
    expected = covariance.likelihood_shrinkage(half.within_scatter(), 31, other.within_scatter(), 30)
    assert made.shrinkage_ == expected
    assert expected != covariance.oas_shrinkage(half.merge(other).within_scatter(), 61)


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_likelihood_shrinkage_generalises_better_than_oas_where_few_directions_hold_the_variance():
    rng = np.random.default_rng(3)
    scales = 10 ** np.linspace(1, -1.5, 40)
    train, fresh = (rng.normal(size=(n, 40)) * scales for n in (200, 4000))

    def density(shrinkage):
        made = MahalanobisDetector(shrinkage=shrinkage, dtype=torch.float64).fit(train)
        return float(made.whitening_.diagonal().log().sum() - made.score(fresh).mean() / 2)

    assert density("likelihood") > density("oas") + 1


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_likelihood_needs_two_halves():
    x, y = data()
    with pytest.raises(InputError, match=r"shrinkage='likelihood'.*other_half="):
        MahalanobisDetector.from_moments(ClassMoments(6, 2).update(x, y), shrinkage="likelihood")
    with pytest.raises(MismatchError, match="5 features"):
        MahalanobisDetector.from_moments(ClassMoments(6).update(x), other_half=ClassMoments(5))
    with pytest.raises(CalibrationError, match="more samples than classes"):
        MahalanobisDetector(shrinkage="likelihood").fit(x[:1])


# Invariances.


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(0, 2**16), st.floats(0, 6), st.integers(1, 8))
def test_affine_maps_change_nothing_without_shrinkage(seed, log_condition, d):
    rng = np.random.default_rng(seed)
    y = np.arange(100) % 2
    x = rng.normal(size=(100, d)) + y[:, None]
    u, _, v = np.linalg.svd(rng.normal(size=(d, d)))
    a = u @ np.diag(np.logspace(0, log_condition, d)) @ v
    before = MahalanobisDetector(**PLAIN).fit(x, y)
    after = MahalanobisDetector(**PLAIN).fit(x @ a + 5, y)
    torch.testing.assert_close(after.sq_distances(x @ a + 5), before.sq_distances(x), rtol=1e-6, atol=1e-6)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(0, 2**16), st.floats(-5, 5), st.sampled_from([0.0, 0.2, "oas"]))
def test_orthogonal_and_scalar_maps_change_nothing_with_shrinkage(seed, log_scale, shrinkage):
    x, y = data(n=100, seed=seed)
    a = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0] * 10.0**log_scale
    settings_ = {"shrinkage": shrinkage, "dtype": torch.float64}
    before = MahalanobisDetector(**settings_).fit(x, y)
    after = MahalanobisDetector(**settings_).fit(x @ a, y)
    torch.testing.assert_close(after.sq_distances(x @ a), before.sq_distances(x), rtol=1e-8, atol=1e-8)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([0.0, 1e3]))
def test_float32_agrees_with_float64(seed, mean):
    x, y = data(n=800, d=40, seed=seed)
    x = x + mean
    probe = data(n=100, d=40, seed=seed + 1)[0] + mean
    wide = MahalanobisDetector(dtype=torch.float64).fit(x, y).sq_distances(probe)
    narrow = MahalanobisDetector().fit(x, y).sq_distances(probe)
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=0)


def test_the_stored_whitening_is_the_metric():
    x, y = data(n=400)
    x = x + 1e5  # float32 cannot hold the centre: its rounding must cancel
    detector = MahalanobisDetector().fit(x, y)
    z = (torch.from_numpy(x)[:, None] - detector.means_) @ detector.whitening_.double().T
    torch.testing.assert_close(detector.sq_distances(x).double(), z.square().sum(2), rtol=1e-5, atol=0)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(0, 2**16))
def test_row_order_does_not_matter_and_duplicates_only_change_the_divisor(seed):
    x, y = data(n=100, seed=seed)
    detector = MahalanobisDetector(**PLAIN).fit(x, y)
    order = np.random.default_rng(seed).permutation(100)
    shuffled = MahalanobisDetector(**PLAIN).fit(x[order], y[order])
    torch.testing.assert_close(shuffled.score(x), detector.score(x), rtol=1e-10, atol=0)
    torch.testing.assert_close(shuffled.means_, detector.means_, rtol=1e-12, atol=0)
    twice = MahalanobisDetector(**PLAIN).fit(np.tile(x, (2, 1)), np.tile(y, 2))
    torch.testing.assert_close(twice.means_, detector.means_, rtol=1e-12, atol=0)
    torch.testing.assert_close(twice.score(x), detector.score(x) * 198 / 196, rtol=1e-10, atol=0)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 4), st.floats(-3, 8))
def test_distances_are_never_negative_and_the_score_is_the_least(seed, k, log_scale):
    x, y = data(n=80, k=k, seed=seed)
    detector = MahalanobisDetector().fit(x, y)
    probe = np.concatenate([x * 10.0**log_scale, detector.means_])
    sq, score = detector.sq_distances(probe), detector.score(probe)
    assert (sq >= 0).all()
    assert (score[:, None] <= sq).all()
    assert torch.equal(score, sq.min(1).values)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.randoms())
def test_batch_size_and_order_do_not_change_scores(sizes, random):
    x, y = data(n=400, d=20)
    detector = MahalanobisDetector().fit(x, y)
    whole = detector.score(x)
    rows = list(range(400))
    random.shuffle(rows)
    start = 0
    for size in sizes:
        part = rows[start : start + size]
        torch.testing.assert_close(detector.score(x[part]), whole[part], rtol=1e-4, atol=0)
        start += size


# Inputs to survive.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_score_infinity(bad):
    x, y = data(n=100)
    detector = MahalanobisDetector().fit(x, y)
    dirty = x.copy()
    dirty[[3, 50], 2] = bad
    scores = detector.score(dirty)
    assert scores[[3, 50]].tolist() == [np.inf, np.inf]
    kept = np.delete(np.arange(100), [3, 50])
    assert torch.equal(scores[kept], detector.score(x)[kept])


def test_half_precision_whose_square_overflows_scores_normally():
    rng = torch.Generator().manual_seed(0)
    x = (60_000 + 100 * torch.randn(200, 4, generator=rng)).half()
    detector = MahalanobisDetector().fit(x)
    reference = MahalanobisDetector(dtype=torch.float64).fit(x.double()).score(x.double())
    torch.testing.assert_close(detector.score(x).double(), reference, rtol=1e-4, atol=1e-4)


def test_huge_values_score_infinity_and_large_ones_are_finite():
    x, y = data()
    detector = MahalanobisDetector(dtype=torch.float64).fit(x, y)
    assert detector.score(np.full((1, 6), 1e200)).tolist() == [np.inf]
    assert detector.score(np.full((1, 6), 1e100)).isfinite().all()


def test_bad_fit_rows_are_named():
    x, y = data(n=50)
    x[[7, 9]] = np.nan
    with pytest.raises(NonFiniteError, match=r"2 of 50 rows hold NaN or infinity \(rows 7, 9\)"):
        MahalanobisDetector().fit(x, y)


def test_constant_features_are_counted_and_survive():
    x, y = data(n=200)
    x[:, [1, 4]] = 0.1
    with pytest.warns(CalibrationWarning, match="2 of 6 features are constant"):
        detector = MahalanobisDetector(shrinkage=0.0).fit(x, y)
    assert detector.score(x).isfinite().all()
    moved = x.copy()
    moved[:, 1] += 1
    assert (detector.score(moved) > detector.score(x) + 10).all()


def test_equal_rows_have_no_variance():
    for y in (None, [0] * 15 + [1] * 15):
        with pytest.raises(CalibrationError, match="no variance"):
            MahalanobisDetector().fit(np.full((30, 3), 0.1), y)
    with pytest.raises(CalibrationError, match="no variance"):  # equal within each class
        MahalanobisDetector().fit(np.repeat([[0.1, 0.2], [0.3, 0.7]], 20, 0), np.repeat([0, 1], 20))


def test_a_hyperplane_needs_the_floor():
    x, y = data(n=3000, d=8)
    x -= x.mean(1, keepdims=True)  # LayerNorm output: the features sum to 0, but for rounding
    x = torch.from_numpy(x).float()
    noisy = x.bfloat16()
    detector = MahalanobisDetector(shrinkage=0.0).fit(x, y)
    assert detector.shrinkage_ == 1e-4
    assert detector.score(noisy).median() < 1.1 * detector.score(x).median()
    bare = MahalanobisDetector(**PLAIN).fit(x, y)
    assert bare.score(noisy).median() > 1e6 * bare.score(x).median()


@pytest.mark.parametrize("n", [3, 20, 21, 199])
def test_few_rows_work_with_a_warning(n):
    x, _ = data(n=n, d=20, k=1)
    with pytest.warns(CalibrationWarning, match=f"{n} samples for 20 features, fewer than 10 each"):
        detector = MahalanobisDetector().fit(x)
    assert 0 < detector.shrinkage_ <= 1
    assert detector.score(x).isfinite().all()


def test_ten_rows_a_feature_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MahalanobisDetector().fit(*data(n=200, d=20))


@pytest.mark.parametrize("x", [np.zeros((0, 3)), torch.zeros(0, 3)])
def test_no_rows(x):
    with pytest.raises(CalibrationError, match="0 samples"):
        MahalanobisDetector().fit(x)
    with pytest.raises(CalibrationError, match="0 samples"):
        MahalanobisDetector.from_moments(ClassMoments(3))


def test_one_row_in_a_class_keeps_its_mean_with_a_warning():
    x, y = data(n=200)
    y = np.where(np.arange(200) == 17, 9, y)
    with pytest.warns(CalibrationWarning, match="class 9 has 1 sample"):
        detector = MahalanobisDetector().fit(x, y)
    np.testing.assert_allclose(detector.means_[2], x[17])
    assert detector.score(x[17:18]).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("n", "y"), [(1, None), (3, [0, 1, 2])])
def test_one_row_in_every_class_is_an_error(n, y):
    with pytest.raises(CalibrationError, match="more samples than classes"):
        MahalanobisDetector().fit(data(n=n)[0], y)


def test_an_empty_class_is_refused():
    x, _ = data()
    moments = ClassMoments(6, 3).update(x, torch.ones(len(x), dtype=torch.int64))
    with pytest.raises(CalibrationError, match="no samples of class 0, 2"):
        MahalanobisDetector.from_moments(moments)


@pytest.mark.parametrize("labels", [["b", "a"], [True, False], [1, -1], [2.5, 0.5]])
def test_labels_of_any_kind(labels):
    x, y = data()
    detector = MahalanobisDetector(dtype=torch.float64).fit(x, np.array(labels)[y])
    assert detector.classes_.tolist() == sorted(labels)
    expected = MahalanobisDetector(dtype=torch.float64).fit(x, y).sq_distances(x).flip(1)
    torch.testing.assert_close(detector.sq_distances(x), expected, rtol=1e-10, atol=1e-12)


def test_another_width_is_refused():
    detector = MahalanobisDetector().fit(*data(n=100))
    with pytest.raises(MismatchError, match="expected 6 features, got 7"):
        detector.score(np.zeros((1, 7)))


@pytest.mark.parametrize("shape", [(6,), (1, 1, 6)])
def test_other_ranks_are_refused(shape):
    detector = MahalanobisDetector().fit(*data(n=100))
    with pytest.raises(InputError, match="expected shape"):
        detector.score(np.zeros(shape))


def test_no_rows_to_score_give_an_empty_result():
    detector = MahalanobisDetector().fit(*data(n=100))
    assert detector.score(np.zeros((0, 6))).shape == (0,)
    assert detector.sq_distances(torch.zeros(0, 6)).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_any_real_dtype_is_cast(dtype):
    x, y = data()
    x = torch.from_numpy(x).to(dtype)
    detector = MahalanobisDetector(dtype=torch.float64).fit(x, y)
    torch.testing.assert_close(detector.score(x), detector.score(x.double()), rtol=1e-12, atol=0)
    assert detector.score(x).dtype == torch.float64


def test_tensors_that_need_gradients_are_accepted():
    x, y = data()
    x = torch.from_numpy(x).requires_grad_()
    scores = MahalanobisDetector().fit(x, torch.from_numpy(y)).score(x)
    assert not scores.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_half_precision_state_is_refused(dtype):
    with pytest.raises(InputError, match=r"expected torch\.float32 or torch\.float64"):
        MahalanobisDetector(dtype=dtype)


def test_settings_are_checked():
    with pytest.raises(InputError, match="shrinkage='ledoit'"):
        MahalanobisDetector(shrinkage="ledoit")


@pytest.mark.parametrize("scale", [1e-45, 1e45])
def test_a_scale_outside_float32_is_refused_and_fits_float64(scale):
    x, y = data()
    with pytest.raises(CalibrationError, match=r"does not fit torch\.float32"):
        MahalanobisDetector().fit(x * scale, y)
    expected = MahalanobisDetector(dtype=torch.float64).fit(x, y).score(x)
    got = MahalanobisDetector(dtype=torch.float64).fit(x * scale, y).score(x * scale)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)


def test_a_failed_fit_leaves_the_detector_as_it_was():
    x, y = data()
    detector = MahalanobisDetector().fit(x, y)
    before = detector.score(x)
    with pytest.raises(CalibrationError):
        detector.fit(np.ones((30, 4)))
    assert torch.equal(detector.score(x), before)


# State.


@pytest.mark.parametrize("method", ["score", "sq_distances", "state_tensors"])
def test_unfitted_detectors_say_so(method):
    arguments = [] if method == "state_tensors" else [np.zeros((1, 2))]
    with pytest.raises(NotFittedError, match="MahalanobisDetector is not fitted"):
        getattr(MahalanobisDetector(), method)(*arguments)


def test_clone_is_unfitted_with_the_same_settings():
    detector = MahalanobisDetector(shrinkage=0.2, floor=1e-3, dtype=torch.float64).fit(*data())
    twin = detector.clone()
    assert (twin.shrinkage, twin.floor, twin.dtype) == (0.2, 1e-3, torch.float64)
    assert not hasattr(twin, "whitening_")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_round_trip_is_bit_identical(dtype):
    x, y = data()
    detector = MahalanobisDetector(dtype=dtype).fit(x, y)
    loaded = MahalanobisDetector.from_state(
        {name: tensor.clone() for name, tensor in detector.state_tensors().items()},
        shrinkage=0.5,
        floor=1e-3,
        classes=["no", "yes"],
        effective_shrinkage=0.5,
        effective_rank=3.0,
    )
    assert torch.equal(loaded.sq_distances(x), detector.sq_distances(x))
    assert (loaded.shrinkage, loaded.floor, loaded.dtype) == (0.5, 1e-3, dtype)
    assert (loaded.shrinkage_, loaded.effective_rank_) == (0.5, 3.0)
    assert (loaded.n_samples_, loaded.n_features_in_) == (200, 6)
    assert loaded.classes_.tolist() == ["no", "yes"]
    plain = MahalanobisDetector.from_state(detector.state_tensors())
    assert plain.classes_.tolist() == [0, 1]
    assert torch.equal(pickle.loads(pickle.dumps(detector)).score(x), detector.score(x))


def test_column_major_state_scores_the_same():
    x, y = data()
    detector = MahalanobisDetector().fit(x, y)
    state = detector.state_tensors()
    state["whitening"] = state["whitening"].T.contiguous().T
    assert torch.equal(MahalanobisDetector.from_state(state).score(x), detector.score(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("center"), r"missing \['center'\], unknown \[\]"),
        (lambda s: s.update(extra=s["means"]), r"missing \[\], unknown \['extra'\]"),
        (lambda s: s.update(means=s["means"][0]), r"means: expected shape \(k, d\), got \(6,\)"),
        (lambda s: s.update(means=s["means"][:0]), r"means: expected shape \(k, d\), got \(0, 6\)"),
        (lambda s: s.update(means=s["means"].float()), r"means: expected torch.float64"),
        (lambda s: s.update(whitening=s["whitening"].half()), r"whitening: expected float32 or float64, got"),
        (lambda s: s.update(whitening=s["whitening"][:5]), r"whitening: expected .* \(6, 6\), got .* \(5, 6\)"),
        (lambda s: s.update(offsets=s["offsets"].double()), r"offsets: expected torch.float32"),
        (lambda s: s.update(class_counts=s["class_counts"][:1]), r"class_counts: expected torch.int64 of shape \(2,\)"),
        (lambda s: s["center"].fill_(torch.nan), r"center: holds NaN or infinity"),
        (lambda s: s.update(whitening=s["whitening"].T), r"whitening: not lower triangular with a positive diagonal"),
        (lambda s: s["whitening"].neg_(), r"whitening: not lower triangular with a positive diagonal"),
        (lambda s: s["class_counts"].zero_(), r"class_counts: not all positive"),
        (lambda s: s["offsets"].add_(1), r"offsets: not those of the means"),
    ],
)
def test_broken_state_is_refused(change, message):
    state = copy.deepcopy(MahalanobisDetector().fit(*data()).state_tensors())
    change(state)
    with pytest.raises(FormatError, match=message):
        MahalanobisDetector.from_state(state)


def test_classes_must_match_the_state():
    with pytest.raises(FormatError, match=r"classes: expected 2, got shape \(3,\)"):
        MahalanobisDetector.from_state(MahalanobisDetector().fit(*data()).state_tensors(), classes=[1, 2, 3])


def test_to_moves_every_tensor():
    detector = MahalanobisDetector().fit(*data()).to("meta")
    assert all(tensor.is_meta for tensor in detector.state_tensors().values())


# -- scaled vectors


@pytest.mark.parametrize("factor", [3.0, 0.01])
def test_a_scaled_detector_gives_scaled_vectors_the_same_distances(factor: float) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=rng) + 5
    detector = MahalanobisDetector().fit(x, torch.arange(300) % 2)
    scaled = detector.scaled(factor)
    torch.testing.assert_close(scaled.sq_distances(factor * x), detector.sq_distances(x), rtol=1e-4, atol=1e-4)
    assert scaled.shrinkage_ == detector.shrinkage_


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_scales_nothing_is_refused(factor: float) -> None:
    detector = MahalanobisDetector().fit(torch.randn(100, 3, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(InputError, match=r"factor=.*expected a finite number above 0"):
        detector.scaled(factor)
