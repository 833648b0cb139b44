"""Tests of one batch: discoveries, beta-binomial count, rank-sum, all against one shared calibration set."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from rm_ood import CalibrationWarning
from rm_ood.batch_tests import batch_test, discoveries
from rm_ood.errors import CalibrationError, InputError


def test_discoveries_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 17, 400):
        p = rng.random(size) ** 3
        np.testing.assert_array_equal(discoveries(p, 0.1), stats.false_discovery_control(p) <= 0.1)
    assert not discoveries(np.array([0.9, 0.8]), 0.1).any()
    assert discoveries(np.array([0.05, 0.05]), 0.1).all()


def test_false_discoveries_stay_within_q() -> None:
    shares = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=100)
        scores[:10] += 4
        found = batch_test(rng.normal(size=1500), scores, q=0.2).discoveries
        shares.append(found[10:].sum() / max(found.sum(), 1))
        assert found.shape == (100,)
    assert np.mean(shares) - 3 * np.std(shares) / math.sqrt(300) <= 0.2 * 0.9
    assert np.mean(shares) > 0.05


@pytest.mark.parametrize("m", [50, 2000])
def test_a_clean_batch_is_called_off_as_rarely_as_promised(m: int) -> None:
    """A binomial count on 999 calibration scores is wrong in 7 % of batches of 2,048; this one is not."""
    counts, ranks = [], []
    for seed in range(600):
        rng = np.random.default_rng(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            test = batch_test(rng.normal(size=999), rng.normal(size=m))
        counts.append(test.count_p)
        ranks.append(test.rank_p)
    for level in (0.01, 0.05):
        most = stats.binom.ppf(0.999, 600, level)
        assert sum(p <= level for p in counts) <= most
        assert stats.binom.ppf(0.0005, 600, level) <= sum(p <= level for p in ranks) <= most
    # The count is nearly exact where it has many values to take.
    if m == 2000:
        assert sum(p <= 0.05 for p in counts) >= stats.binom.ppf(0.0005, 600, 0.045)


def test_each_shift_is_seen_by_its_test() -> None:
    rng = np.random.default_rng(1)
    calibration = rng.normal(size=1000)
    up = batch_test(calibration, rng.normal(size=60) + 2)
    assert up.count_p < 1e-3
    assert up.rank_p < 1e-9
    assert up.superiority == pytest.approx(0.92, abs=0.04)
    assert up.flagged == (up.p_values <= 0.01).sum() > 10
    collapsed = batch_test(calibration, rng.normal(-1, 0.5, size=60))
    assert collapsed.rank_p < 1e-6
    assert collapsed.count_p == 1.0
    assert collapsed.superiority < 0.3


def test_what_has_no_score_is_discovered() -> None:
    calibration = np.random.default_rng(2).normal(size=500)
    test = batch_test(calibration, [0.0, math.nan, -math.inf, math.inf], q=0.1)
    assert test.discoveries.tolist() == [False, True, True, True]
    assert test.flagged == 3
    assert np.isfinite(test.rank_p)


def test_too_small_a_resolution_is_said() -> None:
    calibration = np.random.default_rng(3).normal(size=299)
    with pytest.warns(
        CalibrationWarning, match="single odd item among 256 at a false discovery rate of 0.1: that takes 2559"
    ):
        batch_test(calibration, np.zeros(256))
    batch_test(calibration, np.zeros(30))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": 0.0}, "alpha"), ({"q": 1.0}, "q=1.0"), ({"scores": []}, "got none")],
)
def test_unusable_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        batch_test(np.arange(200.0), **{"scores": [1.0], **options})


def test_too_few_calibration_scores_are_refused() -> None:
    with pytest.raises(CalibrationError, match="at least 99"):
        batch_test(np.arange(50.0), [1.0])
