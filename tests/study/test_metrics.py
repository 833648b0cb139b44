"""Numbers of reward pairs: against scikit-learn, loops, and the paper's released scores."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import brier_score_loss, log_loss

from rm_ood.errors import InputError, NonFiniteError
from rm_ood.study import metrics

PAPER_SCORES = Path(__file__).resolve().parents[3] / "shared" / "data" / "paper_scores"
ENGLISH_SFF = PAPER_SCORES / "deberta_v3_large" / "open_ai_summarize_from_feedback" / "english_original_scores.csv.gz"

quarters = st.integers(-20, 20).map(lambda i: i / 4)
pairs = st.lists(st.tuples(quarters, quarters), min_size=1, max_size=40)
NAMES = {
    "n_pairs", "accuracy", "ties", "confidence", "ece", "ece_equal_mass", "ece_debiased", "mce", "brier", "nll",
    "temperature", "ece_at_id_temperature", "length_reward_correlation",
}  # fmt: skip


@pytest.mark.shared
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


@given(pairs)
def test_brier_and_nll_are_scikit_learns(rows):
    chosen, rejected = np.array(rows).T
    # The probability that the first wins, and that it did.
    p = 1 / (1 + np.exp(rejected - chosen))
    won = np.ones(len(rows))
    assert metrics.brier_score(chosen, rejected) == pytest.approx(brier_score_loss(won, p, labels=[0, 1]), abs=1e-12)
    assert metrics.nll(chosen, rejected) == pytest.approx(log_loss(won, p, labels=[0, 1]), abs=1e-9)


def test_a_tie_is_a_coin_to_every_proper_score():
    assert metrics.brier_score([1.0], [1.0]) == 0.25
    assert metrics.nll([1.0], [1.0]) == pytest.approx(math.log(2))
    # So is everything at an infinite temperature.
    assert metrics.nll([9.0], [1.0], math.inf) == pytest.approx(math.log(2))
    largest = np.finfo(np.float64).max
    assert metrics.brier_score([-largest], [largest], 0.1) == 1.0
    for score in (metrics.brier_score, metrics.nll):
        with pytest.raises(InputError, match="temperature=0"):
            score([1.0], [1.0], 0.0)


@given(pairs)
def test_the_temperature_fitted_has_the_smallest_nll(rows):
    chosen, rejected = np.array(rows).T
    best = metrics.fit_temperature(chosen, rejected)
    d = chosen - rejected
    if d.mean() <= 0:
        assert best == math.inf
    elif d.min() >= 0:
        assert best == 0.0
    else:
        at_best = metrics.nll(chosen, rejected, best)
        for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2.0):
            assert metrics.nll(chosen, rejected, best * factor) >= at_best
        # In the unit of the rewards.
        assert metrics.fit_temperature(chosen * 1e6, rejected * 1e6) == pytest.approx(best * 1e6, rel=1e-6)


def test_temperatures_without_an_optimum():
    assert metrics.fit_temperature([1.0, 0.0], [0.0, 0.0]) == 0.0
    assert metrics.fit_temperature([1.0, 0.0], [0.0, 1.0]) == math.inf
    assert metrics.fit_temperature([1.0], [1.0]) == math.inf


def test_the_temperature_of_a_known_model_is_found():
    rng = np.random.default_rng(0)
    d = rng.normal(scale=2, size=100_000)
    sign = np.where(rng.random(100_000) < 1 / (1 + np.exp(-np.abs(d))), 1, -1)
    assert metrics.fit_temperature(2.5 * sign * np.abs(d), np.zeros(100_000)) == pytest.approx(2.5, rel=0.02)


@given(st.lists(quarters | st.just(math.inf) | st.just(-math.inf), min_size=1, max_size=40), st.integers(1, 9))
def test_a_histogram_counts_everything(values, n_bins):
    found = metrics.histogram(values, n_bins)
    assert sum(found["count"]) == len(values)
    assert len(found["edges"]) == n_bins + 1
    again = metrics.histogram(values, edges=[-1.0, 0.0, 1.0])
    assert again["count"] == [sum(v < 0 for v in values), sum(v >= 0 for v in values)]
    json.dumps([found, again], allow_nan=False)


def test_histogram_edges_are_checked():
    for edges in ([1.0], [1.0, 1.0], [2.0, 1.0], [0.0, math.inf]):
        with pytest.raises(InputError, match="edges: expected at least two finite, ascending edges"):
            metrics.histogram([1.0], edges=edges)
    with pytest.raises(InputError, match="n_bins=0"):
        metrics.histogram([1.0], n_bins=0)
    with pytest.raises(NonFiniteError, match="values: 1 of 2 are NaN"):
        metrics.histogram([1.0, math.nan])


def test_length_and_reward_are_compared_within_pairs():
    rng = np.random.default_rng(1)
    # Long prompts get long answers and low rewards; within a pair, the longer answer gets more.
    level = rng.normal(size=300)
    lengths = 100 + 20 * level + rng.normal(size=(2, 300))
    rewards = -5 * level + (lengths - 100 - 20 * level) + 0.5 * rng.normal(size=(2, 300))
    found = metrics.length_reward_correlation(*rewards, *lengths)
    assert found > 0.8
    assert np.corrcoef(lengths.ravel(), rewards.ravel())[0, 1] < -0.5
    # The same whichever of a pair comes first.
    swap = rng.random(300) < 0.5
    swapped = [np.where(swap, x[::-1], x) for x in (rewards, lengths)]
    assert metrics.length_reward_correlation(*swapped[0], *swapped[1]) == pytest.approx(found, abs=1e-12)
    d, dl = rewards[0] - rewards[1], lengths[0] - lengths[1]
    ranks = [stats.rankdata([*x, *-x]) for x in (d, dl)]
    assert found == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)


def test_no_difference_in_length_has_no_correlation():
    assert math.isnan(metrics.length_reward_correlation([1.0, 2.0], [0.0, 3.0], [5, 5], [5, 5]))
    assert math.isnan(metrics.length_reward_correlation([1.0, 2.0], [1.0, 2.0], [5, 5], [5, 6]))
    with pytest.raises(InputError, match="lengths: expected one of every pair, got 1 for 2"):
        metrics.length_reward_correlation([1.0, 2.0], [0.0, 3.0], [5], [5])


@given(st.lists(st.tuples(quarters | st.just(math.inf), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=40))
def test_risk_coverage_keeps_the_least_strange_first(rows):
    scores, credit = map(np.array, zip(*rows, strict=True))
    curve = metrics.risk_coverage(scores, credit)
    thresholds = sorted(set(scores))
    assert curve["coverage"] == pytest.approx([np.mean(scores <= t) for t in thresholds])
    assert curve["accuracy"] == pytest.approx([credit[scores <= t].mean() for t in thresholds])


def test_a_long_risk_coverage_curve_is_thinned_and_whole():
    rng = np.random.default_rng(2)
    scores, credit = rng.normal(size=5000), (rng.random(5000) < 0.7).astype(float)
    curve = metrics.risk_coverage(scores, credit)
    assert len(curve["coverage"]) == len(curve["accuracy"]) == 100
    assert curve["coverage"][-1] == 1.0
    assert curve["accuracy"][-1] == pytest.approx(credit.mean())
    kept = np.sort(scores)[round(curve["coverage"][49] * 5000) - 1]
    assert curve["accuracy"][49] == pytest.approx(credit[scores <= kept].mean())


def test_risk_coverage_checks_what_comes():
    with pytest.raises(InputError, match="one score per item, got 2 and 1"):
        metrics.risk_coverage([1.0, 2.0], [1.0])
    with pytest.raises(NonFiniteError, match="scores: 1 of 1 are NaN"):
        metrics.risk_coverage([math.nan], [1.0])
    for bad in (-1.0, 2.0, math.nan):
        with pytest.raises(InputError, match=r"credits in \[0, 1\]"):
            metrics.risk_coverage([1.0], [bad])


def test_flagged_pairs_are_told_from_the_others():
    chosen, rejected = np.array([2.0, 1.0, 0.0, 3.0]), np.array([1.0, 2.0, 0.0, 0.0])
    found = metrics.selective_metrics(chosen, rejected, [False, True, True, False])
    assert found["unflagged"] == {"n": 2, "accuracy": 1.0, "ece": metrics.ece([2.0, 3.0], [1.0, 0.0])}
    assert found["flagged"] == {"n": 2, "accuracy": 0.25, "ece": metrics.ece([1.0, 0.0], [2.0, 0.0])}
    nothing = metrics.selective_metrics(chosen, rejected, np.zeros(4, dtype=bool))
    assert nothing["flagged"] == {"n": 0, "accuracy": None, "ece": None}
    with pytest.raises(InputError, match="flagged: expected 4 booleans, got int64"):
        metrics.selective_metrics(chosen, rejected, [0, 1, 1, 0])


@given(pairs)
def test_all_numbers_at_once(rows):
    chosen, rejected = np.array(rows).T
    lengths = (np.arange(len(rows)), np.arange(len(rows))[::-1])
    found = metrics.pair_metrics(chosen, rejected, temperature=2.0, lengths=lengths, min_count=1)
    assert set(found) == NAMES
    json.dumps(found, allow_nan=False)
    assert found["n_pairs"] == len(rows)
    assert found["accuracy"] == metrics.pair_accuracy(chosen, rejected)
    assert found["ties"] == metrics.tie_count(chosen, rejected)
    assert found["ece"] == metrics.ece(chosen, rejected)
    assert found["ece_equal_mass"] == metrics.ece(chosen, rejected, binning="equal_mass")
    assert found["ece_debiased"] == metrics.ece(chosen, rejected, debiased=True)
    assert found["mce"] == metrics.mce(chosen, rejected, min_count=1)
    assert found["ece_at_id_temperature"] == metrics.ece(chosen, rejected, temperature=2.0)
    fitted = metrics.fit_temperature(chosen, rejected)
    assert found["temperature"] == (None if fitted == math.inf else fitted)


def test_what_does_not_apply_is_none():
    found = metrics.pair_metrics([1.0, 0.0], [0.0, 100.0])
    assert {name for name, value in found.items() if value is None} == {
        "mce", "temperature", "ece_at_id_temperature", "length_reward_correlation",
    }  # fmt: skip
    # No pair is left by the paper's bins.
    assert metrics.pair_metrics([100.0], [0.0], keep_certain=False, closed="left")["ece"] is None
    # The two ends of temperature: never sure, always sure.
    assert metrics.pair_metrics([1.0], [0.0], temperature=math.inf)["ece_at_id_temperature"] == 0.5
    assert metrics.pair_metrics([1.0], [0.0], temperature=0.0)["ece_at_id_temperature"] == 0.0
