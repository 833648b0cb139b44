"""Conformal p-values and thresholds: ranks of a score among n calibration scores that were not used in the fit.

With r = 1 + #{calibration >= s}, the marginal p-value is r / (n + 1): right on average over calibration draws. Given
one calibration set, the true false-alarm rate of "flag when r <= k" follows Beta(k, n + 1 - k) whatever the law of the
scores. The guaranteed p-value is therefore the `confidence` quantile of Beta(r, n + 1 - r): flagging when p <= alpha
has a true rate of at most alpha in a share `confidence` of all calibration draws.

Reference:
    Bates, Candes, Lei, Romano, Sesia, "Testing for outliers with conformal p-values", Ann. Statist. 51(1), 2023.
    Wilks, "Determination of sample sizes for setting tolerance limits", Ann. Math. Statist. 12(1), 1941.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from rm_ood.errors import CalibrationError, InputError, NotFittedError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ALL = "all"
_ULPS = 16


def p_values(calibration: ArrayLike, scores: ArrayLike, confidence: float | None) -> Floats:
    """Conformal p-values of `scores`; small = out-of-distribution.

    Args:
        calibration: (n,) OOD scores of held-out in-distribution inputs; +inf allowed.
        scores: (m,) OOD scores to judge, in the same unit. NaN and infinities get rank 1, the smallest p-value there
            is: what cannot be scored is never passed.
        confidence: share of calibration draws in which p <= alpha flags at most alpha; None: marginal r / (n + 1).

    Returns:
        (m,) float64 in (0, 1].

    Raises:
        CalibrationError: no calibration score, or NaN or -inf among them.
        InputError: `confidence` is not in (0, 1).
    """
    check_confidence(confidence)
    return p_of_rank(ranks(sorted_scores(calibration), scores), np.size(calibration), confidence)


@lru_cache(maxsize=256)
def guaranteed_rank(n: int, alpha: float, confidence: float | None) -> int:
    """The k such that flagging the scores above the k-th largest of n calibration scores keeps the promise; 0: none.

    It is the largest r with p-value <= alpha, by the very numbers that `p_values` returns, so that thresholds and
    p-values cannot disagree by a rounding error.
    """
    check_alpha(alpha)
    check_confidence(confidence)
    low, high = 0, n
    while low < high:
        middle = (low + high + 1) // 2
        if _p_of_rank(np.array([middle]), n, confidence)[0] <= alpha:
            low = middle
        else:
            high = middle - 1
    return low


@lru_cache(maxsize=256)
def minimum_calibration(alpha: float, confidence: float | None) -> int:
    """Smallest number of calibration scores with which `alpha` can be promised: 299 for 1 % at 95 %."""
    check_alpha(alpha)
    check_confidence(confidence)
    estimate = 1 / alpha - 1 if confidence is None else math.log1p(-confidence) / math.log1p(-alpha)
    n = max(1, math.ceil(estimate) - 1)
    while guaranteed_rank(n, alpha, confidence) == 0:
        n += 1
    return n


def false_alarm_interval(
    n: int, alpha: float, confidence: float | None, level: float = 0.9
) -> tuple[float, float, float]:
    """Mean and central `level` interval, over calibration draws, of the true false-alarm rate: (mean, low, high).

    Raises:
        CalibrationError: n is too small for `alpha`; the message names the number missing.
    """
    k = guaranteed_rank(n, alpha, confidence)
    if k == 0:
        raise too_few(n, alpha, confidence)
    tail = (1 - level) / 2
    low, high = special.betaincinv(k, n + 1 - k, [tail, 1 - tail])
    return k / (n + 1), float(low), float(high)


def p_of_rank(rank: Ints, n: int, confidence: float | None) -> Floats:
    """p-values of ranks 1..n+1 among n calibration scores, (m,) float64, strictly increasing in the rank."""
    table = _known(n, confidence)
    unknown = np.unique(rank[np.isnan(table[rank])])
    if unknown.size:
        table[unknown] = _p_of_rank(unknown, n, confidence)
    return table[rank]


@lru_cache(maxsize=64)
def _known(n: int, confidence: float | None) -> Floats:
    """Table by rank that `p_of_rank` fills as ranks are asked for: the quantiles cost more than all the rest."""
    return np.full(n + 2, np.nan)


def _p_of_rank(rank: Ints, n: int, confidence: float | None) -> Floats:
    if confidence is None:
        return np.asarray(rank / (n + 1), dtype=np.float64)
    p = np.ones(rank.size)
    p[rank <= n] = _beta_quantile(rank[rank <= n], n, confidence)
    return p


def _beta_quantile(rank: Ints, n: int, confidence: float) -> Floats:
    a, b = rank.astype(np.float64), np.float64(n + 1) - rank
    p = special.betaincinv(a, b, confidence)
    # The inverse may land some units in the last place beside the point where the distribution function reaches
    # `confidence`. An alpha that lies exactly there (alpha = .5 at confidence .5, say) must still count as reached.
    steps = np.arange(-_ULPS, _ULPS + 1)[:, None] * np.spacing(p)
    near = np.clip(p + steps, 0.0, 1.0)
    reached = special.betainc(a, b, near) >= confidence
    first = np.where(reached.any(axis=0), reached.argmax(axis=0), _ULPS)
    return np.asarray(near[first, np.arange(len(p))], dtype=np.float64)


def sorted_scores(calibration: ArrayLike) -> Floats:
    """Calibration scores in ascending order, after the checks that every rank rests on.

    Raises:
        CalibrationError: none at all, or NaN or -inf among them.
    """
    scores = np.asarray(calibration, dtype=np.float64).ravel()
    if scores.size == 0:
        raise CalibrationError("calibration scores: got none. Pass held-out in-distribution inputs to calibrate().")
    bad = np.flatnonzero(np.isnan(scores) | np.isneginf(scores))
    if bad.size:
        raise CalibrationError(
            f"calibration scores: {bad.size} of {scores.size} are NaN or -inf (rows {_first(bad)}). "
            "One NaN would shift every rank; remove those rows."
        )
    return np.sort(scores)


def scores_digest(scores: Floats) -> str:
    """SHA-256 of calibration scores, in whatever order."""
    return hashlib.sha256(np.sort(scores).tobytes()).hexdigest()


def ranks(ascending: Floats, scores: ArrayLike) -> Ints:
    """1 + #{calibration >= s} for each score, (m,) int64; 1 for a score that is NaN or infinite."""
    s = np.asarray(scores, dtype=np.float64).ravel()
    rank = 1 + ascending.size - np.searchsorted(ascending, s, side="left")
    return np.where(np.isfinite(s), rank, 1).astype(np.int64)


