"""What every detector promises, each of them by name and the ones that need more than a name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm_ood.detectors import (
    DETECTORS,
    ConditionalMahalanobis,
    Detector,
    KNearestNeighbours,
    MahalanobisDetector,
    Projected,
    RelativeMahalanobis,
    ResidualSubspace,
    detector,
)
from rm_ood.errors import FormatError, InputError, MismatchError, NotFittedError

WIDTHS = {"energy": 2, "max_softmax": 2, "reward": 1}
STATELESS = {"energy", "max_softmax"}
NAMES = [*DETECTORS, "conditional", "projected"]


def rows(n: int, d: int, seed: int = 0, mean: float = 3.0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ np.random.default_rng(99).normal(size=(d, d)) + mean


def width(name: str) -> int:
    return WIDTHS.get(name, 6)


def make(name: str) -> Any:
    if name == "conditional":
        return ConditionalMahalanobis(2)
    if name == "projected":
        return Projected(MahalanobisDetector(), np.arange(1.0, 7.0))
    return detector(name, **({"background": rows(300, 6, seed=7, mean=0.0)} if name == "relative" else {}))


def rebuild(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    """How a saved state of the detector that `make` makes comes back."""
    if name == "conditional":
        return lambda state: ConditionalMahalanobis.from_state(state, n_given=2)
    if name == "projected":
        return lambda state: Projected.from_state(state, MahalanobisDetector.from_state)
    return DETECTORS[name].from_state  # type: ignore[no-any-return]


def fitted(name: str) -> Any:
    return make(name).fit(rows(300, width(name)), np.arange(300) % 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_detector_fits_scores_and_clones(name: str) -> None:
    made = fitted(name)
    assert isinstance(made, Detector)
    scores = made.score(rows(40, width(name), seed=1))
    assert scores.shape == (40,)
    assert scores.isfinite().all()
    assert scores.dtype == (torch.float64 if name in {*WIDTHS, "norm"} else torch.float32)
    assert made.score(np.zeros((0, width(name)))).shape == (0,)
    assert made.n_features_in_ == width(name)
    again = made.clone().fit(rows(300, width(name)), np.arange(300) % 2)
    assert torch.equal(again.score(rows(40, width(name), seed=1)), scores)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STATELESS])
def test_unfitted_detectors_say_so(name: str) -> None:
    for unfitted in (make(name), fitted(name).clone()):
        with pytest.raises(NotFittedError, match=f"{type(unfitted).__name__} is not fitted; call fit"):
            unfitted.score(rows(3, width(name)))
        with pytest.raises(NotFittedError, match="is not fitted"):
            unfitted.state_tensors()


@pytest.mark.parametrize("name", NAMES)
def test_another_width_is_refused(name: str) -> None:
    with pytest.raises(MismatchError, match=f"expected {width(name)} features, got {width(name) + 1}"):
        fitted(name).score(rows(3, width(name) + 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_not_finite_score_infinity(name: str, bad: float) -> None:
    made, clean = fitted(name), rows(20, width(name), seed=1)
    for column in range(width(name)):
        dirty = clean.copy()
        dirty[[3, 11], column] = bad
        scores = made.score(dirty)
        assert scores[[3, 11]].tolist() == [np.inf, np.inf]
        kept = np.delete(np.arange(20), [3, 11])
        torch.testing.assert_close(scores[kept], made.score(clean)[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"energy", "max_softmax", "reward"}])
def test_what_overflows_is_never_in_distribution(name: str) -> None:
    made = fitted(name)
    highest = made.score(rows(300, 6)).max()
    for dtype, size in ((torch.float64, 1e300), (torch.float32, 3e38)):
        x = torch.full((1, 6), size, dtype=dtype) * torch.tensor([1, -1, 1, -1, 1, 1], dtype=dtype)
        score = made.score(x)
        assert not score.isnan().any()
        if name not in {"norm", "mahalanobis++", "knn"}:  # long and in a known direction is not strange to these
            assert (score > highest).all()


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip_is_bit_identical(name: str) -> None:
    made, x = fitted(name), rows(50, width(name), seed=1)
    state = {key: tensor.clone() for key, tensor in made.state_tensors().items()}
    loaded = rebuild(name)(state)
    assert torch.equal(loaded.score(x), made.score(x))
    assert loaded.n_features_in_ == made.n_features_in_
    assert {k: t.dtype for k, t in loaded.state_tensors().items()} == {k: t.dtype for k, t in state.items()}
    assert torch.equal(pickle.loads(pickle.dumps(made)).score(x), made.score(x))


@pytest.mark.parametrize("name", NAMES)
def test_state_that_is_not_the_detectors_is_refused(name: str) -> None:
    state = fitted(name).state_tensors()
    with pytest.raises(FormatError, match=r"unknown \['extra'\]"):
        rebuild(name)({**state, "extra": torch.zeros(1)})
    for key, tensor in state.items():
        for wrong in (tensor[..., None], tensor.to(torch.float16 if tensor.is_floating_point() else torch.int32)):
            if key == "direction" and wrong.ndim == 2:
                continue  # a setting: any real dtype
            with pytest.raises(FormatError, match=f"{key.split('.')[-1]}: "):
                rebuild(name)({**state, key: wrong})
        with pytest.raises(FormatError, match="missing"):
            rebuild(name)({k: t for k, t in state.items() if k != key})
        if tensor.is_floating_point() and tensor.numel():
            poisoned = copy.deepcopy(state)
            poisoned[key].view(-1)[0] = torch.nan
            with pytest.raises((FormatError, InputError), match="NaN"):
                rebuild(name)(poisoned)


@pytest.mark.parametrize("name", NAMES)
def test_to_moves_every_tensor(name: str) -> None:
    made = fitted(name)
    assert made.to("cpu") is made
    assert all(tensor.is_meta for tensor in made.to("meta").state_tensors().values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_fits_and_scores_on_a_gpu_are_the_cpus(name: str) -> None:
    x, y, probe = rows(300, width(name)), np.arange(300) % 2, rows(40, width(name), seed=1)
    on_cpu = fitted(name).score(probe)
    fit_there = make(name).fit(torch.from_numpy(x).cuda(), y)
    moved = fitted(name).to("cuda")
    for made in (fit_there, moved):
        scores = made.score(torch.from_numpy(probe).cuda())
        assert scores.is_cuda
        torch.testing.assert_close(scores.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@given(n=st.integers(1, 40), seed=st.integers(0, 2**16), half=st.booleans())
def test_scores_are_of_rows(name: str, n: int, seed: int, half: bool) -> None:
    if name not in _FITTED:
        _FITTED[name] = fitted(name)
    x = torch.from_numpy(rows(n, width(name), seed)).to(torch.bfloat16 if half else torch.float64)
    scores = _FITTED[name].score(x)
    assert scores.shape == (n,)
    one_by_one = torch.cat([_FITTED[name].score(row[None]) for row in x])
    torch.testing.assert_close(one_by_one, scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_FITTED[name].score(x.double()), scores, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(_FITTED[name].score(x), scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "made",
    [
        MahalanobisDetector(),
        ResidualSubspace(),
        KNearestNeighbours(k=3),
        KNearestNeighbours(k=3, metric="euclidean"),
    ],
    ids=["mahalanobis", "subspace", "cosine", "euclidean"],
)
def test_the_process_s_float32_precision_moves_no_score(made: Any) -> None:
    x, probe = rows(1200, 96), rows(300, 96, seed=1)
    expected = made.fit(x).score(probe)
    torch.set_float32_matmul_precision("medium")
    try:
        got = made.score(probe)
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)


_FITTED: dict[str, Any] = {}


def test_a_name_makes_a_detector_with_its_settings() -> None:
    assert isinstance(detector("mahalanobis", shrinkage=0.2), MahalanobisDetector)
    assert detector("mahalanobis", shrinkage=0.2).shrinkage == 0.2
    assert isinstance(detector("relative"), RelativeMahalanobis)


def test_unknown_names_and_settings_list_what_there_is() -> None:
    with pytest.raises(
        InputError, match=r"detector='lof': expected one of 'mahalanobis', 'single_gaussian', .*'reward'"
    ):
        detector("lof")
    with pytest.raises(InputError, match=r"detector='knn': .*unexpected keyword argument 'shrinkage'"):
        detector("knn", shrinkage=0.1)
    with pytest.raises(InputError, match="k=0"):
        detector("knn", k=0)
