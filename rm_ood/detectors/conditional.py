"""Distance of one vector given another: is this response strange for this prompt."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from rm_ood.detectors.mahalanobis import MahalanobisDetector, Shrinkage, check_precision
from rm_ood.errors import FormatError, InputError, MismatchError
from rm_ood.moments import ClassMoments
from rm_ood.ops import whitened_sq_distance
from rm_ood.ops.metric import Gaussian, declined
from rm_ood.vectors import as_vectors


class ConditionalMahalanobis(MahalanobisDetector):
    """Squared Mahalanobis length of what the Gaussian regression on `given` leaves of `rest`; larger is more OOD.

    Vectors are [given | rest] in one row. By the chain rule d(given, rest) = d(given) + d(rest | given). The whitening
    of the joint covariance is lower triangular, so its first `n_given` rows make the first part and the others the
    second: one Cholesky, no regression. Both parts are of the jointly shrunk covariance. `score` and `sq_distances` are
    of the second; settings and state are those of the `MahalanobisDetector` of whole rows.

    The regression extrapolates: far from the fit data's `given`, `rest` is predicted badly, and the score rises though
    nothing is wrong with `rest`.

    Args:
        n_given: columns of `given`, from 1 to d - 1; None: half of them.
        shrinkage, floor, dtype: of the joint covariance, as `MahalanobisDetector`.

    Attributes:
        n_given_: columns of `given`; the others as `MahalanobisDetector`'s, of whole rows.
    """

    n_given_: int

    def __init__(
        self,
        n_given: int | None = None,
        *,
        shrinkage: Shrinkage = "oas",
        floor: float = 1e-4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if n_given is not None and (isinstance(n_given, bool) or not isinstance(n_given, int) or n_given < 1):
            raise InputError(f"n_given={n_given!r}: expected a whole number from 1, or None for half of the features")
        super().__init__(shrinkage=shrinkage, floor=floor, dtype=dtype)
        self.n_given = n_given

    @classmethod
    def from_moments(
        cls,
        moments: ClassMoments,
        n_given: int | None = None,
        *,
        shrinkage: Shrinkage = "oas",
        floor: float = 1e-4,
        dtype: torch.dtype = torch.float32,
        other_half: ClassMoments | None = None,
        blind_to: Tensor | None = None,
    ) -> Self:
        """Fit from moments of whole rows alone; otherwise as `MahalanobisDetector.from_moments`."""
        detector = cls(n_given, shrinkage=shrinkage, floor=floor, dtype=dtype)
        return detector._fit_moments(moments, np.arange(moments.n_classes), other_half=other_half, blind_to=blind_to)

    @classmethod
    def from_state(
        cls,
        tensors: dict[str, Tensor],
        *,
        n_given: int | None = None,
        shrinkage: Shrinkage = "oas",
        floor: float = 1e-4,
        classes: Any = None,
        effective_shrinkage: float = math.nan,
        effective_rank: float = math.nan,
        precision: Any = None,
    ) -> Self:
        """Rebuild a detector from `state_tensors()`; it scores bit-identically. No kernel measures it: `precision` is not used.

        Raises:
            FormatError: as `MahalanobisDetector.from_state`, or a width that `n_given` does not divide.
        """
        check_precision(precision)
        detector = cls(n_given, shrinkage=shrinkage, floor=floor)
        return detector._load(tensors, classes, effective_shrinkage, effective_rank)

    def _gaussians(self) -> list[Gaussian]:
        # What is measured is no triangle: the rows of W of the rest alone.
        return []

    def part_sq_distances(self, x: Any) -> tuple[Tensor, Tensor]:
        """d(given) and d(rest | given) to every class, (n, k) each, columns in the order of `classes_`.

        Their sum is the squared distance of whole rows. +inf where what a part sees is not finite; the second sees all.
        Raises as `score`.
        """
        self._check_fitted()
        g, device = self.n_given_, self.whitening_.device
        given = as_vectors(x, n_features=self.n_features_in_).to(device)[:, :g]
        whitening, offsets = self.whitening_[:g, :g].contiguous(), self.offsets_[:, :g].contiguous()
        return whitened_sq_distance(given, whitening, self.center_[:g], offsets)[0], self.sq_distances(x)

    def clone(self) -> Self:
        """An unfitted detector with the same settings."""
        return type(self)(self.n_given, shrinkage=self.shrinkage, floor=self.floor, dtype=self.dtype)

    def to(self, device: torch.device | str) -> Self:
        """Move the fitted state, and with it the scoring, to a device; returns itself."""
        return super().to(device)._divide()

    def _fit_moments(
        self,
        moments: ClassMoments,
        classes: np.ndarray[Any, Any],
        *,
        other_half: ClassMoments | None = None,
        blind_to: Tensor | None = None,
    ) -> Self:
        if wanted := self._indivisible(moments.n_features):
            raise MismatchError(f"x: expected {wanted}, got {moments.n_features}")
        return super()._fit_moments(moments, classes, other_half=other_half, blind_to=blind_to)._divide()

    def _load(
        self, tensors: dict[str, Tensor], classes: Any, effective_shrinkage: float, effective_rank: float
    ) -> Self:
        super()._load(tensors, classes, effective_shrinkage, effective_rank)
        if wanted := self._indivisible(self.n_features_in_):
            raise FormatError(f"whitening: expected {wanted}, got {self.n_features_in_}")
        return self._divide()

    def _divide(self) -> Self:
        g = self.n_features_in_ // 2 if self.n_given is None else self.n_given
        # The rows of the second part alone; a row of zeros adds nothing to a distance but NaN for what is not finite.
        self._whitening, self._offsets = self.whitening_.clone(), self.offsets_.clone()
        self._whitening[:g] = 0
        self._offsets[:, :g] = 0
        self.n_given_ = g
        return self

    def _indivisible(self, d: int) -> str:
        """What was expected instead of d features, if they have no two parts."""
        if self.n_given is None:
            return "an even number of features for two halves" if d % 2 else ""
        return f"more than n_given={self.n_given} features" if d <= self.n_given else ""

    def _lowest(self, x: Any) -> Tensor:
        return self._distances(x)[1]

    def _distances(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        self._check_fitted()
        x = as_vectors(x, n_features=self.n_features_in_).to(self.whitening_.device)
        declined(x.device, "a distance given another vector, which is no triangle")
        return whitened_sq_distance(x, self._whitening, self.center_, self._offsets)
