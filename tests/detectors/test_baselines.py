from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from rm_ood.detectors import KNearestNeighbours, VectorNorm, baselines
from rm_ood.errors import CalibrationError, FormatError, InputError, NonFiniteError


def rows(n, d=8, seed=0, mean=1.0):
    return np.random.default_rng(seed).normal(size=(n, d)) * np.arange(1, d + 1) + mean


# Nearest neighbours.


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (50, 1), (50, 7), (50, 50), (501, 10)])
def test_neighbours_equal_scikit_learns(n, k, metric):
    x, probe = rows(n), rows(33, seed=1)
    distances, _ = NearestNeighbors(n_neighbors=k, metric=metric, algorithm="brute").fit(x).kneighbors(probe)
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        detector = KNearestNeighbours(k, metric=metric, dtype=dtype).fit(x, object())
        got = detector.score(probe)
        assert got.dtype == dtype
        np.testing.assert_allclose(got, distances[:, -1], rtol=rtol, atol=rtol)


def test_the_cosine_orders_as_the_distance_of_normalised_vectors():
    # Sun et al.: -|z / |z| - z_k / |z_k||, whose half square the cosine distance is.
    x, probe = rows(200), rows(30, seed=1)
    unit, query = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, probe))
    euclidean = np.sort(np.linalg.norm(query[:, None] - unit, axis=2), axis=1)[:, 4]
    score = KNearestNeighbours(5, dtype=torch.float64).fit(x).score(probe)
    np.testing.assert_allclose(score, euclidean**2 / 2, rtol=1e-9)


@given(st.integers(0, 2**16), st.floats(-30, 30), st.booleans())
def test_the_cosine_does_not_depend_on_lengths(seed, log_scale, of_bank):
    x, probe = rows(60), rows(20, seed=seed)
    scale = 10.0**log_scale
    before = KNearestNeighbours(3, dtype=torch.float64).fit(x).score(probe)
    bank, query = (x * scale, probe) if of_bank else (x, probe * scale)
    after = KNearestNeighbours(3, dtype=torch.float64).fit(bank).score(query)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 2**16))
def test_euclidean_distances_do_not_depend_on_where_or_on_a_rotation(seed):
    x, probe = rows(60), rows(20, seed=seed)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(8, 8)))[0]
    before = KNearestNeighbours(3, metric="euclidean").fit(x).score(probe)
    after = KNearestNeighbours(3, metric="euclidean").fit(x @ turn + 1e6).score(probe @ turn + 1e6)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_near_neighbours_keep_their_digits():
    # By products alone, float32 has 1 - cos to 1e-7 only; here it is 5e-13.
    x = np.concatenate([rows(50), np.ones((1, 8))])
    probe = np.ones((1, 8))
    probe[0, :2] += [4e-6, -4e-6]
    exact = KNearestNeighbours(1, dtype=torch.float64).fit(x).score(probe)
    got = KNearestNeighbours(1).fit(x).score(probe)
    assert exact.item() == pytest.approx(2e-12, rel=1e-3)
    assert got.item() == pytest.approx(exact.item(), rel=0.1)


def test_a_fit_row_is_its_own_neighbour():
    x = rows(40)
    assert (KNearestNeighbours(1).fit(x).score(x) < 1e-12).all()
    assert (KNearestNeighbours(2).fit(x).score(x) > 1e-6).all()


@pytest.mark.parametrize("products", [1, 100, 2**23])
def test_blocks_change_nothing(products, monkeypatch):
    x, probe = rows(70), rows(33, seed=1)
    expected = KNearestNeighbours(4).fit(x).score(probe)
    monkeypatch.setattr(baselines, "_PRODUCTS", products)
    torch.testing.assert_close(KNearestNeighbours(4).fit(x).score(probe), expected, rtol=1e-5, atol=1e-7)


def test_unusable_fit_vectors_are_refused():
    with pytest.raises(CalibrationError, match="k=10 needs at least 10 fit vectors, got 9"):
        KNearestNeighbours().fit(rows(9))
    x = rows(20)
    x[3] = 0
    with pytest.raises(CalibrationError, match="x: 1 of 20 rows are all zeros and have no direction"):
        KNearestNeighbours().fit(x)
    assert KNearestNeighbours(metric="euclidean").fit(x).score(x[3:4]).isfinite().all()
    for scale in (1e30, 1e-30):
        with pytest.raises(CalibrationError, match=r"the scale of the vectors does not fit torch\.float32"):
            KNearestNeighbours(metric="euclidean").fit(rows(20) * scale)
        assert KNearestNeighbours(metric="euclidean", dtype=torch.float64).fit(rows(20) * scale)
    x[4] = np.inf
    with pytest.raises(NonFiniteError, match=r"1 of 20 rows hold NaN or infinity \(rows 4\)"):
        KNearestNeighbours().fit(x)


def test_a_row_of_zeros_is_not_scored_by_the_cosine():
    assert KNearestNeighbours(1).fit(rows(9)).score(np.zeros((1, 8))).tolist() == [np.inf]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k=0: expected a whole number from 1"),
        ({"k": True}, "k=True"),
        ({"k": 2.0}, "k=2.0"),
        ({"metric": "l1"}, "metric='l1': expected 'cosine' or 'euclidean'"),
        ({"dtype": torch.float16}, r"dtype=torch\.float16: expected torch\.float32 or torch\.float64"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        KNearestNeighbours(**settings)


def test_a_bank_that_the_settings_cannot_have_made_is_refused():
    state = KNearestNeighbours(3).fit(rows(5)).state_tensors()
    with pytest.raises(FormatError, match="bank: expected at least k=10 rows, got 5"):
        KNearestNeighbours.from_state(state)
    for change in ({"bank": state["bank"] * 2}, {"center": state["center"] + 1}):
        with pytest.raises(FormatError, match="bank: not of length 1 about 0"):
            KNearestNeighbours.from_state({**state, **change}, k=3)
    far = KNearestNeighbours(3, metric="euclidean", dtype=torch.float64).fit(rows(5))
    loaded = KNearestNeighbours.from_state(far.state_tensors(), k=3, metric="euclidean")
    assert loaded.dtype == torch.float64
    assert torch.equal(loaded.score(rows(5)), far.score(rows(5)))


# Length.


@given(st.integers(0, 2**16), st.floats(-100, 100))
def test_the_score_is_minus_the_length(seed, log_scale):
    x = rows(20, seed=seed) * 10.0**log_scale
    np.testing.assert_allclose(VectorNorm().fit(x).score(x), -np.linalg.norm(x, axis=1), rtol=1e-12)


def test_a_length_that_overflows_is_not_in_distribution():
    scores = VectorNorm().fit(rows(5)).score(np.array([[1e300] * 8, [1.0] * 8]))
    assert scores.tolist() == [np.inf, pytest.approx(-np.sqrt(8))]
    # In half precision the squares would overflow from 256 on.
    assert VectorNorm().fit(rows(5)).score(torch.full((1, 8), 6e4).half()).item() == pytest.approx(
        -6e4 * 8**0.5, rel=1e-3
    )


def test_the_width_is_all_that_is_learned():
    detector = VectorNorm().fit(rows(5))
    assert {name: int(t) for name, t in detector.state_tensors().items()} == {"width": 8}
    with pytest.raises(FormatError, match="width: expected at least 1, got 0"):
        VectorNorm.from_state({"width": torch.tensor(0)})
    with pytest.raises(NonFiniteError, match="1 of 1 rows"):
        VectorNorm().fit(np.full((1, 3), np.nan))
