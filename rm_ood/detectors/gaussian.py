"""Variants of the Mahalanobis detector: one class whatever the labels, and vectors of length 1."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from rm_ood.detectors.mahalanobis import MahalanobisDetector, check_factor
from rm_ood.errors import CalibrationError
from rm_ood.moments import ClassMoments
from rm_ood.vectors import as_vectors, check_finite, unit_rows


class SingleGaussian(MahalanobisDetector):
    """Squared Mahalanobis distance to one Gaussian of all rows: labels and classes of moments are not used.

    What the classes buy is the difference to this. Settings, state and scores as `MahalanobisDetector`.
    """

    def fit(self, x: Any, y: Any = None) -> Self:
        """Fit on vectors (n, d); `y` is not read. Raises and warns as `MahalanobisDetector.fit`."""
        return super().fit(x)

    def _fit_moments(
        self,
        moments: ClassMoments,
        classes: np.ndarray[Any, Any],
        *,
        other_half: ClassMoments | None = None,
        blind_to: Tensor | None = None,
    ) -> Self:
        other = None if other_half is None else other_half.pooled()
        return super()._fit_moments(moments.pooled(), np.arange(1), other_half=other, blind_to=blind_to)


class NormalisedMahalanobis(MahalanobisDetector):
    """Mahalanobis++: the squared distance of vectors that were scaled to length 1 first; larger is more OOD.

    The score depends on a vector's direction alone. A row of zeros has none, and scores +inf. `from_moments` takes the
    moments of `rm_ood.vectors.unit_rows(x)`. Settings and state as `MahalanobisDetector`.

    Reference:
        Mueller and Hein, "Mahalanobis++: Improving OOD Detection via Feature Normalization", ICML 2025.
    """

    _UNIT: ClassVar[bool] = True

    def fit(self, x: Any, y: Any = None) -> Self:
        """Fit on vectors (n, d) of any length above 0. Raises and warns as `MahalanobisDetector.fit`.

        Raises:
            CalibrationError: a row of zeros, which has no direction.
        """
        x = as_vectors(x)
        check_finite(x)
        zeros = int((x == 0).all(1).sum())
        if zeros:
            raise CalibrationError(f"x: {zeros} of {len(x)} rows are all zeros and have no direction; leave them out")
        return super().fit(unit_rows(x), y)

    def scaled(self, factor: float) -> Self:
        """The detector for vectors that are all `factor` > 0 times as long: it is the same one.

        Raises:
            InputError: a factor that is not finite and positive.
        """
        check_factor(factor)
        return super().scaled(1.0)
