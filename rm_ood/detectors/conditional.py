"""Distance of one vector given another: is this response strange for this prompt."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from rm_ood.detectors.mahalanobis import MahalanobisDetector, Shrinkage
from rm_ood.errors import FormatError, InputError, MismatchError, NotFittedError
from rm_ood.moments import ClassMoments
from rm_ood.ops import whitened_sq_distance
from rm_ood.vectors import as_vectors


class ConditionalMahalanobis:
    """Squared Mahalanobis length of what the Gaussian regression on `given` leaves of `rest`; larger is more OOD.

    Vectors are [given | rest] in one row. By the chain rule d(given, rest) = d(given) + d(rest | given). The whitening
    of the joint covariance is lower triangular, so its first `n_given` rows make the first part and the others the
    second: one Cholesky, no regression. Both parts are of the jointly shrunk covariance.

    The regression extrapolates: far from the fit data's `given`, `rest` is predicted badly, and the score rises though
    nothing is wrong with `rest`.

    Args:
        n_given: columns of `given`, from 1 to d - 1.
        shrinkage, floor, dtype: of the joint covariance, as `MahalanobisDetector`.

    Attributes:
        joint_: the fitted `MahalanobisDetector` of whole rows. n_features_in_: d.
    """

    joint_: MahalanobisDetector
    n_features_in_: int

    def __init__(
        self,
        n_given: int,
        *,
        shrinkage: Shrinkage = "oas",
        floor: float = 1e-4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if isinstance(n_given, bool) or not isinstance(n_given, int) or n_given < 1:
            raise InputError(f"n_given={n_given!r}: expected a whole number from 1")
        MahalanobisDetector(shrinkage=shrinkage, floor=floor, dtype=dtype)  # refuses bad settings
        self.n_given = n_given
        self.shrinkage = shrinkage
        self.floor = floor
        self.dtype = dtype

    def fit(self, x: Any, y: Any = None) -> Self:
        """Fit on vectors (n, d) and classes (n,). Raises and warns as `MahalanobisDetector.fit`.

        Raises:
            MismatchError: no column is left beside the `n_given` first.
        """
        x = as_vectors(x)
        self._check_width(x.shape[1])
        return self._take(MahalanobisDetector(**self._gaussian()).fit(x, y))

    @classmethod
    def from_moments(
        cls,
        moments: ClassMoments,
        n_given: int,
        *,
        shrinkage: Shrinkage = "oas",
        floor: float = 1e-4,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Fit from moments of whole rows alone; classes are 0 to k - 1. Raises and warns as `fit`."""
        detector = cls(n_given, shrinkage=shrinkage, floor=floor, dtype=dtype)
        detector._check_width(moments.n_features)
        return detector._take(MahalanobisDetector.from_moments(moments, **detector._gaussian()))

    @classmethod
    def from_state(
        cls,
        tensors: dict[str, Tensor],
        *,
        n_given: int,
        shrinkage: Shrinkage = "oas",
        floor: float = 1e-4,
        classes: Any = None,
    ) -> Self:
        """Rebuild a detector from `state_tensors()`; it scores bit-identically.

        Raises:
            FormatError: as `MahalanobisDetector.from_state`, or a width that `n_given` leaves nothing of.
        """
        joint = MahalanobisDetector.from_state(tensors, shrinkage=shrinkage, floor=floor, classes=classes)
        detector = cls(n_given, shrinkage=shrinkage, floor=floor, dtype=joint.dtype)
        if joint.n_features_in_ <= n_given:
            raise FormatError(f"whitening: expected more than n_given={n_given} features, got {joint.n_features_in_}")
        return detector._take(joint)

    def score(self, x: Any) -> Tensor:
        """d(rest | given) to the class where it is least, (n,) in `dtype`; +inf where a row, either part, is not finite.

        Raises:
            NotFittedError: before fit. MismatchError: another width. InputError: not a dense real (n, d).
        """
        return self._distances(x, given=False)[1]

    def sq_distances(self, x: Any) -> tuple[Tensor, Tensor]:
        """d(given) and d(rest | given) to every class, (n, k) each, columns in the order of `joint_.classes_`.

        Their sum is `joint_.sq_distances(x)`. Raises as `score`.
        """
        return self._distances(x, given=True)[0], self._distances(x, given=False)[0]

    def clone(self) -> Self:
        """An unfitted detector with the same settings."""
        return type(self)(self.n_given, **self._gaussian())

    def state_tensors(self) -> dict[str, Tensor]:
        """The state of `joint_`."""
        return self._fitted().state_tensors()

    def to(self, device: torch.device | str) -> Self:
        """Move the fitted state, and with it the scoring, to a device; returns itself."""
        return self._take(self._fitted().to(device))

    def _gaussian(self) -> dict[str, Any]:
        return {"shrinkage": self.shrinkage, "floor": self.floor, "dtype": self.dtype}

    def _take(self, joint: MahalanobisDetector) -> Self:
        # The rows of the second part alone; a row of zeros adds nothing to a distance but NaN for what is not finite.
        self._whitening, self._offsets = joint.whitening_.clone(), joint.offsets_.clone()
        self._whitening[: self.n_given] = 0
        self._offsets[:, : self.n_given] = 0
        self.joint_, self.n_features_in_ = joint, joint.n_features_in_
        return self

    def _distances(self, x: Any, *, given: bool) -> tuple[Tensor, Tensor, Tensor]:
        joint, g = self._fitted(), self.n_given
        x = as_vectors(x, n_features=joint.n_features_in_).to(joint.whitening_.device)
        if given:
            return whitened_sq_distance(
                x[:, :g], joint.whitening_[:g, :g].contiguous(), joint.center_[:g], joint.offsets_[:, :g].contiguous()
            )
        return whitened_sq_distance(x, self._whitening, joint.center_, self._offsets)

    def _check_width(self, d: int) -> None:
        if d <= self.n_given:
            raise MismatchError(f"x: expected more than n_given={self.n_given} features, got {d}")

    def _fitted(self) -> MahalanobisDetector:
        if not hasattr(self, "joint_"):
            raise NotFittedError("ConditionalMahalanobis is not fitted; call fit(x) first")
        return self.joint_
