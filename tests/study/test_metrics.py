"""Metrics against definitions written out the long way, scikit-learn, and the paper's released scores."""

from __future__ import annotations

import csv
import gzip
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from rm_ood.errors import InputError, NonFiniteError
from rm_ood.study import metrics

PAPER_SCORES = Path(__file__).resolve().parents[3] / "shared" / "data" / "paper_scores"
ENGLISH_SFF = PAPER_SCORES / "deberta_v3_large" / "open_ai_summarize_from_feedback" / "english_original_scores.csv.gz"

# Quarters make ties and values on the bins' edges common.
quarters = st.integers(-20, 20).map(lambda i: i / 4)
pairs = st.lists(st.tuples(quarters, quarters), min_size=1, max_size=40)
scores = st.lists(quarters | st.just(math.inf), min_size=1, max_size=40)


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
def test_ece_is_its_definition(rewards, n_bins, ties, closed):
    chosen, rejected = zip(*rewards, strict=True)
    expected = ece_by_loop(chosen, rejected, n_bins, ties, closed)
    assert metrics.ece(chosen, rejected, n_bins, ties=ties, closed=closed) == pytest.approx(expected, abs=1e-12)


def test_english_sff_reproduces_the_paper():
    if not ENGLISH_SFF.exists():
        pytest.skip("the paper's released scores are not beside the project")
    with gzip.open(ENGLISH_SFF, "rt", encoding="utf-8") as lines:
        rewards = np.array([(float(row["chosen"]), float(row["rejected"])) for row in csv.DictReader(lines)])
    chosen, rejected = rewards.T
    assert len(chosen) == 83_802
    assert f"{100 * metrics.pair_accuracy(chosen, rejected, ties='correct'):.2f}" == "71.62"
    value = metrics.ece(chosen, rejected, ties="correct", closed="left", keep_certain=False)
    assert value == pytest.approx(0.14528659532547955, abs=1e-12)


def test_a_tie_counts_as_asked():
    chosen, rejected = [1.0, 2.0, 0.0], [1.0, 0.0, 2.0]
    assert metrics.pair_accuracy(chosen, rejected) == 0.5
    assert metrics.pair_accuracy(chosen, rejected, ties="correct") == pytest.approx(2 / 3)
    assert metrics.tie_count(chosen, rejected) == 1
    # One tie alone: confidence .5, and half a credit is perfectly calibrated.
    assert metrics.ece([1.0], [1.0]) == 0.0
    assert metrics.ece([1.0], [1.0], ties="correct") == 0.5


def test_the_edge_of_a_bin_decides_where_a_tie_goes():
    # Confidence .5 (correct by credit) and .55 (wrong): apart under (low, high], in one bin under [low, high).
    gap = math.log(0.55 / 0.45)
    chosen, rejected = [0.0, 0.0], [0.0, gap]
    apart = metrics.ece(chosen, rejected, ties="correct", closed="right")
    together = metrics.ece(chosen, rejected, ties="correct", closed="left")
    assert apart == pytest.approx((0.5 + 0.55) / 2)
    assert together == pytest.approx(abs(1 - 0.5 - 0.55) / 2)


def test_certain_pairs_are_kept_unless_the_papers_definition_is_asked_for():
    chosen, rejected = [0.0, 1.0], [100.0, 0.0]
    sure = 1 / (1 + math.exp(-1))
    assert metrics.confidence(chosen, rejected)[0] == 1.0
    assert metrics.ece(chosen, rejected, closed="left") == pytest.approx((1 + 1 - sure) / 2)
    assert metrics.ece(chosen, rejected, closed="left", keep_certain=False) == pytest.approx(1 - sure)
    assert math.isnan(metrics.ece([0.0], [100.0], keep_certain=False))


@given(pairs)
def test_confidence_is_the_softmax_of_the_winner(rewards):
    chosen, rejected = np.array(rewards).T
    e = np.exp(np.stack([chosen, rejected]))
    np.testing.assert_allclose(metrics.confidence(chosen, rejected), (e / e.sum(0)).max(0), rtol=1e-12)


def test_rewards_at_the_ends_of_the_float_range_do_not_overflow():
    largest = np.finfo(np.float64).max
    # Warnings are errors here.
    assert metrics.confidence([largest], [-largest])[0] == 1.0
    assert metrics.energy_score([largest], [-largest])[0] == -largest


