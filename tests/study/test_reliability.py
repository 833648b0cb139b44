"""Calibration in bins: against loops, scikit-learn and torchmetrics, and a bias that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import binary_calibration_error

from rm_ood.errors import InputError, NonFiniteError
from rm_ood.study import reliability
from rm_ood.study.rewards import confidence, pair_credits

# Quarters make ties and values on the bins' edges common.
quarters = st.integers(-20, 20).map(lambda i: i / 4)
pairs = st.lists(st.tuples(quarters, quarters), min_size=1, max_size=40)


def drawn(n, seed=0, scale=1.0):
    """n pairs of a calibrated model (margin d, right with probability sigmoid(d)), its rewards times `scale`."""
    rng = np.random.default_rng(seed)
    d = rng.normal(scale=1.5, size=n)
    sign = np.where(rng.random(n) < 1 / (1 + np.exp(-np.abs(d))), 1, -1)
    return scale * sign * np.abs(d), np.zeros(n)


def ece_by_loop(chosen, rejected, n_bins, ties, closed):
    total = 0.0
    for b in range(n_bins):
        low, high = b / n_bins, (b + 1) / n_bins
        correct, conf = [], []
        for c, r in zip(chosen, rejected, strict=True):
            p = 1 / (1 + math.exp(-abs(c - r)))
            inside = low < p <= high if closed == "right" else low <= p < high or (b == n_bins - 1 and p == 1)
            if inside:
                correct.append((0.5 if ties == "half" else 1.0) if c == r else float(c > r))
                conf.append(p)
        if conf:
            total += len(conf) / len(chosen) * abs(np.mean(correct) - np.mean(conf))
    return total


@given(pairs, st.integers(1, 15), st.sampled_from(["half", "correct"]), st.sampled_from(["right", "left"]))
def test_ece_is_its_definition(rows, n_bins, ties, closed):
    chosen, rejected = zip(*rows, strict=True)
    expected = ece_by_loop(chosen, rejected, n_bins, ties, closed)
    assert reliability.ece(chosen, rejected, n_bins, ties=ties, closed=closed) == pytest.approx(expected, abs=1e-12)


def test_the_edge_of_a_bin_decides_where_a_tie_goes():
    # Confidence .5 (correct by credit) and .55 (wrong): apart under (low, high], in one bin under [low, high).
    gap = math.log(0.55 / 0.45)
    chosen, rejected = [0.0, 0.0], [0.0, gap]
    apart = reliability.ece(chosen, rejected, ties="correct", closed="right")
    together = reliability.ece(chosen, rejected, ties="correct", closed="left")
    assert apart == pytest.approx((0.5 + 0.55) / 2)
    assert together == pytest.approx(abs(1 - 0.5 - 0.55) / 2)


def test_certain_pairs_are_kept_unless_the_papers_definition_is_asked_for():
    chosen, rejected = [0.0, 1.0], [100.0, 0.0]
    sure = 1 / (1 + math.exp(-1))
    assert confidence(chosen, rejected)[0] == 1.0
    assert reliability.ece(chosen, rejected, closed="left") == pytest.approx((1 + 1 - sure) / 2)
    assert reliability.ece(chosen, rejected, closed="left", keep_certain=False) == pytest.approx(1 - sure)
    assert math.isnan(reliability.ece([0.0], [100.0], keep_certain=False))


@pytest.mark.parametrize("n_bins", [5, 10, 15])
@pytest.mark.parametrize(("strategy", "binning"), [("uniform", "equal_width"), ("quantile", "equal_mass")])
def test_the_curve_is_scikit_learns(n_bins, strategy, binning):
    chosen, rejected = drawn(3000, scale=2.0)
    conf, correct = confidence(chosen, rejected), pair_credits(chosen, rejected)
    accuracy, mean = calibration_curve(correct, conf, n_bins=n_bins, strategy=strategy)
    curve = reliability.reliability_curve(chosen, rejected, n_bins, binning=binning)
    full = [i for i, n in enumerate(curve["count"]) if n]
    np.testing.assert_allclose([curve["accuracy"][i] for i in full], accuracy, atol=1e-12)
    np.testing.assert_allclose([curve["confidence"][i] for i in full], mean, atol=1e-12)
    assert sum(curve["count"]) == 3000
    assert len(curve["edges"]) == n_bins + 1
    weighted = sum(curve["count"][i] / 3000 * abs(curve["accuracy"][i] - curve["confidence"][i]) for i in full)
    assert reliability.ece(chosen, rejected, n_bins, binning=binning) == pytest.approx(weighted, abs=1e-12)
    if binning == "equal_mass":
        assert set(np.diff(curve["count"])) <= {-1, 0, 1}


@pytest.mark.parametrize("n_bins", [5, 10, 15])
def test_ece_and_mce_are_torchmetrics(n_bins):
    chosen, rejected = drawn(3000, seed=1, scale=2.0)
    conf = torch.from_numpy(confidence(chosen, rejected))
    correct = torch.from_numpy(pair_credits(chosen, rejected)).int()
    theirs = {norm: binary_calibration_error(conf, correct, n_bins, norm).item() for norm in ("l1", "max")}
    assert reliability.ece(chosen, rejected, n_bins, closed="left") == pytest.approx(theirs["l1"], abs=1e-6)
    worst = reliability.mce(chosen, rejected, n_bins, closed="left", min_count=1)
    assert worst == pytest.approx(theirs["max"], abs=1e-6)


def test_equal_confidences_stay_in_one_bin():
    # Nine pairs of one confidence and one of another: in whatever order, two bins hold something.
    chosen = np.array([2.0] * 9 + [5.0])
    curve = reliability.reliability_curve(chosen, np.zeros(10), 5, binning="equal_mass")
    assert sorted(n for n in curve["count"] if n) == [1, 9]
    again = reliability.reliability_curve(chosen[::-1], np.zeros(10), 5, binning="equal_mass")
    assert again["count"] == curve["count"]


def test_an_empty_bin_has_no_accuracy():
    curve = reliability.reliability_curve([1.0], [0.0])
    assert curve["count"] == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert curve["accuracy"] == [None] * 7 + [1.0] + [None] * 2
    assert curve["confidence"][7] == pytest.approx(1 / (1 + math.exp(-1)))
    assert curve["edges"][-1] == 1.0


def test_mce_leaves_thin_bins_out():
    # One tie, counted correct, is off by .5 in a bin of its own; ten pairs near .73 are right seven times.
    chosen, rejected = [0.0] + [1.0] * 7 + [0.0] * 3, [0.0] + [0.0] * 7 + [1.0] * 3
    assert reliability.mce(chosen, rejected, ties="correct", min_count=1) == 0.5
    assert reliability.mce(chosen, rejected, ties="correct", min_count=10) == pytest.approx(
        1 / (1 + math.exp(-1)) - 0.7
    )
    assert reliability.mce(chosen, rejected, min_count=1) == pytest.approx(1 / (1 + math.exp(-1)) - 0.7)
    assert math.isnan(reliability.mce(chosen, rejected, min_count=11))


@given(pairs, st.sampled_from([0.5, 2.0, math.inf]))
def test_a_temperature_is_a_division_of_the_rewards(rows, temperature):
    chosen, rejected = np.array(rows).T
    for metric in (reliability.ece, reliability.mce):
        divided = metric(chosen / temperature, rejected / temperature) if temperature < math.inf else None
        found = metric(chosen, rejected, temperature=temperature)
        if divided is not None:
            assert found == pytest.approx(divided, abs=1e-12, nan_ok=True)
    curve = reliability.reliability_curve(chosen, rejected, temperature=math.inf)
    # (.4, .5] holds everything.
    assert curve["count"][4] == len(rows)


def test_debiasing_is_kumars_estimate():
    """Against the mean over normal draws of the bins' accuracies, as the package uncertainty-calibration takes it."""
    chosen, rejected = drawn(60, seed=2, scale=1.3)
    curve = reliability.reliability_curve(chosen, rejected)
    full = [i for i, n in enumerate(curve["count"]) if n]
    n, accuracy, conf = (np.array([curve[key][i] for i in full]) for key in ("count", "accuracy", "confidence"))
    noise = np.random.default_rng(0).normal(size=(200_000, len(full))) * np.sqrt(accuracy * (1 - accuracy) / n)
    resampled = (np.abs(accuracy + noise - conf) * n / 60).sum(1).mean()
    plain = (np.abs(accuracy - conf) * n / 60).sum()
    assert reliability.ece(chosen, rejected, debiased=True) == pytest.approx(2 * plain - resampled, abs=2e-4)


