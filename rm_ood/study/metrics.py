"""Numbers of reward pairs for a shift study: accuracy, calibration, proper scores, and what a flag buys.

Rewards come as (n,) chosen and (n,) rejected, any unit. `rewards` has what one pair says, `reliability` what bins say;
both are at hand here as well. Scores that tell shifted from clean are in `detection`, intervals in `bootstrap`.

Reference:
    Guo et al., "On calibration of modern neural networks", ICML 2017 (temperature).
    Geifman and El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017 (risk and coverage).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

from rm_ood.errors import InputError, NonFiniteError
from rm_ood.study.reliability import ece, mce, reliability_curve
from rm_ood.study.rewards import (
    Floats,
    confidence,
    energy_score,
    margins,
    max_softmax_score,
    pair_accuracy,
    pair_credits,
    pair_vectors,
    tie_count,
    vector,
)

__all__ = [
    "brier_score",
    "confidence",
    "ece",
    "energy_score",
    "fit_temperature",
    "histogram",
    "length_reward_correlation",
    "margins",
    "max_softmax_score",
    "mce",
    "nll",
    "pair_accuracy",
    "pair_credits",
    "pair_metrics",
    "reliability_curve",
    "risk_coverage",
    "selective_metrics",
    "tie_count",
]

_CURVE_POINTS = 100


def brier_score(chosen: ArrayLike, rejected: ArrayLike, temperature: float = 1.0) -> float:
    """Mean squared distance of the probability that the chosen response wins from 1: 0 is perfect, .25 a coin.

    Raises:
        InputError, NonFiniteError: as `confidence`.
    """
    return float(np.mean(special.expit(-_logits(chosen, rejected, temperature)) ** 2))


def nll(chosen: ArrayLike, rejected: ArrayLike, temperature: float = 1.0) -> float:
    """Mean of -log of the probability that the chosen response wins, in nats: 0 is perfect, log 2 a coin.

    The loss that reward models are trained with. Raises as `confidence`.
    """
    return float(np.mean(np.logaddexp(0.0, -_logits(chosen, rejected, temperature))))


def fit_temperature(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """The temperature that minimises `nll`: above 1 for an over-confident reward model.

    Returns:
        Infinity where no finite temperature is best (margins that are not positive on average carry no order to trust),
        0 where no pair is wrong (more confidence is always better).

    Raises:
        InputError, NonFiniteError: as `pair_accuracy`.
    """
    d = margins(chosen, rejected)
    # The loss is convex in 1 / T, so its slope changes sign once; at 1 / T = 0 it is -mean(d) / 2.
    scale = float(np.abs(d).max())
    if scale == 0 or (unit := d / scale).mean() <= 0:
        return math.inf
    if unit.min() >= 0:
        return 0.0

    def slope(inverse: float) -> float:
        return float(-np.mean(unit * special.expit(-inverse * unit)))

    high = 1.0
    while slope(high) < 0:
        high *= 2
    return scale / float(optimize.brentq(slope, 0.0, high, xtol=1e-13, rtol=1e-13))


def histogram(values: ArrayLike, n_bins: int = 40, edges: ArrayLike | None = None) -> dict[str, list[Any]]:
    """Counts in bins of equal width, JSON-able: of margins, or of OOD scores.

    Args:
        values: (n,); infinite ones count in the outermost bin.
        n_bins: bins between the smallest and the largest finite value.
        edges: (k + 1,) ascending edges instead, such as the clean rows' own; what lies outside counts in the outermost
            bin, so that counts always sum to n.

    Returns:
        `edges` (k + 1) and `count` (k).

    Raises:
        InputError: no value, `n_bins` below 1, or edges that do not ascend.
        NonFiniteError: NaN values.
    """
    v = vector(values, "values")
    if np.isnan(v).any():
        raise NonFiniteError(f"values: {int(np.isnan(v).sum())} of {len(v)} are NaN")
    if n_bins < 1:
        raise InputError(f"n_bins={n_bins}: expected at least 1")
    if edges is None:
        finite = v[np.isfinite(v)]
        cuts = np.histogram_bin_edges(finite if finite.size else np.zeros(1), bins=n_bins)
    else:
        cuts = vector(edges, "edges")
        if len(cuts) < 2 or not np.isfinite(cuts).all() or (np.diff(cuts) <= 0).any():
            raise InputError("edges: expected at least two finite, ascending edges")
    count, _ = np.histogram(np.clip(v, cuts[0], cuts[-1]), bins=cuts)
    return {"edges": cuts.tolist(), "count": count.tolist()}


def length_reward_correlation(
    chosen: ArrayLike, rejected: ArrayLike, chosen_lengths: ArrayLike, rejected_lengths: ArrayLike
) -> float:
    """Rank correlation of the reward with the response's length, within pairs: how far the model just likes length.

    Spearman's, of the differences of each pair in both orders: what the prompt does to length and reward cancels, and
    it is the same whichever response is called chosen.

    Args:
        chosen, rejected: (n,) rewards.
        chosen_lengths, rejected_lengths: (n,) lengths in any unit.

    Returns:
        A number in [-1, 1]; NaN where no pair differs in length, or none in reward.

    Raises:
        InputError, NonFiniteError: as `pair_accuracy`, for rewards and lengths.
    """
    reward, length = margins(chosen, rejected), margins(chosen_lengths, rejected_lengths)
    if len(reward) != len(length):
        raise InputError(f"lengths: expected one of every pair, got {len(length)} for {len(reward)} pairs")
    if not reward.any() or not length.any():
        return math.nan
    return float(stats.spearmanr(np.r_[length, -length], np.r_[reward, -reward]).statistic)


def risk_coverage(scores: ArrayLike, correct: ArrayLike) -> dict[str, list[float]]:
    """Accuracy of the items kept, from the least out-of-distribution one to all of them.

    Args:
        scores: (n,) OOD scores, larger = more out-of-distribution; infinities allowed.
        correct: (n,) credits in [0, 1], as of `pair_credits`.

    Returns:
        `coverage` (ascending, the last is 1) and `accuracy`, at most 100 points; items of equal score are kept together.

    Raises:
        InputError: no item, unequal lengths, or credits outside [0, 1].
        NonFiniteError: NaN scores.
    """
    s, credit = vector(scores, "scores"), vector(correct, "correct")
    if len(s) != len(credit):
        raise InputError(f"risk_coverage: expected one score per item, got {len(s)} and {len(credit)}")
    if np.isnan(s).any():
        raise NonFiniteError(f"scores: {int(np.isnan(s).sum())} of {len(s)} are NaN")
    if not ((credit >= 0) & (credit <= 1)).all():
        raise InputError("correct: expected credits in [0, 1]")
    order = np.argsort(s, kind="stable")
    kept = np.flatnonzero(np.append(s[order][1:] != s[order][:-1], True)) + 1
    accuracy = np.cumsum(credit[order])[kept - 1] / kept
    # Evenly by coverage, where there are more scores than points.
    wanted = np.searchsorted(kept, np.linspace(0, len(s), _CURVE_POINTS + 1)[1:], side="left")
    points = np.arange(len(kept)) if len(kept) <= _CURVE_POINTS else np.unique(wanted)
    return {"coverage": (kept[points] / len(s)).tolist(), "accuracy": accuracy[points].tolist()}


def selective_metrics(chosen: ArrayLike, rejected: ArrayLike, flagged: ArrayLike) -> dict[str, dict[str, Any]]:
    """Accuracy and ECE of the pairs that were flagged, and of those that were not.

    Args:
        chosen, rejected: (n,) rewards.
        flagged: (n,) booleans, one verdict per pair.

    Returns:
        `flagged` and `unflagged`, each with `n`, `accuracy` and `ece` (None where there is no pair).

    Raises:
        InputError, NonFiniteError: as `pair_accuracy`; flags that are not one boolean per pair.
    """
    c, r = pair_vectors(chosen, rejected)
    flags = np.asarray(flagged)
    if flags.dtype != np.bool_ or flags.shape != c.shape:
        raise InputError(f"flagged: expected {len(c)} booleans, got {flags.dtype} of shape {flags.shape}")

    def of(rows: Any) -> dict[str, Any]:
        n = int(rows.sum())
        return {
            "n": n,
            "accuracy": pair_accuracy(c[rows], r[rows]) if n else None,
            "ece": ece(c[rows], r[rows]) if n else None,
        }

    return {"flagged": of(flags), "unflagged": of(~flags)}


def pair_metrics(
    chosen: ArrayLike,
    rejected: ArrayLike,
    *,
    temperature: float | None = None,
    lengths: tuple[ArrayLike, ArrayLike] | None = None,
    n_bins: int = 10,
    ties: str = "half",
    closed: str = "right",
    keep_certain: bool = True,
    min_count: int = 30,
) -> dict[str, float | int | None]:
    """Every number of a set of reward pairs, JSON-able.

    Args:
        chosen, rejected: (n,) rewards.
        temperature: fitted on in-distribution pairs, for `ece_at_id_temperature`; infinity gives confidence .5 everywhere.
        lengths: (n,) lengths of the chosen and of the rejected responses, for `length_reward_correlation`.
        n_bins, ties, closed, keep_certain, min_count: as of `ece` and `mce`.

    Returns:
        `n_pairs`, `accuracy`, `ties` (pairs), `confidence` (mean), `ece`, `ece_equal_mass`, `ece_debiased`, `mce`, `brier`,
        `nll`, `temperature` (fitted on these pairs; None: infinite), `ece_at_id_temperature` and
        `length_reward_correlation`; None where a number does not apply or does not exist.

    Raises:
        InputError, NonFiniteError: as `ece`, `mce` and `length_reward_correlation`.
    """
    c, r = pair_vectors(chosen, rejected)
    binned = {"n_bins": n_bins, "ties": ties, "closed": closed, "keep_certain": keep_certain}
    options: dict[str, Any] = binned
    correlation = None if lengths is None else length_reward_correlation(c, r, *lengths)
    return {
        "n_pairs": len(c),
        "accuracy": pair_accuracy(c, r, ties),
        "ties": tie_count(c, r),
        "confidence": float(confidence(c, r).mean()),
        "ece": _number(ece(c, r, **options)),
        "ece_equal_mass": _number(ece(c, r, **options, binning="equal_mass")),
        "ece_debiased": _number(ece(c, r, **options, debiased=True)),
        "mce": _number(mce(c, r, **options, min_count=min_count)),
        "brier": brier_score(c, r),
        "nll": _number(nll(c, r)),
        "temperature": _number(fit_temperature(c, r)),
        "ece_at_id_temperature": None if temperature is None else _at(c, r, temperature, options),
        "length_reward_correlation": _number(correlation),
    }


def _at(chosen: Floats, rejected: Floats, temperature: float, options: dict[str, Any]) -> float | None:
    # Temperature 0 is the limit of ever smaller ones: all pairs certain.
    smallest = np.finfo(np.float64).tiny
    return _number(ece(chosen, rejected, **options, temperature=max(temperature, smallest)))


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _logits(chosen: ArrayLike, rejected: ArrayLike, temperature: float) -> Floats:
    if not temperature > 0:
        raise InputError(f"temperature={temperature}: expected a positive temperature")
    largest = np.finfo(np.float64).max
    with np.errstate(over="ignore"):
        return np.asarray(np.clip(margins(chosen, rejected), -largest, largest) / temperature, dtype=np.float64)