def too_few(n: int, alpha: float, confidence: float | None) -> CalibrationError:
    """The error for a calibration set that cannot carry the promise."""
    need = minimum_calibration(alpha, confidence)
    promise = "on average" if confidence is None else f"at confidence {confidence}"
    return CalibrationError(
        f"alpha={alpha} {promise} needs {need} calibration prompts: have {n}, need {need - n} more. "
        "Pass more in-distribution prompts, or raise alpha."
    )


def pool_groups(counts: Mapping[str, int], needed: int) -> dict[str, tuple[str, ...]]:
    """Which groups each group is ranked together with: alone when it has at least `needed` members.

    The smaller groups are pooled into one rest. A rest that is still too small joins the smallest group that is large
    enough; with no such group, the rest is everything there is.
    """
    alone = {label: count for label, count in counts.items() if count >= needed}
    rest = sorted(label for label in counts if label not in alone)
    if alone and rest and sum(counts[label] for label in rest) < needed:
        host = min(alone, key=lambda label: (alone[label], label))
        del alone[host]
        rest = sorted([*rest, host])
    return {label: (label,) if label in alone else tuple(rest) for label in sorted(counts)}


@dataclass(frozen=True)
class Pool:
    """The calibration scores that one group of inputs is ranked among."""

    scores: Floats = field(repr=False)
    k: int
    threshold: float

    @classmethod
    def fit(cls, scores: ArrayLike, alpha: float, confidence: float | None) -> Pool:
        """Sort, find k and the k-th largest score.

        Raises:
            CalibrationError: too few scores for `alpha`, or so many infinite ones that nothing could be flagged.
        """
        ascending = sorted_scores(scores)
        k = guaranteed_rank(ascending.size, alpha, confidence)
        if k == 0:
            raise too_few(ascending.size, alpha, confidence)
        threshold = float(ascending[-k])
        if math.isinf(threshold):
            count = int(np.isinf(ascending).sum())
            raise CalibrationError(
                f"calibration scores: {count} of {ascending.size} are infinite, and the threshold is the "
                f"{k}-th largest. Find out why these inputs have no finite score before calibrating on them."
            )
        return cls(ascending, k, threshold)

    def p_value(self, scores: ArrayLike, confidence: float | None) -> Floats:
        """p-values of `scores` in this pool, (m,) float64."""
        return p_of_rank(ranks(self.scores, scores), self.scores.size, confidence)