@given(pairs, st.sampled_from([0.1, 1.0, 5.0]))
def test_energy_is_minus_the_soft_maximum_whatever_the_order(rewards, temperature):
    chosen, rejected = np.array(rewards).T
    expected = -temperature * np.log(np.exp(chosen / temperature) + np.exp(rejected / temperature))
    np.testing.assert_allclose(metrics.energy_score(chosen, rejected, temperature), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(metrics.energy_score(chosen, rejected), metrics.energy_score(rejected, chosen))


def test_energy_is_larger_off_the_ground():
    assert metrics.energy_score([-3.0], [-4.0])[0] > metrics.energy_score([3.0], [2.0])[0]


@given(scores, scores)
def test_auroc_is_the_probability_that_a_shifted_item_scores_higher(clean, shifted):
    wins = [(s > c) + 0.5 * (s == c) for c in clean for s in shifted]
    assert metrics.auroc(clean, shifted) == pytest.approx(np.mean(wins), abs=1e-12)


@given(scores, scores)
def test_detection_agrees_with_scikit_learn(clean, shifted):
    # scikit-learn takes no infinities; the ranks are all that matters.
    values = np.minimum(np.array(clean + shifted), 1e3)
    is_ood = np.repeat([0, 1], [len(clean), len(shifted)])
    assert metrics.auroc(clean, shifted) == pytest.approx(roc_auc_score(is_ood, values), abs=1e-12)
    fpr, tpr, _ = roc_curve(is_ood, values, drop_intermediate=False)
    assert metrics.fpr95_ood_positive(clean, shifted) == pytest.approx(fpr[tpr >= 0.95 - 1e-12][0])
    fpr, tpr, _ = roc_curve(1 - is_ood, -values, drop_intermediate=False)
    assert metrics.fpr95_id_positive(clean, shifted) == pytest.approx(fpr[tpr >= 0.95 - 1e-12][0])


def test_the_two_conventions_of_fpr95_are_not_each_other():
    clean, shifted = np.arange(100.0), np.array([90.0] * 10 + [94.0] * 5 + [200.0] * 85)
    # 95 of 100 clean ones are kept at 94, which accepts 15 of 100; catching 95 shifted ones takes a threshold of 90.
    assert metrics.fpr95_id_positive(clean, shifted) == 0.15
    assert metrics.fpr95_ood_positive(clean, shifted) == 0.10


@pytest.mark.parametrize("n", [1, 19, 20, 40, 60, 100, 140, 1000, 12345])
def test_the_95_percent_rank_is_exact(n):
    clean = np.arange(n, dtype=float)
    kept = math.ceil(n * 95 / 100)
    # The shifted scores sit on the threshold itself: accepted; one step above: not.
    assert metrics.fpr95_id_positive(clean, [kept - 1.0]) == 1.0
    assert metrics.fpr95_id_positive(clean, [kept - 0.5]) == 0.0
    assert metrics.fpr95_ood_positive([n - float(kept)], clean) == 1.0
    assert metrics.fpr95_ood_positive([n - kept - 0.5], clean) == 0.0


@pytest.mark.parametrize("metric", [metrics.pair_accuracy, metrics.tie_count, metrics.confidence, metrics.ece])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_refused_by_row(metric, bad):
    with pytest.raises(NonFiniteError, match=r"rejected: 1 of 3 .*rows \[1\]"):
        metric([1.0, 2.0, 3.0], [1.0, bad, 3.0])


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.fpr95_id_positive, metrics.fpr95_ood_positive])
def test_nan_scores_and_empty_sides_are_refused(metric):
    with pytest.raises(NonFiniteError, match=r"ood_scores: 1 of 2 are NaN \(rows \[0\]\)"):
        metric([1.0], [math.nan, 1.0])
    with pytest.raises(InputError, match="id_scores: expected a vector of at least one value"):
        metric([], [1.0])


def test_options_and_shapes_are_checked():
    with pytest.raises(InputError, match="as many chosen as rejected, got 2 and 1"):
        metrics.pair_accuracy([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match=r"chosen: expected a vector .* shape \(1, 1\)"):
        metrics.pair_accuracy([[1.0]], [1.0])
    with pytest.raises(InputError, match="ties='wrong'"):
        metrics.pair_accuracy([1.0], [2.0], ties="wrong")
    with pytest.raises(InputError, match="closed='both'"):
        metrics.ece([1.0], [2.0], closed="both")
    with pytest.raises(InputError, match="n_bins=0"):
        metrics.ece([1.0], [2.0], n_bins=0)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="positive temperature"):
            metrics.energy_score([1.0], [2.0], T=temperature)
