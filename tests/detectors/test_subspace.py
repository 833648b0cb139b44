from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from sklearn.decomposition import PCA

from rm_ood.detectors import ResidualSubspace, subspace
from rm_ood.errors import CalibrationError, FormatError, InputError, MismatchError, NonFiniteError
from rm_ood.moments import ClassMoments

WIDE = {"dtype": torch.float64}


def rows(n=300, d=10, seed=0, mean=2.0):
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(np.random.default_rng(9).normal(size=(d, d)))[0] * np.geomspace(10, 0.1, d)[:, None]
    return rng.normal(size=(n, d)) @ mix + mean


def vim(x, probe, size, weight, bias):
    """OOD score of ViM by its paper's formulae, from centred data matrices and a full SVD."""
    origin = -np.linalg.pinv(weight) @ bias
    basis = np.linalg.svd(x - origin, full_matrices=True)[2][size:]
    length, logits = np.linalg.norm((x - origin) @ basis.T, axis=1), x @ weight.T + bias
    spread, mean = logits.std(ddof=1) / length.std(ddof=1), logits.max(1).sum() / length.sum()
    scale = spread if len(weight) == 1 else mean
    residual = np.linalg.norm((probe - origin) @ basis.T, axis=1)
    return scale * residual - logsumexp(probe @ weight.T + bias, axis=1)


@pytest.mark.parametrize("size", [1, 4, 9])
def test_the_residual_is_what_principal_components_leave(size):
    x, probe = rows(), rows(50, seed=1)
    pca = PCA(size, svd_solver="full").fit(x)
    expected = np.linalg.norm(probe - pca.inverse_transform(pca.transform(probe)), axis=1)
    detector = ResidualSubspace(size, **WIDE).fit(x, object())
    np.testing.assert_allclose(detector.score(probe), expected, rtol=1e-9)
    np.testing.assert_allclose(ResidualSubspace(size).fit(x).score(probe), expected, rtol=1e-4)
    assert detector.n_components_ == size


@pytest.mark.parametrize("c", [1, 2, 5])
@pytest.mark.parametrize("with_bias", [True, False])
def test_with_a_head_it_is_vim(c, with_bias):
    rng = np.random.default_rng(c)
    x, probe = rows(), rows(50, seed=1)
    weight = rng.normal(size=(c, 10))
    bias = rng.normal(size=c) + 5 if with_bias else None
    expected = vim(x, probe, 4, weight, np.zeros(c) if bias is None else bias)
    detector = ResidualSubspace(4, weight=weight, bias=bias, **WIDE).fit(x)
    np.testing.assert_allclose(detector.score(probe), expected, rtol=1e-8, atol=1e-8)
    narrow = ResidualSubspace(4, weight=torch.from_numpy(weight).float(), bias=bias).fit(x)
    torch.testing.assert_close(narrow.score(probe).double(), detector.score(probe), rtol=1e-3, atol=1e-3)
    state = narrow.state_tensors()
    loaded = ResidualSubspace.from_state(state, n_components=4)
    assert torch.equal(loaded.score(probe), narrow.score(probe))


def test_a_reward_heads_zero_moves_scores_only_by_its_origin():
    # Added to a reward, a constant moves the origin along the weight; the scale stays that of differences.
    x, probe = rows(), rows(50, seed=1)
    weight = np.linalg.svd(rows() - 2.0)[2][:1]  # the leading component: the origin moves within the subspace
    at = [ResidualSubspace(1, weight=weight, bias=[b], **WIDE).fit(x) for b in (-1e4, 1e4)]
    assert float(at[0].scale_) == pytest.approx(float(at[1].scale_), rel=1e-2)
    moved = at[0].score(probe) - at[1].score(probe)
    torch.testing.assert_close(moved, torch.full_like(moved, 2e4), rtol=1e-3, atol=0)


@given(st.integers(0, 2**16))
def test_a_rotation_changes_nothing(seed):
    x, probe = rows(), rows(30, seed=seed)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(10, 10)))[0]
    weight = np.arange(1.0, 11.0)[None]
    before = ResidualSubspace(5, weight=weight, **WIDE).fit(x).score(probe)
    after = ResidualSubspace(5, weight=weight @ turn, **WIDE).fit(x @ turn).score(probe @ turn)
    torch.testing.assert_close(after, before, rtol=1e-7, atol=1e-7)


@given(st.floats(0.01, 0.999))
def test_a_share_takes_the_fewest_components_that_hold_it(share):
    ratio = PCA(svd_solver="full").fit(rows()).explained_variance_ratio_.cumsum()
    size = ResidualSubspace(share).fit(rows()).n_components_
    assert size == min(int(np.searchsorted(ratio, share)) + 1, 9)


def test_a_share_that_needs_every_component_leaves_the_least_one():
    x = np.random.default_rng(0).normal(size=(200, 4))
    assert ResidualSubspace(0.999999).fit(x).n_components_ == 3


