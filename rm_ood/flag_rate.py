"""How often is traffic flagged: a band that holds at all times at once, and bets that the rate is above a budget.

Neither leans on the calibration: both speak of the flags as they come. They differ from Pólya bets in that they absorb
nothing, so that a slow drift adds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from rm_ood.bets import Wealth
from rm_ood.conformal import guaranteed_rank
from rm_ood.errors import FormatError, InputError

Floats = NDArray[np.float64]
BAND_LEVEL = 0.95
# Flags that hold alpha on average only: their true rate is below the default budget in this share of calibration draws.
BUDGET_LEVEL = 0.95
_PRIOR = (0.5, 9.5)
_CHUNK = 65_536
_HALVINGS = 60


def default_budget(sizes: Sequence[int], alpha: float, confidence: float | None) -> float:
    """The flag rate that clean traffic stays within: `alpha`, or what a rate that is `alpha` on average only may come to.

    The rate of flags at rank k among n calibration scores is Beta(k, n + 1 - k). With a confidence k is such that the rate
    is within alpha; without, alpha is about the mean, and half of all guards flag more.

    Args:
        sizes: calibration scores of each group that is flagged by itself; the bound holds for all of them at once.
    """
    ranks = [(guaranteed_rank(n, alpha, confidence), n) for n in sizes]
    if confidence is not None or not all(k for k, _ in ranks):
        return alpha
    level = 1 - (1 - BUDGET_LEVEL) / len(ranks)
    return max(alpha, *(float(special.betaincinv(k, n + 1 - k, level)) for k, n in ranks))


def rate_band(hits: int, n: int, level: float = BAND_LEVEL) -> tuple[float, float]:
    """Interval of a rate that may be looked at after every item: it misses the true rate, ever, in 1 - `level` of streams.

    {p : B(a + hits, b + n - hits) / (B(a, b) p^hits (1 - p)^(n - hits)) < 1 / (1 - level)} with the prior Beta(0.5, 9.5):
    the likelihood ratio of the mixture against p is a martingale from 1 under p. It is convex in p on the log scale, so an
    interval.

    Args:
        hits: flagged items. n: items, independent given the past.
        level: share of streams whose rate is inside at all times, in (0, 1).
    Returns:
        (low, high), fractions; (0, 1) before the first item.
    Raises:
        InputError: a count that is not among 0 to n, or a level outside (0, 1).
    Reference:
        Robbins, "Statistical methods related to the law of the iterated logarithm", Ann. Math. Statist. 41(5), 1970.
    """
    if not 0 <= hits <= n or not 0 < level < 1:
        raise InputError(f"rate of {hits} in {n} at level {level}: expected a count of 0 to n and a level in (0, 1)")
    a, b = _PRIOR
    bound = special.betaln(a + hits, b + n - hits) - special.betaln(a, b) + np.log1p(-level)

    def inside(p: float) -> bool:
        return bool(bound < special.xlogy(hits, p) + special.xlog1py(n - hits, -p))

    peak = hits / n if n else 0.5
    low = 0.0 if inside(0.0) else _edge(0.0, peak, inside)
    high = 1.0 if inside(1.0) else _edge(1.0, peak, inside)
    return low, high


def _edge(outer: float, inner: float, inside: Any) -> float:
    for _ in range(_HALVINGS):
        middle = (outer + inner) / 2
        outer, inner = (outer, middle) if inside(middle) else (middle, inner)
    return outer


@dataclass(frozen=True)
class FlagRate:
    """Flags of the traffic so far.

    Attributes:
        flagged, n: of n items that count.
        budget: the rate that is tolerated.
        e_value: evidence that the rate is above the budget.
        alarm: the evidence has once reached its threshold.
    """

    flagged: int
    n: int
    budget: float
    e_value: float
    alarm: bool

    @property
    def rate(self) -> float:
        """Share flagged; NaN before the first item."""
        return self.flagged / self.n if self.n else float("nan")

    def band(self, level: float = BAND_LEVEL) -> tuple[float, float]:
        """Interval of the true rate that holds at all times at once, see `rate_band`."""
        return rate_band(self.flagged, self.n, level)


class BudgetBets:
    """Bets, with restarts, that items are flagged more often than a budget.

    P(alarm, ever, while no item's chance of a flag exceeds the budget) <= 1 / A. With flags of a guard that promises alpha
    at a confidence and the budget alpha, clean traffic alarms with probability 1 / A + 1 - confidence at most; with flags
    that hold alpha on average, 1 / A + 0.05 at most by the budget of `default_budget`.

    Args:
        budget: tolerated flag rate, a fraction in (0, 1).
        ratios: multiples of the budget that are betted on.
        threshold: A.

    Reference:
        Timans et al., "On continuous monitoring of risk violations under unknown shift", UAI 2025 (arXiv 2506.16416).
    """

    def __init__(self, budget: float, ratios: Sequence[float], threshold: float) -> None:
        self.budget = budget
        # A budget too high for any multiple is still betted on, halfway to certainty.
        self._q = np.array([budget * r for r in ratios if budget * r < 1] or [(1 + budget) / 2])
        self._threshold = threshold
        self.flagged, self.alarm = 0, False
        self.wealth = Wealth(self._q.size)

    def advance(self, flags: NDArray[np.bool_]) -> None:
        """Play the flags of m items."""
        odds = self._q / self.budget, (1 - self._q) / (1 - self.budget)
        for start in range(0, len(flags), _CHUNK):
            evidence, _ = self.wealth.advance(np.where(flags[start : start + _CHUNK, None], *odds), np.inf)
            self.alarm = self.alarm or bool((evidence >= self._threshold).any())
        self.flagged += int(flags.sum())

    @property
    def state(self) -> FlagRate:
        """Where the flags stand."""
        return FlagRate(self.flagged, self.wealth.t, self.budget, self.wealth.evidence, self.alarm)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able state."""
        return {"flagged": self.flagged, "alarm": self.alarm, "wealth": self.wealth.to_dict()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up the state that `to_dict` gave.

        Raises:
            FormatError: not the state of these bets.
        """
        self.wealth.restore(saved["wealth"])
        self.flagged, self.alarm = int(saved["flagged"]), bool(saved["alarm"])
        if not 0 <= self.flagged <= self.wealth.t:
            raise FormatError(f"saved flags: {self.flagged} of {self.wealth.t}")
