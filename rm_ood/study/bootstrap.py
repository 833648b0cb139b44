"""Intervals by a bootstrap over prompts: whole prompts are drawn again, with all that came from them.

Rows of one prompt are no independent draws (its two responses, its shifted versions), so an interval that draws rows is
too narrow. Clean and shifted rows of one prompt are drawn together, which keeps what they share out of the interval.

Percentile intervals: of a metric at the end of its range (an AUROC of 1) they have no width, and they ask for some tens
of prompts. ECE has an interval of its own, since noise only ever adds to it.

Reference:
    Davison and Hinkley, "Bootstrap Methods and their Application", 1997, 3.8 (whole clusters are drawn), 5.2 (basic
    limits) and 5.3 (percentile limits).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rm_ood.errors import InputError
from rm_ood.study.detection import score_vectors
from rm_ood.study.reliability import ece
from rm_ood.study.rewards import Floats

Counts = NDArray[np.int64]
Clusters = Sequence[Hashable] | NDArray[Any]

# Weights of so many rows at a time, which a CPU cache holds: three times as fast as ten times as many.
_BLOCK = 100_000


def clustered_interval(
    statistic: Callable[..., float],
    clusters: Clusters,
    *arrays: ArrayLike,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic of rows, such as `pair_accuracy` or `flag_rate`; of `ece`, take `ece_interval`.

    Args:
        statistic: takes the arrays, with rows of the prompts drawn (as often as each was drawn), and gives a number.
        clusters: (n,) the prompt of each row, `Pair.cluster`; any hashable.
        arrays: each with n rows.
        n_resamples: draws of the prompts; the same `seed` and prompts give the same draws for every statistic.
        level: of the interval, in (0, 1).

    Returns:
        Its two ends; NaN where all rows are of one prompt, or the statistic exists for no draw.

    Raises:
        InputError: no row, arrays of another length than `clusters`, a `level` outside (0, 1), `n_resamples` below 1.
    """
    return percentile_interval(_resamples(statistic, clusters, arrays, n_resamples, seed), level)