@pytest.mark.parametrize(("d", "size"), [(2, 1), (7, 3), (768, 512), (2048, 1000)])
def test_left_out_the_size_is_vims(d, size):
    assert subspace._size(None, torch.ones(d)) == size


@pytest.mark.parametrize("n_components", [0, -3, 1.0, 0.0, 1.5, True, "4", float("nan")])
def test_sizes_are_checked(n_components):
    with pytest.raises(InputError, match=r"n_components=.*expected a whole number from 1, a share"):
        ResidualSubspace(n_components)


def test_the_residual_from_moments_equals_fit():
    x = rows()
    moments = ClassMoments(10, 2).update(x, np.arange(300) % 2)
    streamed = ResidualSubspace.from_moments(moments, n_components=4, **WIDE)
    torch.testing.assert_close(streamed.score(x), ResidualSubspace(4, **WIDE).fit(x).score(x), rtol=1e-8, atol=1e-10)


def test_a_far_mean_costs_no_digits():
    x, probe = rows(), rows(50, seed=1)
    near = ResidualSubspace(4).fit(x).score(probe)
    far = ResidualSubspace(4).fit(x + 1e6).score(probe + 1e6)
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-100, 1e-12, 1e12, 1e100])
def test_the_residual_is_in_the_units_of_x(scale):
    dtype = torch.float32 if 1e-20 < scale < 1e20 else torch.float64
    before = ResidualSubspace(4, dtype=dtype).fit(rows()).score(rows())
    after = ResidualSubspace(4, dtype=dtype).fit(rows() * scale).score(rows() * scale)
    torch.testing.assert_close(after / scale, before, rtol=1e-4, atol=1e-4)


def test_blocks_change_nothing(monkeypatch):
    x, weight = rows(), np.ones((2, 10))
    expected = ResidualSubspace(4, weight=weight, **WIDE).fit(x).score(x)
    monkeypatch.setattr(subspace, "_CHUNK", 7)
    torch.testing.assert_close(ResidualSubspace(4, weight=weight, **WIDE).fit(x).score(x), expected)


@pytest.mark.parametrize(
    ("x", "settings", "message"),
    [
        (rows(0), {}, "fit needs vectors, got 0 samples of 10 features"),
        (np.ones((30, 4)), {}, "no variance: all 30 vectors are equal"),
        (rows(), {"n_components": 10}, "10 components of 10 features leave no residual"),
        (rows(d=1), {}, "1 components of 1 features leave no residual"),
        (rows(4), {"n_components": 4}, "4 components need more than 4 samples, got 4"),
        (rows(), {"n_components": 4, "weight": np.zeros((1, 10))}, "rewards or residuals that do not vary"),
        (rows(), {"weight": np.ones((2, 10)), "bias": [-1e3, -1e3]}, "largest logits that are negative on average"),
        (rows() * 1e30, {}, r"the scale of the vectors does not fit torch\.float32"),
        (rows() * 1e-30, {}, r"the scale of the vectors does not fit torch\.float32"),
        (rows(), {"weight": np.full((1, 10), 1e300)}, r"the scale of the head does not fit torch\.float32"),
    ],
)
def test_what_gives_no_subspace_or_scale_is_refused(x, settings, message):
    with pytest.raises(CalibrationError, match=message):
        ResidualSubspace(**settings).fit(x)


def test_the_head_is_checked():
    with pytest.raises(InputError, match="bias: a bias belongs to a weight"):
        ResidualSubspace(bias=[0.0])
    with pytest.raises(MismatchError, match="bias: expected 2 features, got 1"):
        ResidualSubspace(weight=np.ones((2, 10)), bias=[0.0])
    for settings, name in (({"weight": [[np.nan]]}, "weight"), ({"weight": [[1.0]], "bias": [np.inf]}, "bias")):
        with pytest.raises(NonFiniteError, match=f"{name}: 1 of 1 rows"):
            ResidualSubspace(**settings)
    with pytest.raises(MismatchError, match="weight: expected 10 features as x has, got 9"):
        ResidualSubspace(weight=np.ones((1, 9))).fit(rows())
    with pytest.raises(InputError, match=r"dtype=torch\.bfloat16"):
        ResidualSubspace(dtype=torch.bfloat16)
    head = torch.nn.Linear(10, 1)
    twin = ResidualSubspace(3, weight=head.weight, bias=head.bias).clone()
    assert torch.equal(twin.weight, head.weight)
    assert not twin.fit(rows()).score(rows()).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["residual"].mul_(2), "residual: rows that are not orthonormal"),
        (lambda s: s["scale"].fill_(-1), r"scale: expected a number above 0, got -1\.0"),
        (lambda s: s.update(head_bias=torch.zeros(3)), r"head_bias: expected torch\.float32 of shape \(0\), got"),
    ],
)
def test_broken_state_is_refused(change, message):
    state = {name: t.clone() for name, t in ResidualSubspace(4).fit(rows()).state_tensors().items()}
    change(state)
    with pytest.raises(FormatError, match=message):
        ResidualSubspace.from_state(state)
