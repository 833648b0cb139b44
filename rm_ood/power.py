"""What n items can show: exact intervals of shares, and the smallest shift of the scores that is seen.

A shift here adds one number to every score, that of an item that was in distribution before. Nothing is assumed about
the scores' law: it is that of the calibration scores themselves. A score of +inf (an input that has no score) stays
+inf, is flagged always, and outranks every finite one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special

from rm_ood.errors import InputError

Floats = NDArray[np.float64]

BATCH_LEVEL = 1e-3
BATCH_POWER = 0.9


def share_interval(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval of a share, from `count` of n items: (low, high), fractions.

    Raises:
        InputError: no item, or a count that is not among 0 to n.
    Reference:
        Clopper, Pearson, "The use of confidence or fiducial limits", Biometrika 26(4), 1934.
    """
    if not 0 <= count <= n or n < 1:
        raise InputError(f"share of {count} in {n}: expected a count of 0 to n, and n at least 1")
    tail = (1 - level) / 2
    low = special.betaincinv(count, n - count + 1, tail) if count else 0.0
    high = special.betaincinv(count + 1, n - count, 1 - tail) if count < n else 1.0
    return float(low), float(high)


def spread(scores: Floats) -> float | None:
    """Standard deviation of the finite scores, in their unit; None where they do not vary."""
    finite = scores[np.isfinite(scores)]
    deviation = float(finite.std(ddof=1)) if finite.size > 1 else 0.0
    return deviation if deviation > 0 else None


def item_shift(ascending: Floats, threshold: float, power: float) -> float:
    """Smallest shift that gets one in-distribution item past the threshold with probability `power`.

    The infimum of the d with #{s + d > threshold} >= power * n, by the empirical law of the scores: threshold minus the
    ceil(power * n)-th largest score, and 0 where the threshold is below that already.

    Args:
        ascending: (n,) in-distribution scores in ascending order, +inf allowed; larger = more OOD.
        threshold: finite; an item is flagged above it.
        power: a fraction in (0, 1].

    Returns:
        A shift of at least 0, in the unit of the scores.
    """
    # 0.55 * 100 is 55.00000000000001 and means 55.
    rank = max(1, math.ceil(power * ascending.size - 1e-9))
    return max(0.0, threshold - float(ascending[-rank]))


def batch_shift(ascending: Floats, m: int, *, level: float = BATCH_LEVEL, power: float = BATCH_POWER) -> float | None:
    """Smallest shift of a whole batch that a two-sided rank-sum test against the n calibration scores finds.

    Noether's sample size, (z_[1 - level/2] + z_power)^2 = 12 n m (p - 1/2)^2 / (n + m), solved for p, the probability
    that an item of the batch outranks a calibration prompt (ties half); then the smallest d at which a shifted score
    outranks an unshifted one with probability p, by the empirical law of the scores.

    Args:
        ascending: (n,) in-distribution scores in ascending order, +inf allowed.
        m: prompts in the batch.
        level: false-alarm rate of the test. power: probability that it finds the shift.

    Returns:
        The shift, in the unit of the scores; None where n and m are too few for any.

    Reference:
        Noether, "Sample size determination for some common nonparametric tests", JASA 82(398), 1987.
    """
    n = ascending.size
    wanted = 0.5 + _quantiles(level, power) * math.sqrt((n + m) / (12 * n * m))
    finite = ascending[np.isfinite(ascending)]
    low, high = 0.0, 2 * float(finite[-1] - finite[0]) + 1.0
    if _superiority(ascending, high) < wanted:
        return None
    # Halvings of the range, not of the answer: where all scores are equal, the answer is any positive number.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _superiority(ascending, middle) >= wanted else (middle, high)
    return high


def batch_size(
    ascending: Floats, shift: float, *, level: float = BATCH_LEVEL, power: float = BATCH_POWER
) -> int | None:
    """Prompts after which the same test finds a shift (in the unit of the scores); None: never with this calibration.

    Noether's formula solved for m. However many prompts come, the calibration scores bring an uncertainty of their own.
    """
    n = ascending.size
    p = _superiority(ascending, shift)
    if p <= 0.5:
        return None
    needed = _quantiles(level, power) ** 2 / (12 * (p - 0.5) ** 2)
    return math.ceil(needed * n / (n - needed)) if needed < n else None


def _quantiles(level: float, power: float) -> float:
    return float(special.ndtri(1 - level / 2) + special.ndtri(power))


def _superiority(ascending: Floats, shift: float) -> float:
    """Probability that one score, shifted, outranks another one, ties half."""
    shifted = ascending + shift
    below = np.searchsorted(ascending, shifted, side="left") + np.searchsorted(ascending, shifted, side="right")
    return float(below.mean() / (2 * ascending.size))
