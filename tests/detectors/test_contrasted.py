"""Distances weighed against noisy copies: the formula, the saved state, rows that cannot be scored, and what it is for."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rm_ood.detectors import ContrastedMahalanobis, Detector, NormalisedMahalanobis
from rm_ood.errors import CalibrationError, FormatError, InputError, MismatchError, NonFiniteError, NotFittedError
from rm_ood.moments import ClassMoments
from rm_ood.rewriting import vocabulary, word_perturbation
from rm_ood.study.conversations import conversations
from rm_ood.vectors import unit_rows

Floats = NDArray[np.float64]
WIDE: dict[str, Any] = {"dtype": torch.float64}
D = 6


def data(n: int = 300, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """Two classes about a mean of a few standard deviations."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    mixing = np.random.default_rng(99).normal(size=(D, D))
    return rng.normal(size=(n, D)) @ mixing + np.array([[4.0], [5.0]])[y] + 3 * np.eye(D)[y], y


def noise(n: int = 200, seed: int = 5) -> Floats:
    """Copies nearer to the centre, about a mean of their own."""
    return 0.7 * data(n, seed)[0] + np.arange(D)


def fitted(**settings: Any) -> ContrastedMahalanobis:
    return ContrastedMahalanobis(**settings).fit(*data()).fit_noise(noise())


def reference(x: Floats) -> Floats:
    """(n, 2) scores by the definition, in float64 NumPy, of `fitted(shrinkage=0.1, floor=0.0)`."""

    def unit(rows: Floats) -> Floats:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]

    def gaussian(rows: Floats, y: NDArray[np.int64]) -> Floats:
        means = np.stack([rows[y == c].mean(0) for c in np.unique(y)])
        centred = rows - means[y]
        cov = centred.T @ centred / (len(rows) - len(means))
        cov = 0.9 * cov + 0.1 * np.trace(cov) / D * np.eye(D)
        gaps = unit(x)[:, None] - means
        return np.einsum("nkd,de,nke->nk", gaps, np.linalg.inv(cov), gaps)  # type: ignore[no-any-return]

    rows, y = data()
    own, other = gaussian(unit(rows), y), gaussian(unit(noise()), np.zeros(200, dtype=np.int64))[:, 0]
    return own * (own.min(1) / other)[:, None]  # type: ignore[no-any-return]


def test_scores_are_those_of_the_definition() -> None:
    probe = np.concatenate([data(40, seed=1)[0], noise(40, seed=2), 9 - data(40, seed=3)[0]])
    expected = reference(probe)
    detector = fitted(shrinkage=0.1, floor=0.0, **WIDE)
    np.testing.assert_allclose(detector.sq_distances(probe), expected, rtol=1e-8)
    np.testing.assert_allclose(detector.score(probe), expected.min(1), rtol=1e-8)
    single = fitted(shrinkage=0.1, floor=0.0).score(probe)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, expected.min(1), rtol=1e-3)
    assert isinstance(detector, Detector)
    # The order among the classes is that of the distances.
    plain = NormalisedMahalanobis(shrinkage=0.1, floor=0.0, **WIDE).fit(*data())
    assert torch.equal(detector.sq_distances(probe).argmin(1), plain.sq_distances(probe).argmin(1))
    assert torch.equal(detector.own_sq_distances(probe), plain.sq_distances(probe))
    assert torch.equal(plain.own_sq_distances(probe), plain.sq_distances(probe))


def test_moments_of_unit_vectors_give_the_same_detector() -> None:
    x, y = data()
    own = ClassMoments(D, 2).update(unit_rows(torch.from_numpy(x)), y)
    # Classes of the copies do not matter.
    copies = ClassMoments(D, 2).update(unit_rows(torch.from_numpy(noise())), np.arange(200) % 2)
    streamed = ContrastedMahalanobis.from_moments(own, **WIDE).fit_noise(copies)
    probe = data(seed=1)[0]
    torch.testing.assert_close(streamed.score(probe), fitted(**WIDE).score(probe), rtol=1e-8, atol=1e-10)
    assert streamed.noise_.classes_.tolist() == [0]
    assert streamed.noise_.n_samples_ == 200


