"""The Mahalanobis detector as a scikit-learn outlier estimator: embeddings in, no reward model."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from rm_ood.detectors.mahalanobis import MahalanobisDetector, Shrinkage
from rm_ood.errors import InputError
from rm_ood.ops import whitened_sq_distance
from rm_ood.vectors import as_tensor, as_vectors

Array = np.ndarray[Any, Any]


class MahalanobisOutlier(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """Outliers by squared Mahalanobis distance to the nearest class, with scikit-learn's sign conventions.

    Args:
        contamination: share of the training rows that `predict` calls outliers, a fraction in (0, 0.5]. It promises
            nothing about new rows: for that, rank `-score_samples` with `ConformalCalibrator`.
        shrinkage: `"oas"` or a fraction. floor: least shrinkage.

    Attributes:
        offset_: threshold on `score_samples`. classes_, means_, whitening_, shrinkage_: as `MahalanobisDetector`.
    """

    def __init__(self, *, contamination: float = 0.1, shrinkage: Shrinkage = "oas", floor: float = 1e-4) -> None:
        self.contamination = contamination
        self.shrinkage = shrinkage
        self.floor = floor

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit on rows X (n, d) of in-distribution vectors; labels `y`, when given, are classes with their own means."""
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        if not 0 < self.contamination <= 0.5:
            raise InputError(f"contamination={self.contamination!r}: expected a fraction in (0, 0.5]")
        detector = MahalanobisDetector(shrinkage=self.shrinkage, floor=self.floor, dtype=torch.float64).fit(X, y)
        # NumPy state: it pickles, clones and compares without torch.
        self.classes_, self.shrinkage_ = detector.classes_, detector.shrinkage_
        self.means_, self.whitening_ = detector.means_.numpy(), detector.whitening_.numpy()
        self.class_counts_ = detector.class_counts_.numpy()
        self._center, self._offsets = detector.center_.numpy(), detector.offsets_.numpy()
        self.offset_ = float(np.percentile(-detector.score(X).numpy(), 100.0 * self.contamination))
        return self

    def score_samples(self, X: Any) -> Array:
        """Negative squared distance to the nearest class, (n,) float64: scikit-learn's sign, larger = more normal."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        state = (as_tensor(a) for a in (self.whitening_, self._center, self._offsets))
        scores: Array = -whitened_sq_distance(as_vectors(X), *state)[1].numpy()
        return scores

    def decision_function(self, X: Any) -> Array:
        """`score_samples` minus `offset_`, (n,): negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> Array:
        """1 for inliers and -1 for outliers, (n,) int64."""
        return np.where(self.decision_function(X) < 0, -1, 1)
