"""Calibration of a reward model's confidence in bins: expected and maximum calibration error, reliability curve.

The defaults are the correct definitions; `ties="correct"`, `closed="left"`, `keep_certain=False` are those of LeVine et
al. (see `rewards`).

Reference:
    Guo et al., "On calibration of modern neural networks", ICML 2017 (ECE, MCE, reliability diagrams).
    Kumar, Liang and Ma, "Verified uncertainty calibration", NeurIPS 2019, and its package uncertainty-calibration (equal
    mass; the debiased error).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from rm_ood.errors import InputError
from rm_ood.study.rewards import Floats, confidence, pair_credits

_CLOSED = ("right", "left")
_BINNING = ("equal_width", "equal_mass")


def ece(
    chosen: ArrayLike,
    rejected: ArrayLike,
    n_bins: int = 10,
    ties: str = "half",
    closed: str = "right",
    keep_certain: bool = True,
    *,
    binning: str = "equal_width",
    debiased: bool = False,
    temperature: float = 1.0,
) -> float:
    """Expected calibration error: the bins' |accuracy - confidence|, weighted by their share of the pairs.

    Args:
        chosen: (n,) rewards of the chosen responses.
        rejected: (n,) rewards of the rejected responses.
        n_bins: bins on [0, 1]; confidence is at least .5, so half of those of equal width stay empty.
        ties: as in `pair_accuracy`.
        closed: which edge belongs to a bin, `"right"` for (low, high] or `"left"` for [low, high).
        keep_certain: whether pairs of confidence exactly 1 count. The paper's [low, high) bins lose them, from the sum
            and from the total alike; False reproduces that.
        binning: `"equal_width"`, or `"equal_mass"`: edges at the quantiles of the confidences, equal ones together.
        debiased: take off what the noise of the bins' accuracies adds to the error, which is never below 0 by chance
            alone: Kumar et al.'s parametric estimate, whose mean over normal draws is taken in closed form (a folded
            normal). It removes most of the bias of a badly calibrated model's bins and about two fifths of a well
            calibrated one's. A bin of one pair is taken as it is.
        temperature: what rewards are divided by first.

    Returns:
        A fraction in [0, 1]; NaN where `keep_certain=False` leaves no pair.

    Raises:
        InputError: no pair, unequal lengths, `n_bins` below 1, an unknown `ties`, `closed` or `binning`, or a
            temperature that is not positive.
        NonFiniteError: a reward that is NaN or infinite.
    """
    bins = _bins(chosen, rejected, n_bins, ties, closed, keep_certain, binning, temperature)
    total = bins.count.sum()
    if total == 0:
        return math.nan
    error = float(np.abs(bins.gap).sum() / total)
    return max(0.0, error - bins.bias() / total) if debiased else error


def mce(
    chosen: ArrayLike,
    rejected: ArrayLike,
    n_bins: int = 10,
    ties: str = "half",
    closed: str = "right",
    keep_certain: bool = True,
    *,
    min_count: int = 30,
    temperature: float = 1.0,
) -> float:
    """Maximum calibration error: the largest |accuracy - confidence| of a bin of equal width.

    Args:
        chosen, rejected, n_bins, ties, closed, keep_certain, temperature: as in `ece`.
        min_count: bins with fewer pairs are left out; a bin of one pair is off by up to 1 whatever the model.

    Returns:
        A fraction in [0, 1]; NaN where no bin has `min_count` pairs.

    Raises:
        InputError, NonFiniteError: as `ece`.
    """
    bins = _bins(chosen, rejected, n_bins, ties, closed, keep_certain, "equal_width", temperature)
    full = bins.count >= max(min_count, 1)
    return float(np.max(np.abs(bins.gap[full]) / bins.count[full])) if full.any() else math.nan


def reliability_curve(
    chosen: ArrayLike,
    rejected: ArrayLike,
    n_bins: int = 10,
    ties: str = "half",
    closed: str = "right",
    keep_certain: bool = True,
    *,
    binning: str = "equal_width",
    temperature: float = 1.0,
) -> dict[str, list[Any]]:
    """Mean confidence and accuracy of every bin, for a reliability diagram. Arguments and errors as of `ece`.

    Returns:
        `edges` (k + 1), `confidence` and `accuracy` (k, None for an empty bin) and `count` (k), all JSON-able.
    """
    bins = _bins(chosen, rejected, n_bins, ties, closed, keep_certain, binning, temperature)
    return {
        "edges": bins.edges.tolist(),
        "confidence": [s / n if n else None for s, n in zip(bins.confident.tolist(), bins.count.tolist(), strict=True)],
        "accuracy": [s / n if n else None for s, n in zip(bins.correct.tolist(), bins.count.tolist(), strict=True)],
        "count": [int(n) for n in bins.count],
    }


@dataclass(frozen=True)
class _Bins:
    """Edges (k + 1,), and (k,) pairs, sums of confidence, of credit, of squared credit, and of credit - confidence."""

    edges: Floats
    count: Floats
    confident: Floats
    correct: Floats
    squared: Floats
    gap: Floats

    def bias(self) -> float:
        """Sum over bins of pairs times the rise of |accuracy - confidence| when the accuracy is drawn once more."""
        n = self.count[self.count > 0]
        accuracy, gap = self.correct[self.count > 0] / n, np.abs(self.gap[self.count > 0]) / n
        sd = np.sqrt(np.maximum(self.squared[self.count > 0] / n - accuracy**2, 0) / n)
        noisy = sd > 0
        n, gap, sd = n[noisy], gap[noisy], sd[noisy]
        z = gap / sd
        drawn = sd * math.sqrt(2 / math.pi) * np.exp(-(z**2) / 2) + gap * special.erf(z / math.sqrt(2))
        return float((n * (drawn - gap)).sum())


def _bins(
    chosen: ArrayLike,
    rejected: ArrayLike,
    n_bins: int,
    ties: str,
    closed: str,
    keep_certain: bool,
    binning: str,
    temperature: float,
) -> _Bins:
    if n_bins < 1:
        raise InputError(f"n_bins={n_bins}: expected at least 1")
    if closed not in _CLOSED:
        raise InputError(f"closed={closed!r}: expected one of {_CLOSED}")
    if binning not in _BINNING:
        raise InputError(f"binning={binning!r}: expected one of {_BINNING}")
    correct, conf = pair_credits(chosen, rejected, ties), confidence(chosen, rejected, temperature)
    if not keep_certain:
        correct, conf = correct[conf < 1], conf[conf < 1]
    inner = np.arange(1, n_bins) / n_bins
    if binning == "equal_mass" and conf.size:
        inner = np.quantile(conf, inner)
    which = np.digitize(conf, inner, right=closed == "right")

    def total(weights: Floats | None = None) -> Floats:
        return np.bincount(which, weights=weights, minlength=n_bins).astype(np.float64)

    return _Bins(
        np.concatenate([[0.0], inner, [1.0]]), total(), total(conf), total(correct), total(correct**2),
        total(correct - conf),
    )  # fmt: skip