def test_the_likelihood_needs_halves_that_moments_of_the_copies_are_not() -> None:
    copies = ClassMoments(D).update(unit_rows(torch.from_numpy(noise())))
    by_moments = ContrastedMahalanobis(shrinkage="likelihood").fit(*data()).fit_noise(copies)
    assert by_moments.noise_.shrinkage == "oas"
    assert fitted(shrinkage="likelihood").noise_.shrinkage == "likelihood"
    assert ContrastedMahalanobis(shrinkage=0.3).fit(*data()).fit_noise(copies).noise_.shrinkage_ == 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_saved_detector_scores_bit_identically(dtype: torch.dtype) -> None:
    detector, probe = fitted(dtype=dtype), data(seed=1)[0]
    state = {name: tensor.clone() for name, tensor in detector.state_tensors().items()}
    back = ContrastedMahalanobis.from_state(state, effective_shrinkage=0.25, effective_rank=3.5)
    assert torch.equal(back.sq_distances(probe), detector.sq_distances(probe))
    assert (back.dtype, back.shrinkage_, back.effective_rank_) == (dtype, 0.25, 3.5)
    assert back.state_tensors().keys() == state.keys()
    assert {name for name in state if name.startswith("noise.")} == {
        f"noise.{name}" for name in ("whitening", "center", "offsets", "means", "class_counts")
    }


@pytest.mark.parametrize("factor", [0.5, 40.0])
def test_of_longer_vectors_it_is_the_same_detector(factor: float) -> None:
    detector, probe = fitted(), data(seed=1)[0]
    scaled = detector.scaled(factor)
    assert torch.equal(scaled.score(probe), detector.score(probe))
    torch.testing.assert_close(scaled.score(factor * probe), detector.score(probe), rtol=1e-4, atol=0)
    assert (scaled.shrinkage_, scaled.effective_rank_) == (detector.shrinkage_, detector.effective_rank_)
    assert scaled.noise_.n_samples_ == 200
    with pytest.raises(InputError, match="factor=-1"):
        detector.scaled(-1)


def test_both_gaussians_move_to_a_device() -> None:
    detector, probe = fitted(), data(seed=1)[0]
    before = detector.score(probe)
    assert detector.to("meta") is detector
    assert {tensor.device.type for tensor in detector.state_tensors().values()} == {"meta"}
    assert detector.noise_.whitening_.is_meta
    assert torch.equal(fitted().to("cpu").score(probe), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scores_on_a_gpu_are_those_on_the_cpu() -> None:
    detector, probe = fitted(), torch.from_numpy(data(seed=1)[0])
    before = detector.score(probe)
    moved = detector.to("cuda")
    for rows in (probe, probe.to("cuda")):
        torch.testing.assert_close(moved.score(rows).cpu(), before, rtol=1e-4, atol=1e-6)


def test_without_a_fit_or_without_copies_it_says_so() -> None:
    probe = data(3)[0]
    for unfitted in (ContrastedMahalanobis(), ContrastedMahalanobis().fit_noise(noise()), fitted().clone()):
        with pytest.raises(NotFittedError, match="ContrastedMahalanobis is not fitted"):
            unfitted.score(probe)
    without = ContrastedMahalanobis().fit(*data())
    for call in (without.score, without.own_sq_distances, lambda _: without.state_tensors(), without.to):
        with pytest.raises(NotFittedError, match=r"no noisy copies to contrast with: call fit_noise\(x\)"):
            call("cpu" if call == without.to else probe)
    # Copies first is as good.
    first = ContrastedMahalanobis().fit_noise(noise()).fit(*data())
    assert torch.equal(first.score(probe), fitted().score(probe))


def test_copies_of_another_width_or_unusable_are_refused() -> None:
    detector = ContrastedMahalanobis().fit(*data())
    with pytest.raises(MismatchError, match="noise: expected 6 features, got 5"):
        detector.fit_noise(noise()[:, :5])
    with pytest.raises(NonFiniteError, match="rows 1"):
        detector.fit_noise(np.array([[1.0] * D, [np.nan] * D]))
    with pytest.raises(CalibrationError, match="0 samples"):
        detector.fit_noise(ClassMoments(D))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("noise.center"), r"missing \['center'\]"),
        (lambda s: [s.pop(name) for name in list(s) if name.startswith("noise.")], "missing"),
        (lambda s: s.update({"noise.stray": torch.zeros(1)}), r"unknown \['stray'\]"),
        (lambda s: s.update(stray=torch.zeros(1)), r"unknown \['stray'\]"),
        (lambda s: s["noise.whitening"].neg_(), "positive diagonal"),
        (lambda s: s["noise.means"].fill_(torch.nan), "NaN"),
        (lambda s: s.update(other(width=5)), "not one Gaussian of the width and dtype"),
        (lambda s: s.update(other(**WIDE)), "not one Gaussian of the width and dtype"),
        (lambda s: s.update(other(classes=2)), "not one Gaussian of the width and dtype"),
    ],
)
def test_row28_a_malformed_state_is_refused(change: Any, message: str) -> None:
    state = {name: tensor.clone() for name, tensor in fitted().state_tensors().items()}
    change(state)
    with pytest.raises(FormatError, match=message):
        ContrastedMahalanobis.from_state(state)


