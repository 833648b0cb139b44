"""A first look at the traffic: do the first requests score like the calibration data?

The anytime-valid alarm that may be watched for ever is another, larger thing; this is one test, once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

REQUESTS = 1_000
_LEVEL = 1e-3


class TrafficCheck:
    """Rank-sum test of the first `REQUESTS` items of a guard's life against its calibration scores, both tails.

    Args:
        calibration: (n,) combined scores of part B.
    """

    def __init__(self, calibration: NDArray[np.float64]) -> None:
        self._calibration = calibration
        self._scores: list[float] = []
        self._done = False

    def update(self, scores: NDArray[np.float64]) -> str | None:
        """Count a call's combined scores; the message to warn with, once, when they do not look calibrated."""
        if self._done:
            return None
        # NaN would make the test's own p-value NaN; what cannot be scored counts as the strangest.
        self._scores.extend(np.nan_to_num(scores, nan=np.inf, posinf=np.inf, neginf=-np.inf).tolist())
        if len(self._scores) < REQUESTS:
            return None
        self._done = True
        test = stats.mannwhitneyu(self._calibration, self._scores)
        if test.pvalue >= _LEVEL:
            return None
        lower = test.statistic / (len(self._calibration) * len(self._scores))
        return (
            f"calibration does not match traffic: the first {len(self._scores)} items score "
            f"{'lower' if lower > 0.5 else 'higher'} than the calibration data (rank-sum p = {test.pvalue:.1e}, probability "
            f"that an item outscores a calibration prompt {1 - lower:.2f}). Either the traffic is out of distribution, or the "
            "guard was calibrated on other data: call calibrate() with trusted traffic."
        )
