"""A first look at the traffic: do the first requests score like the calibration data?

This is one test, once. The alarm that may be watched for ever is `rm_ood.monitor`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rm_ood.batch_tests import rank_sum

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
        self._scores.extend(scores.tolist())
        if len(self._scores) < REQUESTS:
            return None
        self._done = True
        p, superiority = rank_sum(self._calibration, np.array(self._scores))
        if p >= _LEVEL:
            return None
        return (
            f"calibration does not match traffic: the first {len(self._scores)} items score "
            f"{'higher' if superiority > 0.5 else 'lower'} than the calibration data (rank-sum p = {p:.1e}, probability "
            f"that an item outscores a calibration prompt {superiority:.2f}). Either the traffic is out of distribution, or "
            "the guard was calibrated on other data: call calibrate() with trusted traffic."
        )