def other(width: int = D, classes: int = 1, **settings: Any) -> dict[str, torch.Tensor]:
    """The saved state of some other Gaussian in the place of the copies'."""
    gaussian = NormalisedMahalanobis(**settings).fit(noise()[:, :width], np.arange(200) % classes)
    return {f"noise.{name}": tensor for name, tensor in gaussian.state_tensors().items()}


def test_rows_that_cannot_be_scored_are_infinitely_far_and_alone() -> None:
    probe = data(6, seed=1)[0]
    clean = fitted().score(probe)
    probe[1], probe[3, 2], probe[4, 0] = 0, np.nan, -np.inf
    scores = fitted().score(probe)
    assert scores[[1, 3, 4]].tolist() == [np.inf] * 3
    torch.testing.assert_close(scores[[0, 2, 5]], clean[[0, 2, 5]])
    assert fitted().sq_distances(probe)[[1, 3, 4]].isinf().all()
    assert fitted().score(np.zeros((0, D))).shape == (0,)


def test_where_a_gaussian_leaves_the_range_the_score_is_infinite_not_small() -> None:
    detector, probe = fitted(), data(4, seed=1)[0]
    detector.noise_.whitening_ = detector.noise_.whitening_ * 1e25
    assert detector.score(probe).isinf().all()
    # At a class mean: 0, and the other class is not a number but far.
    own = fitted()
    own.whitening_ = own.whitening_ * 1e25
    own.center_, own.offsets_ = own.center_ * 0, torch.stack([torch.zeros(D), torch.full((D,), 3e38)])
    own.whitening_ = torch.zeros(D, D)
    assert own.sq_distances(probe).tolist() == [[0.0, np.inf]] * 4


def test_a_row_at_the_mean_of_the_copies_is_finite_and_far() -> None:
    detector = fitted()
    at = detector.noise_.means_
    score = detector.score(at / at.norm())
    assert score.isfinite().all()
    assert score > detector.score(data(500, seed=1)[0]).max()


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_it_sees_word_noise_that_a_distance_does_not(minilm: Any) -> None:
    texts = [text for talk in conversations("en") for text in talk]
    texts = list(dict.fromkeys(text for text in texts if 5 < len(text.split()) < 20))
    random.Random(0).shuffle(texts)
    fit, held = texts[:300], texts[300:400]
    words = vocabulary(fit)
    vectors = {
        name: span_means(minilm, rows)
        for name, rows in {
            "fit": fit,
            "copies": [word_perturbation(text, 0.4, words) for text in fit],
            "held": held,
            "noisy": [word_perturbation(text, 0.5, words, seed=1) for text in held],
        }.items()
    }
    plain = NormalisedMahalanobis().fit(vectors["fit"])
    contrasted = ContrastedMahalanobis().fit(vectors["fit"]).fit_noise(vectors["copies"])
    caught = {}
    for name, detector in (("plain", plain), ("contrasted", contrasted)):
        clean, noisy = detector.score(vectors["held"]), detector.score(vectors["noisy"])
        caught[name] = float((noisy[:, None] > clean).float().mean())
    print(len(texts), caught)
    assert caught["contrasted"] > caught["plain"] + 0.1
    assert caught["contrasted"] > 0.7


def span_means(minilm: Any, texts: list[str]) -> torch.Tensor:
    """Means over the words two thirds up MiniLM's stack."""
    model, tokenizer = minilm
    means = []
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            batch = tokenizer(
                texts[start : start + 64], padding=True, truncation=True, max_length=48, return_tensors="pt"
            )
            hidden = model(**batch, output_hidden_states=True).hidden_states[4]
            mask = batch["attention_mask"][:, :, None]
            means.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(means)
