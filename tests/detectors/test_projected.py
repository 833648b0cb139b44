from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import null_space

from rm_ood.detectors import KNearestNeighbours, MahalanobisDetector, Projected, RewardLevel
from rm_ood.errors import FormatError, InputError, MismatchError, NonFiniteError, NotFittedError

WIDE = {"dtype": torch.float64}


def rows(n=300, d=7, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)) * np.arange(1, d + 1) + 3


@pytest.mark.parametrize("c", [1, 2, 6])
@pytest.mark.parametrize("make", [lambda: MahalanobisDetector(**WIDE), lambda: KNearestNeighbours(3, **WIDE)])
def test_scores_are_those_in_the_null_space(c, make):
    direction = np.random.default_rng(c).normal(size=(c, 7)) * 50
    x, probe = rows(), rows(40, seed=1)
    basis = null_space(direction)
    expected = make().fit(x @ basis).score(probe @ basis)
    detector = Projected(make(), direction).fit(x)
    torch.testing.assert_close(detector.score(probe), expected, rtol=1e-8, atol=1e-10)
    assert detector.project(x).shape == (300, 7 - c)


@given(st.integers(1, 5), st.integers(0, 2**16))
def test_the_directions_are_not_seen_and_all_else_is(c, seed):
    rng = np.random.default_rng(seed)
    direction, x = rng.normal(size=(c, 7)), rows()
    detector = Projected(MahalanobisDetector(**WIDE), direction).fit(x)
    moved = x + 100 * rng.normal(size=(len(x), c)) @ direction
    torch.testing.assert_close(detector.score(moved), detector.score(x), rtol=1e-7, atol=1e-7)
    basis = null_space(direction)
    lengths = torch.from_numpy(np.linalg.norm(x @ basis, axis=1))
    torch.testing.assert_close(detector.project(x).norm(dim=1), lengths, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "direction", [np.eye(7)[0], -np.eye(7)[0], np.eye(7)[:3], np.eye(7)[[6, 0]], 1e-30 * np.eye(7)[2]]
)
def test_axes_are_columns_left_out(direction):
    x = rows()
    kept = x[:, np.abs(np.atleast_2d(direction)).sum(0) == 0]
    detector = Projected(MahalanobisDetector(shrinkage=0.0, floor=0.0, **WIDE), direction).fit(x)
    expected = MahalanobisDetector(shrinkage=0.0, floor=0.0, **WIDE).fit(kept).score(kept)
    torch.testing.assert_close(detector.score(x), expected, rtol=1e-9, atol=0)


def test_classes_reach_the_inner_detector_and_settings_the_clone():
    x, y = rows(), np.arange(300) % 3
    inner = MahalanobisDetector(shrinkage=0.3)
    detector = Projected(inner, np.ones(7)).fit(x, y)
    assert detector.inner_.classes_.tolist() == [0, 1, 2]
    assert not hasattr(inner, "whitening_")
    assert torch.equal(detector.clone().fit(x, y).score(x), detector.score(x))


def test_half_precision_is_projected_in_single():
    x = torch.from_numpy(rows()).bfloat16()
    assert Projected(MahalanobisDetector(), np.ones(7)).project(x).dtype == torch.float32


def test_a_reward_heads_weight_is_a_direction():
    head = torch.nn.Linear(7, 1)
    detector = Projected(MahalanobisDetector(), head.weight).fit(rows())
    assert not detector.project(torch.from_numpy(rows())).requires_grad
    assert all(not tensor.requires_grad for tensor in detector.state_tensors().values())


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (np.zeros(7), "row 0 is zero, or a combination"),
        ([[1.0, 2, 3], [2, 4, 6]], "row 1 is zero, or a combination of the rows before it"),
        (np.eye(3), "expected 1 to 2 directions of 3 features, got 3"),
        (np.zeros((0, 3)), "expected 1 to 2 directions of 3 features, got 0"),
        ([1.0], "expected 1 to 0 directions of 1 features, got 1"),
        (np.zeros((1, 1, 3)), r"direction: expected shape \(n, d\)"),
    ],
)
def test_directions_are_checked(direction, message):
    with pytest.raises(InputError, match=message):
        Projected(MahalanobisDetector(), direction)


def test_inputs_are_checked():
    with pytest.raises(NonFiniteError, match="direction: 1 of 1 rows"):
        Projected(MahalanobisDetector(), [1.0, np.nan])
    with pytest.raises(InputError, match="detector: expected a detector, got str"):
        Projected("mahalanobis", [1.0, 2.0])
    detector = Projected(MahalanobisDetector(), np.ones(7))
    with pytest.raises(MismatchError, match="expected 7 features, got 6"):
        detector.fit(rows(d=6))
    with pytest.raises(NotFittedError, match="Projected is not fitted"):
        detector.state_tensors()
    # A reward is what is left of two columns.
    assert Projected(RewardLevel("both"), [0.0, 1.0]).fit(rows(d=2)).score(rows(d=2)).shape == (300,)


def test_reflectors_of_another_direction_are_refused():
    state = Projected(MahalanobisDetector(), np.ones(7)).fit(rows()).state_tensors()
    for direction in (torch.arange(7.0)[None], torch.ones(2, 7)):
        with pytest.raises(FormatError, match="reflectors: "):
            Projected.from_state({**state, "direction": direction}, MahalanobisDetector.from_state)
    # Another machine's rounding is kept: it is part of what was fitted.
    nudged = {**state, "reflectors": state["reflectors"] * (1 + 1e-9)}
    loaded = Projected.from_state(nudged, MahalanobisDetector.from_state)
    assert torch.equal(loaded.reflectors_, nudged["reflectors"])
    loaded = Projected.from_state(state, MahalanobisDetector.from_state)
    assert torch.equal(loaded.clone().fit(rows()).score(rows()), loaded.score(rows()))


class Reversed:
    """A user's detector, with no more than the protocol asks for."""

    def fit(self, x, y=None):
        self.mean = torch.as_tensor(x).mean(0)
        return self

    def score(self, x):
        return -(x - self.mean).norm(dim=1)

    def clone(self):
        return Reversed()

    def state_tensors(self):
        return {"mean": self.mean}


def test_any_detector_of_the_protocol_can_be_inside():
    detector = Projected(Reversed(), np.ones(7)).fit(torch.from_numpy(rows()))
    assert detector.score(torch.from_numpy(rows())).shape == (300,)
    assert list(detector.state_tensors()) == ["direction", "reflectors", "inner.mean"]
    with pytest.raises(InputError, match=r"device=cpu: Reversed has no to\(device\)"):
        detector.to("cpu")
