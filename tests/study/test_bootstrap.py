"""Intervals over prompts: against drawing and counting the long way, against theory, and in time."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from rm_ood.errors import InputError, NonFiniteError
from rm_ood.study import bootstrap, detection
from rm_ood.study.metrics import ece, pair_accuracy

quarters = st.integers(-8, 8).map(lambda i: i / 4) | st.just(math.inf)
labelled = st.lists(st.tuples(quarters, st.integers(0, 5)), min_size=1, max_size=15)


@given(labelled, labelled)
def test_weighing_sorted_scores_is_drawing_them_again(clean, shifted):
    """Against the plain functions on rows repeated as often as their prompt was drawn."""
    (id_scores, id_prompts), (ood_scores, ood_prompts) = (
        map(list, zip(*side, strict=True)) for side in (clean, shifted)
    )
    found = bootstrap.detection_resamples(id_scores, ood_scores, id_prompts, ood_prompts, n_resamples=20, seed=3)
    prompts = list(dict.fromkeys(id_prompts + ood_prompts))
    rng = np.random.default_rng(3)
    for draw, picked in enumerate(rng.integers(len(prompts), size=(20, len(prompts)))):
        drawn = [prompts[i] for i in picked]
        c = [s for label in drawn for s, p in clean if p == label]
        o = [s for label in drawn for s, p in shifted if p == label]
        for name, values in found.items():
            expected = getattr(detection, name)(c, o) if c and o and len(prompts) > 1 else math.nan
            assert values[draw] == pytest.approx(expected, abs=1e-12, nan_ok=True), name


def test_95_percent_is_exact_where_it_is_a_whole_number():
    # Every draw of 40 prompts has 40 clean and 40 shifted rows: 38 of them are 95 %.
    rng = np.random.default_rng(0)
    clean, shifted = rng.normal(size=40), rng.normal(1, size=40)
    found = bootstrap.detection_resamples(clean, shifted, range(40), range(40), n_resamples=200)
    draws = np.random.default_rng(0).integers(40, size=(200, 40))
    for name in ("fpr95_id_positive", "fpr95_ood_positive"):
        expected = [getattr(detection, name)(clean[picked], shifted[picked]) for picked in draws]
        np.testing.assert_array_equal(found[name], expected)


def test_the_interval_of_a_mean_is_the_textbook_one():
    right = np.random.default_rng(0).random(1000) < 0.7
    low, high = bootstrap.clustered_interval(detection.flag_rate, range(1000), right)
    half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 1000)
    assert (low, high) == pytest.approx((right.mean() - half, right.mean() + half), abs=0.003)


def test_rows_of_one_prompt_are_no_evidence_of_their_own():
    # 100 prompts with 10 copies each: the interval is that of 100 rows, about 3.2 times as wide as that of 1,000.
    right = np.repeat(np.random.default_rng(1).random(100) < 0.7, 10)
    prompts = np.repeat(np.arange(100), 10)
    low, high = bootstrap.clustered_interval(detection.flag_rate, prompts, right)
    by_row = bootstrap.clustered_interval(detection.flag_rate, range(1000), right)
    assert (high - low) / (by_row[1] - by_row[0]) == pytest.approx(math.sqrt(10), rel=0.15)


def test_clean_and_shifted_rows_of_one_prompt_are_drawn_together():
    # The shifted score is the clean one and a little more: the pairing tells far more than the two samples.
    rng = np.random.default_rng(2)
    clean = rng.normal(size=300)
    shifted = clean + 0.2 + 0.02 * rng.normal(size=300)
    prompts = [f"prompt {i}" for i in range(300)]
    together = bootstrap.auroc_interval(clean, shifted, prompts, prompts)
    apart = bootstrap.auroc_interval(clean, shifted, prompts, [f"other {p}" for p in prompts])
    assert together[0] < detection.auroc(clean, shifted) < together[1]
    assert (together[1] - together[0]) < 0.3 * (apart[1] - apart[0])


def test_an_interval_covers_as_often_as_it_says():
    # AUROC of unit normals 1 apart is Phi(1 / sqrt 2) = .760; 90 % intervals of 100 experiments miss it 10 times, sd 3.
    missed = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        clean, shifted = rng.normal(size=150), rng.normal(1, size=150)
        low, high = bootstrap.auroc_interval(clean, shifted, range(150), range(150, 300), n_resamples=200, level=0.9)
        missed += not low <= 0.7602 <= high
    assert 3 <= missed <= 20


@pytest.mark.parametrize("n", [200, 2000])
@pytest.mark.parametrize("temperature", [1.0, 1.3, 3.0, 0.6], ids=["calibrated", "slightly over", "over", "under"])
def test_the_interval_of_ece_covers_as_often_as_it_says(temperature, n):
    """Pairs whose chosen response wins with the probability that the margin divided by a temperature stands for."""

    def drawn(n, rng):
        margin = np.abs(rng.normal(0, 1.5, size=n))
        right = rng.random(n) < special.expit(margin / temperature)
        return np.where(right, margin, 0.0), np.where(right, 0.0, margin)

    # Its own noise is .0004.
    truth = 0.0 if temperature == 1 else ece(*drawn(2_000_000, np.random.default_rng(1)))
    missed = 0
    for seed in range(60):
        pairs = drawn(n, np.random.default_rng(1000 + seed))
        low, high = bootstrap.ece_interval(*pairs, range(n), n_resamples=200)
        missed += not low <= truth <= high
    # 3 are expected; 9 or more have a probability of .003. The percentile interval of a calibrated model misses all 60.
    assert missed <= 8


def test_the_interval_of_ece_is_symmetric_about_the_debiased_error():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(2, 2, size=300), rng.normal(0, 2, size=300)
    prompts = np.repeat(np.arange(150), 2)
    low, high = bootstrap.ece_interval(chosen, rejected, prompts, n_resamples=200, seed=5)
    draws = np.random.default_rng(5).integers(150, size=(200, 150))
    rows = [np.concatenate([np.flatnonzero(prompts == p) for p in np.sort(picked)]) for picked in draws]
    again = [ece(chosen[r], rejected[r], debiased=True) for r in rows]
    centre = ece(chosen, rejected, debiased=True)
    assert high == pytest.approx(np.quantile(again, 0.975), abs=1e-12)
    assert low == pytest.approx(max(0, 2 * centre - high), abs=1e-12)
    assert np.isnan(bootstrap.ece_interval(chosen, rejected, [7] * 300, n_resamples=5)).all()


def test_prompts_keys_of_64_bits_stay_apart():
    # Equal as floats.
    keys = [2**63, 2**63 + 1, 2**63 + 2, 5]
    rng = np.random.default_rng(0)
    expected = bootstrap.clustered_interval(pair_accuracy, range(4), [1, 2, 3, 4], [0, 3, 2, 5])
    assert bootstrap.clustered_interval(pair_accuracy, keys, [1, 2, 3, 4], [0, 3, 2, 5]) == expected
    clean, shifted = rng.normal(size=4), rng.normal(size=4)
    assert bootstrap.auroc_interval(clean, shifted, np.array(keys, dtype=np.uint64), keys) == bootstrap.auroc_interval(
        clean, shifted, range(4), range(4)
    )


def test_the_seed_decides_and_the_draws_are_shared():
    rng = np.random.default_rng(4)
    chosen, rejected = rng.normal(0.5, size=(2, 80))
    runs = [bootstrap.clustered_interval(ece, range(80), chosen, rejected, seed=s, n_resamples=50) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    one, other = (
        bootstrap.detection_resamples(chosen, rejected + extra, range(80), range(80), n_resamples=50)["auroc"]
        for extra in (0.0, 1e-9)
    )
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(5)
    clean, shifted = rng.normal(size=(2, 60))
    whole = bootstrap.detection_resamples(clean, shifted, range(60), range(60), n_resamples=40)
    monkeypatch.setattr(bootstrap, "_BLOCK", 500)
    parts = bootstrap.detection_resamples(clean, shifted, range(60), range(60), n_resamples=40)
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name])


def test_a_study_of_2000_rows_takes_no_minutes():
    rng = np.random.default_rng(6)
    clean, shifted = rng.normal(size=2000), rng.normal(1, size=2000)
    start = time.process_time()
    low, high = bootstrap.auroc_interval(clean, shifted, range(2000), range(2000))
    # A thirtieth of a second of a core, whatever else runs on it.
    assert time.process_time() - start < 2
    assert low < detection.auroc(clean, shifted) < high


def test_one_prompt_has_no_spread():
    assert np.isnan(bootstrap.clustered_interval(pair_accuracy, ["a", "a"], [1.0, 2.0], [0.0, 3.0])).all()
    assert np.isnan(bootstrap.auroc_interval([1.0, 2.0], [3.0], [7, 7], [7])).all()
    assert np.isnan(bootstrap.percentile_interval([math.nan])).all()


def test_wrong_arguments_are_named():
    with pytest.raises(InputError, match=r"expected arrays of 3 rows, one per cluster label, got \[3, 2\]"):
        bootstrap.clustered_interval(pair_accuracy, range(3), [1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(InputError, match="ood_clusters: expected one per score, 1, got 2"):
        bootstrap.auroc_interval([1.0], [2.0], [0], [1, 2])
    with pytest.raises(NonFiniteError, match="id_scores: 1 of 1 are NaN"):
        bootstrap.auroc_interval([math.nan], [2.0], [0], [1])
    with pytest.raises(InputError, match="n_resamples=0"):
        bootstrap.auroc_interval([1.0], [2.0], [0], [1], n_resamples=0)
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="level="):
            bootstrap.percentile_interval([1.0], level)
