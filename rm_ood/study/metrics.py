"""Numbers of a shift study: accuracy and calibration of reward pairs, and how well OOD scores tell shifted from clean.

Rewards come as pairs (chosen, rejected), any unit; OOD scores are larger for more out-of-distribution. The defaults are
the correct definitions; `ties="correct"`, `closed="left"`, `keep_certain=False` are those of the paper.

Reference:
    LeVine et al., "A baseline analysis of reward models' ability to accurately analyze foundation models under
    distribution shift", arXiv 2311.14743, 2023, and its released code.
    Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from rm_ood.errors import InputError, NonFiniteError

Floats = NDArray[np.float64]

_TIES = ("half", "correct")
_CLOSED = ("right", "left")


def pair_accuracy(chosen: ArrayLike, rejected: ArrayLike, ties: str = "half") -> float:
    """Share of pairs in which the chosen response has the larger reward.

    Args:
        chosen: (n,) rewards of the chosen responses.
        rejected: (n,) rewards of the rejected responses.
        ties: what equal rewards count: `"half"`, or `"correct"` (an argmax that returns index 0, as in the paper).

    Returns:
        A fraction in [0, 1].

    Raises:
        InputError: no pair, unequal lengths, or an unknown `ties`.
        NonFiniteError: a reward that is NaN or infinite.
    """
    return float(_correct(*_pairs(chosen, rejected), ties).mean())


def tie_count(chosen: ArrayLike, rejected: ArrayLike) -> int:
    """Number of pairs with exactly equal rewards: state it beside any accuracy. Raises as `pair_accuracy`."""
    c, r = _pairs(chosen, rejected)
    return int((c == r).sum())


def confidence(chosen: ArrayLike, rejected: ArrayLike) -> Floats:
    """Bradley-Terry probability of the response with the larger reward, (n,) in [.5, 1].

    Raises:
        InputError, NonFiniteError: as `pair_accuracy`.
    """
    c, r = _pairs(chosen, rejected)
    # A difference past the largest float is infinite, and its confidence 1, as it should be.
    with np.errstate(over="ignore"):
        return np.asarray(special.expit(np.abs(c - r)), dtype=np.float64)


def ece(
    chosen: ArrayLike,
    rejected: ArrayLike,
    n_bins: int = 10,
    ties: str = "half",
    closed: str = "right",
    keep_certain: bool = True,
) -> float:
    """Expected calibration error: the bins' |accuracy - confidence|, weighted by their share of the pairs.

    Args:
        chosen: (n,) rewards of the chosen responses.
        rejected: (n,) rewards of the rejected responses.
        n_bins: bins of equal width on [0, 1]; confidence is at least .5, so half of them stay empty.
        ties: as in `pair_accuracy`.
        closed: which edge belongs to a bin, `"right"` for (low, high] or `"left"` for [low, high).
        keep_certain: whether pairs of confidence exactly 1 count. The paper's [low, high) bins lose them, from the sum
            and from the total alike; False reproduces that.

    Returns:
        A fraction in [0, 1]; NaN where `keep_certain=False` leaves no pair.

    Raises:
        InputError: no pair, unequal lengths, `n_bins` below 1, an unknown `ties` or `closed`.
        NonFiniteError: a reward that is NaN or infinite.
    """
    if n_bins < 1:
        raise InputError(f"n_bins={n_bins}: expected at least 1")
    if closed not in _CLOSED:
        raise InputError(f"closed={closed!r}: expected one of {_CLOSED}")
    c, r = _pairs(chosen, rejected)
    correct, conf = _correct(c, r, ties), confidence(c, r)
    if not keep_certain:
        correct, conf = correct[conf < 1], conf[conf < 1]
        if conf.size == 0:
            return math.nan
    inner_edges = np.arange(1, n_bins) / n_bins
    bins = np.digitize(conf, inner_edges, right=closed == "right")
    # n_b / N * |accuracy_b - confidence_b| is |sum of (correct - confidence) in b| / N
    gaps = np.bincount(bins, weights=correct - conf, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(conf))


def energy_score(chosen: ArrayLike, rejected: ArrayLike, T: float = 1.0) -> Floats:
    """Energy of a pair, -T logsumexp([chosen, rejected] / T), (n,); larger = more out-of-distribution.

    The paper's detector: one score per pair, from the rewards alone, the same for both orders, close to minus the
    larger reward.

    Raises:
        InputError: no pair, unequal lengths, or a temperature that is not positive.
        NonFiniteError: a reward that is NaN or infinite.
    """
    if not (math.isfinite(T) and T > 0):
        raise InputError(f"T={T}: expected a positive temperature")
    c, r = _pairs(chosen, rejected)
    # The larger reward plus a rest in [0, T log 2]; an infinite difference leaves the larger reward alone.
    with np.errstate(over="ignore"):
        return np.asarray(-np.maximum(c, r) - T * np.log1p(np.exp(-np.abs(c - r) / T)), dtype=np.float64)


def auroc(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Probability that a shifted item scores higher than a clean one, ties half: .5 is blind, below .5 inverted.

    Args:
        id_scores: (n,) scores of clean items; infinities allowed (an item that cannot be scored has +inf).
        ood_scores: (m,) scores of shifted items, the positive class.

    Returns:
        A fraction in [0, 1].

    Raises:
        InputError: no score on one side.
        NonFiniteError: NaN scores.
    """
    clean, shifted = _scores(id_scores, "id_scores"), _scores(ood_scores, "ood_scores")
    n, m = len(clean), len(shifted)
    ranks = stats.rankdata(np.concatenate([clean, shifted]))
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def fpr95_id_positive(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Share of shifted items accepted at the threshold that keeps 95 % of the clean ones.

    The convention of Liu et al. (ID is the positive class), and the one a guard works at. Raises as `auroc` does.
    """
    clean, shifted = _scores(id_scores, "id_scores"), _scores(ood_scores, "ood_scores")
    threshold = np.sort(clean)[_rank(len(clean)) - 1]
    return float((shifted <= threshold).mean())


def fpr95_ood_positive(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Share of clean items flagged at the threshold that catches 95 % of the shifted ones.

    The convention of the paper (OOD is the positive class). Raises as `auroc` does.
    """
    clean, shifted = _scores(id_scores, "id_scores"), _scores(ood_scores, "ood_scores")
    threshold = np.sort(shifted)[len(shifted) - _rank(len(shifted))]
    return float((clean >= threshold).mean())


def _rank(n: int) -> int:
    """Smallest count that is at least 95 % of n, in whole numbers: .95 is no binary fraction."""
    return -(-95 * n // 100)


def _correct(chosen: Floats, rejected: Floats, ties: str) -> Floats:
    if ties not in _TIES:
        raise InputError(f"ties={ties!r}: expected one of {_TIES}")
    return np.where(chosen == rejected, 0.5 if ties == "half" else 1.0, chosen > rejected)


def _pairs(chosen: ArrayLike, rejected: ArrayLike) -> tuple[Floats, Floats]:
    c, r = _vector(chosen, "chosen"), _vector(rejected, "rejected")
    if len(c) != len(r):
        raise InputError(f"rewards: expected as many chosen as rejected, got {len(c)} and {len(r)}")
    for name, values in (("chosen", c), ("rejected", r)):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise NonFiniteError(
                f"{name}: {bad.size} of {len(values)} rewards are NaN or infinite (rows {bad[:10].tolist()}). "
                "Leave those pairs out, and say how many they were."
            )
    return c, r


def _scores(values: ArrayLike, name: str) -> Floats:
    scores = _vector(values, name)
    bad = np.flatnonzero(np.isnan(scores))
    if bad.size:
        raise NonFiniteError(
            f"{name}: {bad.size} of {len(scores)} are NaN (rows {bad[:10].tolist()}). "
            "Score what cannot be scored +inf, so that it counts as flagged."
        )
    return scores


def _vector(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"{name}: expected a vector of at least one value, got shape {array.shape}")
    return array