def test_debiasing_brings_small_samples_nearer_the_truth():
    # A calibrated model's error is 0, and an over-confident one's is what 200,000 pairs say.
    for scale, share in ((1.0, 0.7), (2.0, 0.6)):
        truth = reliability.ece(*drawn(200_000, seed=9, scale=scale))
        plain, debiased = (
            np.array(
                [
                    [reliability.ece(*drawn(100, seed=s, scale=scale), debiased=d) for d in (False, True)]
                    for s in range(300)
                ]
            ).mean(0)
            - truth
        )
        assert plain > 0.005
        assert abs(debiased) < share * plain


def test_a_certain_bin_and_a_single_pair_have_no_noise_to_take_off():
    assert reliability.ece([1.0], [0.0], debiased=True) == reliability.ece([1.0], [0.0])
    assert reliability.ece([1.0] * 5, [0.0] * 5, debiased=True) == reliability.ece([1.0] * 5, [0.0] * 5)
    assert reliability.ece([1.0, 0.0], [0.0, 1.0], debiased=True) >= 0


@pytest.mark.parametrize("name", ["ece", "mce", "reliability_curve"])
def test_wrong_arguments_are_named(name):
    metric = getattr(reliability, name)
    with pytest.raises(InputError, match="closed='both'"):
        metric([1.0], [2.0], closed="both")
    with pytest.raises(InputError, match="n_bins=0"):
        metric([1.0], [2.0], n_bins=0)
    with pytest.raises(InputError, match="ties='wrong'"):
        metric([1.0], [2.0], ties="wrong")
    with pytest.raises(InputError, match="temperature=0"):
        metric([1.0], [2.0], temperature=0.0)
    with pytest.raises(NonFiniteError, match=r"chosen: 1 of 1"):
        metric([math.nan], [2.0])


def test_an_unknown_binning_is_named():
    with pytest.raises(InputError, match="binning='quantile'"):
        reliability.ece([1.0], [2.0], binning="quantile")
