"""How well OOD scores tell shifted items from clean ones: AUROC, AUPR, FPR at 95 %, ROC curve, flag rate.

Scores are larger for more out-of-distribution; shifted items are the positive class, except where a name says otherwise.
An item that cannot be scored has +inf, so that every finite threshold flags it. All of it depends on the order of the
scores alone.

Reference:
    LeVine et al., arXiv 2311.14743, 2023 (`fpr95_ood_positive`).
    Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020 (`fpr95_id_positive`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from sklearn.metrics import average_precision_score
from sklearn.metrics import roc_curve as all_roc_points

from rm_ood.errors import InputError, NonFiniteError
from rm_ood.study.rewards import Floats, vector

_CURVE_POINTS = 100


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
    clean, shifted = score_vectors(id_scores, ood_scores)
    n, m = len(clean), len(shifted)
    ranks = stats.rankdata(np.concatenate([clean, shifted]))
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def aupr(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Average precision with shifted items as the positive class; a blind score has their share m / (n + m).

    scikit-learn's step-wise sum: no interpolation between thresholds. Raises as `auroc` does.
    """
    return float(average_precision_score(*_labelled(*score_vectors(id_scores, ood_scores))))


def fpr95_id_positive(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Share of shifted items accepted at the threshold that keeps 95 % of the clean ones.

    The convention of Liu et al. (ID is the positive class), and the one a guard works at. 1 where more than 5 % of the
    clean items could not be scored: no finite threshold keeps 95 %. Raises as `auroc` does.
    """
    clean, shifted = score_vectors(id_scores, ood_scores)
    threshold = np.sort(clean)[rank_95(len(clean)) - 1]
    return float((shifted <= threshold).mean())


def fpr95_ood_positive(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """Share of clean items flagged at the threshold that catches 95 % of the shifted ones.

    The convention of the paper (OOD is the positive class). Raises as `auroc` does.
    """
    clean, shifted = score_vectors(id_scores, ood_scores)
    threshold = np.sort(shifted)[len(shifted) - rank_95(len(shifted))]
    return float((clean >= threshold).mean())


def roc_curve(id_scores: ArrayLike, ood_scores: ArrayLike) -> dict[str, list[float]]:
    """Share of shifted items caught (`tpr`) against share of clean items flagged (`fpr`), from (0, 0) to (1, 1).

    At most 100 points, evenly spaced along the curve, which keeps its corners to a hundredth. Raises as `auroc` does.
    """
    fpr, tpr, _ = all_roc_points(*_labelled(*score_vectors(id_scores, ood_scores)))
    way = fpr + tpr
    points = np.unique(np.searchsorted(way, np.linspace(0, way[-1], _CURVE_POINTS)))
    if len(fpr) <= _CURVE_POINTS:
        points = np.arange(len(fpr))
    return {"fpr": fpr[points].tolist(), "tpr": tpr[points].tolist()}


def flag_rate(flags: ArrayLike) -> float:
    """Share of items flagged: on clean items the false-alarm rate.

    Raises:
        InputError: no item, or values that are not booleans.
    """
    values = np.asarray(flags)
    if values.dtype != np.bool_ or values.ndim != 1 or values.size == 0:
        raise InputError(f"flags: expected a vector of booleans, got {values.dtype} of shape {values.shape}")
    return float(values.mean())


def rank_95(n: int) -> int:
    """Smallest count that is at least 95 % of n, in whole numbers: .95 is no binary fraction."""
    return -(-95 * n // 100)


def score_vectors(id_scores: ArrayLike, ood_scores: ArrayLike) -> tuple[Floats, Floats]:
    """Both as float64 vectors, or the errors of `auroc`."""
    return _scores(id_scores, "id_scores"), _scores(ood_scores, "ood_scores")


def _labelled(clean: Floats, shifted: Floats) -> tuple[Floats, Floats]:
    """1 for shifted, and ranks in place of scores: scikit-learn takes no infinity."""
    is_ood = np.repeat([0.0, 1.0], [len(clean), len(shifted)])
    return is_ood, stats.rankdata(np.concatenate([clean, shifted]), method="dense").astype(np.float64)


def _scores(values: ArrayLike, name: str) -> Floats:
    scores = vector(values, name)
    bad = np.flatnonzero(np.isnan(scores))
    if bad.size:
        raise NonFiniteError(
            f"{name}: {bad.size} of {len(scores)} are NaN (rows {bad[:10].tolist()}). "
            "Score what cannot be scored +inf, so that it counts as flagged."
        )
    return scores