def ece_interval(
    chosen: ArrayLike,
    rejected: ArrayLike,
    clusters: Clusters,
    *,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of the expected calibration error that infinitely many pairs would show, in the bins of `ece`.

    The noise of the bins' accuracies adds to the error, and drawing the pairs again adds it once more: the percentile
    interval of a perfectly calibrated model's ECE lies above 0 always. So the draws are of the debiased error
    (`ece(debiased=True)`), which still errs upwards, and the interval is symmetric: the debiased error, plus and minus what
    the draws' upper quantile lies above it. Its upper end is the percentile limit and its lower end the basic one, each
    the limit that upward errors cannot bring too near; below 0 it is cut off. In simulations with 200 to 2,000 pairs, 95 %
    intervals held the true error in 93 to 99 % of the experiments, of calibrated, over- and under-confident models alike.
    The plain `ece` may lie above the upper end.

    Args:
        chosen, rejected: (n,) rewards.
        clusters, n_resamples, level, seed: as in `clustered_interval`.

    Returns:
        Its two ends, in [0, 1]; NaN where all pairs are of one prompt.

    Raises:
        InputError, NonFiniteError: as `ece` and `clustered_interval`.

    Reference:
        Davison and Hinkley, 1997, 5.2 and 5.3 (the limits); Hall, "On symmetric bootstrap confidence intervals", J. R.
        Statist. Soc. B 50(1), 1988; Kumar, Liang and Ma, NeurIPS 2019 (the debiased error).
    """
    debiased = partial(ece, debiased=True)
    _, high = percentile_interval(_resamples(debiased, clusters, (chosen, rejected), n_resamples, seed), level)
    centre = debiased(chosen, rejected)
    if math.isnan(high):
        return math.nan, math.nan
    half = max(0.0, high - centre)
    return max(0.0, centre - half), min(1.0, centre + half)


def _resamples(
    statistic: Callable[..., float], clusters: Clusters, arrays: Sequence[ArrayLike], n_resamples: int, seed: int
) -> Floats:
    """The statistic of every draw of the prompts, (n_resamples,); NaN where all rows are of one prompt."""
    rows = [np.asarray(array) for array in arrays]
    if not rows or any(len(array) != len(clusters) for array in rows):
        lengths = [len(array) for array in rows]
        raise InputError(
            f"clustered_interval: expected arrays of {len(clusters)} rows, one per cluster label, got {lengths}"
        )
    codes, n_prompts = _codes(clusters)
    values = []
    for drawn in _draws(n_prompts, n_resamples, seed, len(codes)):
        for counts in drawn:
            again = np.repeat(np.arange(len(codes)), counts[codes])
            values.append(statistic(*(array[again] for array in rows)))
    return np.array(values) if n_prompts > 1 else np.full(n_resamples, math.nan)


def auroc_interval(
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    id_clusters: Clusters,
    ood_clusters: Clusters,
    *,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of `auroc`; of a difference of two, or of `fpr95_*`: `percentile_interval` of `detection_resamples`.

    Args:
        id_scores: (n,) scores of clean items; infinities allowed.
        ood_scores: (m,) scores of shifted items.
        id_clusters: (n,) the prompt of each clean item.
        ood_clusters: (m,) the prompt that each shifted item came from; one that a clean item has is drawn with it.
        n_resamples, level, seed: as in `clustered_interval`.

    Returns:
        Its two ends; NaN where all items are of one prompt.

    Raises:
        InputError, NonFiniteError: as `auroc` and `clustered_interval`.
    """
    values = detection_resamples(id_scores, ood_scores, id_clusters, ood_clusters, n_resamples=n_resamples, seed=seed)
    return percentile_interval(values["auroc"], level)


def detection_resamples(
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    id_clusters: Clusters,
    ood_clusters: Clusters,
    *,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Floats]:
    """`auroc`, `fpr95_id_positive` and `fpr95_ood_positive` of every draw of the prompts.

    Scores are sorted once; a draw only weighs them. Draws depend on `seed` and the prompts alone, so that values of two
    detectors may be subtracted draw by draw.

    Args:
        id_scores, ood_scores, id_clusters, ood_clusters, n_resamples, seed: as in `auroc_interval`.

    Returns:
        The three names, each with (n_resamples,) values; NaN where a draw has no clean or no shifted item, and
        everywhere where all items are of one prompt.

    Raises:
        InputError, NonFiniteError: as `auroc_interval`.
    """
    clean, shifted = score_vectors(id_scores, ood_scores)
    for name, scores, labels in (("id", clean, id_clusters), ("ood", shifted, ood_clusters)):
        if len(scores) != len(labels):
            raise InputError(f"{name}_clusters: expected one per score, {len(scores)}, got {len(labels)}")
    codes, n_prompts = _codes([*id_clusters, *ood_clusters])
    order_clean, order_shifted = np.argsort(clean, kind="stable"), np.argsort(shifted, kind="stable")
    ranked = _Ranked.of(clean[order_clean], shifted[order_shifted])
    clean_codes, shifted_codes = codes[: len(clean)][order_clean], codes[len(clean) :][order_shifted]
    found: list[tuple[Floats, Floats, Floats]] = []
    for drawn in _draws(n_prompts, n_resamples, seed, len(codes)):
        found.append(ranked.metrics(drawn[:, clean_codes], drawn[:, shifted_codes]))
    metrics = [np.concatenate(values) for values in zip(*found, strict=True)]
    if n_prompts == 1:
        metrics = [np.full(n_resamples, math.nan)] * 3
    return dict(zip(("auroc", "fpr95_id_positive", "fpr95_ood_positive"), metrics, strict=True))


def percentile_interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The middle share `level` of resampled values, NaNs left out; NaN where nothing else is there.

    Raises:
        InputError: a `level` outside (0, 1).
    """
    if not 0 < level < 1:
        raise InputError(f"level={level}: expected a fraction in (0, 1)")
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[~np.isnan(numbers)]
    if numbers.size == 0:
        return math.nan, math.nan
    low, high = np.quantile(numbers, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class _Ranked:
    """Where ascending clean and shifted scores stand among each other: how many of one are below, or at most, the other."""

    clean_below: Counts
    clean_up_to: Counts
    shifted_up_to: Counts
    tied: bool

    @classmethod
    def of(cls, clean: Floats, shifted: Floats) -> _Ranked:
        below, up_to = np.searchsorted(clean, shifted, side="left"), np.searchsorted(clean, shifted, side="right")
        return cls(below, up_to, np.searchsorted(shifted, clean, side="right"), bool((below != up_to).any()))

    def metrics(self, clean: Counts, shifted: Counts) -> tuple[Floats, Floats, Floats]:
        """(draws, n) and (draws, m) weights, by ascending score -> the three metrics, (draws,) each."""
        clean_sums, shifted_sums = _sums(clean), _sums(shifted)
        n_clean, n_shifted = clean_sums[:, -1], shifted_sums[:, -1]
        beaten = clean_sums[:, self.clean_below].astype(np.float64)
        if self.tied:
            beaten = (beaten + clean_sums[:, self.clean_up_to]) / 2
        wins = np.einsum("ij,ij->i", beaten, shifted)
        # Whole numbers throughout, so that 95 % is exact. The first clean score that keeps enough:
        keeps = np.argmax(100 * clean_sums[:, 1:] >= 95 * n_clean[:, None], axis=1)
        # and the last shifted score with at most 5 % below it; of equal ones, any has the same clean ones below.
        catches = (
            shifted.shape[1] - 1 - np.argmax((100 * shifted_sums[:, :-1] <= 5 * n_shifted[:, None])[:, ::-1], axis=1)
        )
        draws = np.arange(len(clean))
        accepted = shifted_sums[draws, self.shifted_up_to[keeps]]
        passed = clean_sums[draws, self.clean_below[catches]]
        with np.errstate(invalid="ignore", divide="ignore"):
            there = np.where((n_clean > 0) & (n_shifted > 0), 1.0, math.nan)
            return (
                wins / (n_clean * n_shifted) * there,
                accepted / n_shifted * there,
                (n_clean - passed) / n_clean * there,
            )


def _sums(weights: Counts) -> Counts:
    """Sums of the first 0, 1, ... weights of each draw."""
    sums = np.zeros((len(weights), weights.shape[1] + 1), dtype=np.int64)
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


def _codes(clusters: Clusters) -> tuple[Counts, int]:
    """Labels as 0, 1, ... in order of first sight, and how many; 64-bit keys pass through no float."""
    seen: dict[Hashable, int] = {}
    codes = [seen.setdefault(label, len(seen)) for label in clusters]
    return np.array(codes, dtype=np.int64), len(seen)


def _draws(n_prompts: int, n_resamples: int, seed: int, n_rows: int) -> Iterator[Counts]:
    """Blocks of (draws, n_prompts) counts: how often each prompt was drawn."""
    if n_resamples < 1:
        raise InputError(f"n_resamples={n_resamples}: expected at least 1")
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n_rows)
    for start in range(0, n_resamples, block):
        size = min(block, n_resamples - start)
        drawn = rng.integers(n_prompts, size=(size, n_prompts)) + n_prompts * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n_prompts).reshape(size, n_prompts)