class ConformalCalibrator:
    """Threshold and p-values for one score, with a false-alarm rate that holds.

    `p_value(s) <= alpha` exactly when s > `threshold_` (the `k_`-th largest calibration score), for every finite s; a
    score that is NaN or infinite is always flagged.

    Args:
        alpha: tolerated false-alarm rate, a fraction in (0, 1).
        confidence: share of calibration draws in which the true rate is at most alpha; None: alpha holds on average.

    Attributes:
        n_: number of calibration scores.
        pools_: group -> `Pool`; one pool named "all" without groups. Groups too small for alpha share a pool.
    """

    def __init__(self, alpha: float = 0.01, confidence: float | None = 0.95) -> None:
        self.alpha = alpha
        self.confidence = confidence

    def fit(self, scores: ArrayLike, groups: Sequence[str] | None = None) -> ConformalCalibrator:
        """Learn the thresholds from (n,) OOD scores of held-out in-distribution inputs, one per prompt.

        Args:
            scores: (n,) larger = more out-of-distribution; +inf allowed.
            groups: (n,) labels; each group gets the promise by itself (Mondrian), small groups together.

        Raises:
            CalibrationError: too few scores, or NaN among them.
        """
        values = np.asarray(scores, dtype=np.float64).ravel()
        needed = minimum_calibration(self.alpha, self.confidence)
        labels = [ALL] * values.size if groups is None else list(groups)
        if len(labels) != values.size:
            raise InputError(f"groups: {len(labels)} labels for {values.size} scores")
        sorted_scores(values)
        members = pool_groups(Counter(labels), needed)
        pools = {m: Pool.fit(values[in_groups(labels, m)], self.alpha, self.confidence) for m in set(members.values())}
        self.n_ = values.size
        self.pools_ = {label: pools[m] for label, m in members.items()}
        self._grouped = groups is not None
        return self

    @property
    def k_(self) -> int:
        """Rank of the threshold among the calibration scores, from the largest."""
        return self._single().k

    @property
    def threshold_(self) -> float:
        """Score above which an input is flagged."""
        return self._single().threshold

    def p_value(self, scores: ArrayLike, groups: Sequence[str] | None = None) -> Floats:
        """p-values of (m,) scores, each within its group when the calibrator has groups; small = OOD."""
        self._check_fitted()
        values = np.asarray(scores, dtype=np.float64).ravel()
        if not self._grouped:
            if groups is not None:
                raise InputError("groups: this calibrator was fitted without groups")
            return self.pools_[ALL].p_value(values, self.confidence)
        labels = check_groups(groups, values.size, self.pools_)
        return ranked_by_group({g: pool.scores for g, pool in self.pools_.items()}, values, labels, self.confidence)

    def _single(self) -> Pool:
        self._check_fitted()
        if self._grouped:
            raise InputError(f"each group has its own k and threshold: see pools_[group], groups {list(self.pools_)}")
        return self.pools_[ALL]

    def _check_fitted(self) -> None:
        if not hasattr(self, "pools_"):
            raise NotFittedError("ConformalCalibrator: call fit(scores) first")


def ranked_by_group(
    ascending: Mapping[str, Floats], scores: Floats, labels: Sequence[str], confidence: float | None
) -> Floats:
    """p-values of (m,) scores, each ranked among the calibration scores of its group."""
    p = np.empty(scores.size)
    for label in dict.fromkeys(labels):
        rows = in_groups(labels, (label,))
        p[rows] = p_of_rank(ranks(ascending[label], scores[rows]), ascending[label].size, confidence)
    return p


def in_groups(labels: Sequence[str], members: tuple[str, ...]) -> NDArray[np.bool_]:
    """Which of the (n,) labels are among `members`."""
    return np.fromiter((label in members for label in labels), dtype=bool, count=len(labels))


def check_groups(groups: Sequence[str] | None, n: int, known: Iterable[str]) -> list[str]:
    """The group labels of n inputs.

    Raises:
        InputError: no groups, not one per input, or a group that was not there at calibration.
    """
    if groups is None or len(groups) != n:
        raise InputError(f"groups: {n} labels needed, one per input, got {None if groups is None else len(groups)}")
    known = sorted(known)
    labels = [str(label) for label in groups]
    unknown = sorted(set(labels) - set(known))
    if unknown:
        raise InputError(f"groups: {unknown[:10]} were not there at calibration; known: {known}")
    return labels


def check_alpha(alpha: float) -> None:
    """Refuse a false-alarm rate outside (0, 1), or so small that no calibration set could reach it."""
    if not 1e-9 <= alpha < 1:
        raise InputError(f"alpha={alpha}: expected a fraction in (0, 1), at least 1e-9")


def check_confidence(confidence: float | None) -> None:
    """Refuse a confidence outside (0, 1); None asks for the marginal rule."""
    if confidence is not None and not 0 < confidence < 1:
        raise InputError(f"confidence={confidence}: expected a fraction in (0, 1), or None for the marginal rule")


def _first(rows: Ints) -> str:
    shown = ", ".join(str(row) for row in rows[:10])
    return shown if rows.size <= 10 else f"{shown}, ..."
