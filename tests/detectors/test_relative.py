from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm_ood.detectors import MahalanobisDetector, RelativeMahalanobis, SingleGaussian
from rm_ood.errors import CalibrationError, CalibrationWarning, FormatError, InputError, MismatchError, NotFittedError
from rm_ood.moments import ClassMoments

WIDE = {"dtype": torch.float64}


def corpus(n=400, d=6, seed=0):
    """Two classes whose means nearly coincide, as chosen and rejected responses."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    return rng.normal(size=(n, d)) * np.arange(1, d + 1) + 0.3 * y[:, None] + 5, y


def general(n=500, d=6, seed=1):
    """Other text: a wider cloud elsewhere."""
    return 4 * np.random.default_rng(seed).normal(size=(n, d)) * np.arange(1, d + 1) + 1


def by_hand(x, y, background, probe, shrinkage):
    def distance(centred, divisor, mean):
        cov = centred.T @ centred / divisor
        cov = (1 - shrinkage) * cov + shrinkage * np.trace(cov) / len(cov) * np.eye(len(cov))
        return np.einsum("ij,ji->i", probe - mean, np.linalg.solve(cov, (probe - mean).T))

    means = [x[y == c].mean(0) for c in np.unique(y)]
    centred = np.concatenate([x[y == c] - m for c, m in zip(np.unique(y), means, strict=True)])
    classes = [distance(centred, len(x) - len(means), m) for m in means]
    mean = background.mean(0)
    return np.min(classes, 0) - distance(background - mean, len(background) - 1, mean)


@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_scores_are_the_definition(shrinkage):
    (x, y), background, probe = corpus(), general(), corpus(seed=3)[0]
    detector = RelativeMahalanobis(background, shrinkage=shrinkage, floor=0.0, **WIDE).fit(x, y)
    expected = by_hand(x, y, background, probe, shrinkage)
    np.testing.assert_allclose(detector.score(probe), expected, rtol=1e-8, atol=1e-8)
    assert (expected < 0).any()


@given(st.integers(0, 2**16))
def test_a_relative_distance_is_the_difference_of_two(seed):
    (x, y), background, probe = corpus(), general(), general(seed=seed)
    detector = RelativeMahalanobis(background).fit(x, y)
    expected = MahalanobisDetector().fit(x, y).score(probe) - SingleGaussian().fit(background).score(probe)
    assert torch.equal(detector.score(probe), expected)


def test_every_way_of_giving_the_background_is_the_same():
    (x, y), background, probe = corpus(), general(), corpus(seed=3)[0]
    expected = RelativeMahalanobis(background, **WIDE).fit(x, y).score(probe)
    later = RelativeMahalanobis(**WIDE).fit(x, y).fit_background(background)
    earlier = RelativeMahalanobis(**WIDE).fit_background(torch.from_numpy(background)).fit(x, y)
    # Its own classes are pooled.
    moments = ClassMoments(6, 2).update(background, np.arange(len(background)) % 2)
    streamed = RelativeMahalanobis.from_moments(ClassMoments(6, 2).update(x, y), moments, **WIDE)
    given_ = RelativeMahalanobis(moments, **WIDE).fit(x, y)
    for detector in (later, earlier, streamed, given_):
        torch.testing.assert_close(detector.score(probe), expected, rtol=1e-9, atol=1e-9)
    assert (
        RelativeMahalanobis.from_moments(ClassMoments(6, 2).update(x, y)).fit_background(moments).score(probe).ndim == 1
    )


def test_what_varies_alike_in_all_text_cancels():
    # General text is nine times as wide in four directions, and as wide as the fit data in the other four.
    rng = np.random.default_rng(0)
    x, background = rng.normal(size=(2, 4000, 8))
    background[:, :4] = 9 * background[:, :4] + 9
    noisy, shifted = rng.normal(size=(2, 1000, 8))
    noisy[:, 4:] *= 2
    shifted[:, :4] += 1
    plain, relative = MahalanobisDetector().fit(x), RelativeMahalanobis(background).fit(x)
    assert plain.score(shifted).median() < plain.score(noisy).median()
    assert relative.score(shifted).median() > relative.score(noisy).median() + 2


# The pooled form.


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x[::-1], lambda x: np.tile(x, (3, 1)), np.float32])
def test_the_fit_data_are_refused_as_their_own_background(change):
    x, y = corpus()
    with pytest.raises(CalibrationError, match=r"background: these are the fit data.*pass vectors of another corpus"):
        RelativeMahalanobis(change(x).astype(np.float64)).fit(x, y)
    detector = RelativeMahalanobis().fit(x, y)
    with pytest.raises(CalibrationError, match="these are the fit data"):
        detector.fit_background(ClassMoments(6).update(change(x).astype(np.float64)))
    assert not hasattr(detector, "background_")  # and nothing is kept of it


def test_the_pooled_form_is_blind_and_another_background_is_not():
    # What the refusal spares: a shift off the line between the class means, seen with the plain distance.
    x, y = corpus(n=4000)
    shifted = corpus(n=1000, seed=5)[0]
    shifted[:, 0] -= 3
    clean = corpus(n=1000, seed=6)[0]
    pooled = MahalanobisDetector().fit(x, y).score(shifted) - SingleGaussian().fit(x).score(shifted)
    pooled_clean = MahalanobisDetector().fit(x, y).score(clean) - SingleGaussian().fit(x).score(clean)
    relative = RelativeMahalanobis(general(4000)).fit(x, y)

    def auroc(clean_scores, shifted_scores):
        return float((shifted_scores[:, None] > clean_scores).double().mean())

    assert auroc(relative.score(clean), relative.score(shifted)) > 0.85
    assert auroc(relative.score(clean), relative.score(shifted)) > auroc(pooled_clean, pooled) + 0.2


def test_more_of_the_same_corpus_warns():
    x, y = corpus()
    with pytest.warns(CalibrationWarning, match=r"its mean is as near to the fit data's as .* of the same corpus"):
        RelativeMahalanobis(corpus(seed=8)[0]).fit(x, y)


# Inputs and state.


def test_a_background_is_needed():
    x, y = corpus()
    detector = RelativeMahalanobis().fit(x, y)
    for call in (lambda: detector.score(x), detector.state_tensors, lambda: detector.to("cpu")):
        with pytest.raises(NotFittedError, match=r"has no background; call fit_background\(x\) with vectors of other"):
            call()


def test_a_background_of_another_width_is_refused():
    x, y = corpus()
    with pytest.raises(MismatchError, match="background: expected 6 features as the fit data have, got 5"):
        RelativeMahalanobis(general(d=5)).fit(x, y)


def test_settings_are_checked():
    with pytest.raises(InputError, match=r"background: expected shape \(n, d\), got \(3,\)"):
        RelativeMahalanobis(np.zeros(3))
    with pytest.raises(InputError, match="shrinkage='ledoit'"):
        RelativeMahalanobis(shrinkage="ledoit")
    with pytest.raises(InputError, match=r"dtype=torch\.float16"):
        RelativeMahalanobis(dtype=torch.float16)


def test_what_only_the_background_overflows_for_is_flagged():
    x, y = corpus()
    narrow = 1e-12 * general() + 1e-12
    detector = RelativeMahalanobis(narrow).fit(x, y)
    row = np.full((1, 6), 1e12)
    assert detector.foreground_.score(row).isfinite().all()
    assert detector.background_.score(row).tolist() == [np.inf]
    assert detector.score(row).tolist() == [np.inf]


def test_clones_keep_the_background():
    detector = RelativeMahalanobis(general(), shrinkage=0.3, floor=1e-3, **WIDE)
    twin = detector.clone()
    assert twin.background.data_ptr() == detector.background.data_ptr()
    assert (twin.shrinkage, twin.floor, twin.dtype) == (0.3, 1e-3, torch.float64)


def test_two_gaussians_that_do_not_fit_together_are_refused():
    x, y = corpus()
    state = RelativeMahalanobis(general()).fit(x, y).state_tensors()
    other = {f"background.{n}": t for n, t in SingleGaussian().fit(general(d=5)).state_tensors().items()}
    two = {f"background.{n}": t for n, t in MahalanobisDetector().fit(x, y).state_tensors().items()}
    wide = {f"background.{n}": t for n, t in SingleGaussian(**WIDE).fit(general()).state_tensors().items()}
    for background in (other, two, wide):
        with pytest.raises(FormatError, match="background: not one Gaussian of the width and dtype"):
            RelativeMahalanobis.from_state({**state, **background})
    loaded = RelativeMahalanobis.from_state(state, shrinkage=0.5, floor=0.01, classes=["no", "yes"])
    assert loaded.foreground_.classes_.tolist() == ["no", "yes"]
    assert (loaded.shrinkage, loaded.floor, loaded.background) == (0.5, 0.01, None)
