"""Detection metrics against definitions written out the long way, and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from rm_ood.errors import InputError, NonFiniteError
from rm_ood.study import detection

quarters = st.integers(-20, 20).map(lambda i: i / 4)
scores = st.lists(quarters | st.just(math.inf), min_size=1, max_size=40)


@given(scores, scores)
def test_auroc_is_the_probability_that_a_shifted_item_scores_higher(clean, shifted):
    wins = [(s > c) + 0.5 * (s == c) for c in clean for s in shifted]
    assert detection.auroc(clean, shifted) == pytest.approx(np.mean(wins), abs=1e-12)


@given(scores, scores)
def test_detection_agrees_with_scikit_learn(clean, shifted):
    # scikit-learn takes no infinities; the ranks are all that matters.
    values = np.minimum(np.array(clean + shifted), 1e3)
    is_ood = np.repeat([0, 1], [len(clean), len(shifted)])
    assert detection.auroc(clean, shifted) == pytest.approx(roc_auc_score(is_ood, values), abs=1e-12)
    fpr, tpr, _ = roc_curve(is_ood, values, drop_intermediate=False)
    assert detection.fpr95_ood_positive(clean, shifted) == pytest.approx(fpr[tpr >= 0.95 - 1e-12][0])
    assert detection.aupr(clean, shifted) == pytest.approx(average_precision_score(is_ood, values), abs=1e-12)
    fpr, tpr, _ = roc_curve(1 - is_ood, -values, drop_intermediate=False)
    assert detection.fpr95_id_positive(clean, shifted) == pytest.approx(fpr[tpr >= 0.95 - 1e-12][0])


def test_the_two_conventions_of_fpr95_are_not_each_other():
    clean, shifted = np.arange(100.0), np.array([90.0] * 10 + [94.0] * 5 + [200.0] * 85)
    # 95 of 100 clean ones are kept at 94, which accepts 15 of 100; catching 95 shifted ones takes a threshold of 90.
    assert detection.fpr95_id_positive(clean, shifted) == 0.15
    assert detection.fpr95_ood_positive(clean, shifted) == 0.10


@pytest.mark.parametrize("n", [1, 19, 20, 40, 60, 100, 140, 1000, 12345])
def test_the_95_percent_rank_is_exact(n):
    clean = np.arange(n, dtype=float)
    kept = math.ceil(n * 95 / 100)
    # The shifted scores sit on the threshold itself: accepted; one step above: not.
    assert detection.fpr95_id_positive(clean, [kept - 1.0]) == 1.0
    assert detection.fpr95_id_positive(clean, [kept - 0.5]) == 0.0
    assert detection.fpr95_ood_positive([n - float(kept)], clean) == 1.0
    assert detection.fpr95_ood_positive([n - kept - 0.5], clean) == 0.0


@pytest.mark.parametrize("name", ["auroc", "aupr", "fpr95_id_positive", "fpr95_ood_positive", "roc_curve"])
def test_nan_scores_and_empty_sides_are_refused(name):
    metric = getattr(detection, name)
    with pytest.raises(NonFiniteError, match=r"ood_scores: 1 of 2 are NaN \(rows \[0\]\)"):
        metric([1.0], [math.nan, 1.0])
    with pytest.raises(InputError, match="id_scores: expected a vector of at least one value"):
        metric([], [1.0])


def aupr_by_loop(clean, shifted):
    total = 0.0
    for threshold in sorted(set(clean) | set(shifted)):
        at = sum(s == threshold for s in shifted)
        caught, flagged = sum(s >= threshold for s in shifted), sum(s >= threshold for s in [*clean, *shifted])
        total += at / len(shifted) * caught / flagged
    return total


@given(scores, scores)
def test_aupr_is_the_mean_precision_at_the_shifted_items(clean, shifted):
    assert detection.aupr(clean, shifted) == pytest.approx(aupr_by_loop(clean, shifted), abs=1e-12)


def test_what_cannot_be_scored_is_flagged_and_not_lost():
    # One shifted item of two has no score; the other is the most typical of all.
    assert detection.auroc([1.0, 2.0], [math.inf, 0.0]) == 0.5
    assert detection.fpr95_id_positive([1.0, 2.0], [math.inf, 0.0]) == 0.5
    # More than 5 % of the clean items without a score: nothing finite keeps 95 % of them.
    assert detection.fpr95_id_positive([1.0, math.inf], [5.0, 6.0]) == 1.0


@given(scores, scores)
def test_a_short_roc_curve_is_whole(clean, shifted):
    curve = detection.roc_curve(clean, shifted)
    assert (curve["fpr"][0], curve["tpr"][0], curve["fpr"][-1], curve["tpr"][-1]) == (0, 0, 1, 1)
    assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(detection.auroc(clean, shifted), abs=1e-12)


def test_a_roc_curve_that_fits_loses_no_point():
    # Half of all scores are one: the corners of the other half stand closer than a hundredth of the way.
    clean, shifted = np.r_[np.arange(45.0), [99] * 45], np.r_[np.arange(45.0) + 0.5, [99] * 45]
    curve = detection.roc_curve(clean, shifted)
    fpr, tpr, _ = roc_curve(np.repeat([0, 1], 90), np.r_[clean, shifted])
    assert len(fpr) > 80
    assert (curve["fpr"], curve["tpr"]) == (fpr.tolist(), tpr.tolist())


def test_a_long_roc_curve_has_100_points_and_its_area():
    rng = np.random.default_rng(0)
    clean, shifted = rng.normal(size=5000), rng.normal(1, size=5000)
    curve = detection.roc_curve(clean, shifted)
    assert 90 <= len(curve["fpr"]) == len(curve["tpr"]) <= 100
    assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(detection.auroc(clean, shifted), abs=1e-3)
    assert (curve["fpr"][0], curve["tpr"][-1]) == (0.0, 1.0)


def test_flag_rate_counts_booleans_only():
    assert detection.flag_rate([True, False, False, True]) == 0.5
    for bad in ([0.2, 0.4], [], [[True]], [1, 0]):
        with pytest.raises(InputError, match="flags: expected a vector of booleans"):
            detection.flag_rate(bad)
