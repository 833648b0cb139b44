"""Mahalanobis distance weighed against noisy copies of the fit data: sees corruption that moves vectors to the centre."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor

from rm_ood.detectors.gaussian import NormalisedMahalanobis
from rm_ood.detectors.learned import part
from rm_ood.detectors.mahalanobis import check_factor
from rm_ood.errors import FormatError, MismatchError, NotFittedError
from rm_ood.moments import ClassMoments
from rm_ood.ops.metric import Gaussian

# No vector of text comes so near to the mean of the noisy copies; a distance of 0 would make the score infinite.
_NEAREST = 1e-3
_PREFIX = "noise"


class ContrastedMahalanobis(NormalisedMahalanobis):
    """Score = d (d / d_noise), with d the squared distance to the nearest class and d_noise that to the noisy copies.

    Both of vectors of length 1. Noise on the words of a text often moves its vectors *towards* the centre of the fit
    data, where a distance alone sees nothing; the ratio asks whether noise explains the vector better. Its Gaussian is of
    copies of the fit texts with random words in them, so no out-of-distribution data are needed.

    The ratio alone (`contrasted`) is a second score: the largest of both, each standardised, sees more than either. The
    distance to each class is weighed by the same ratio, so `sq_distances` keeps its order among classes. Settings as
    `MahalanobisDetector`; the state has that of the copies' Gaussian beside its own, as `noise.NAME`.

    Attributes:
        noise_: the fitted `NormalisedMahalanobis` of the noisy copies, one class.

    Reference:
        Ren et al., "Likelihood Ratios for Out-of-Distribution Detection", NeurIPS 2019 (a background model of perturbed
        inputs), here with Gaussians of a reward model's vectors.
    """

    noise_: NormalisedMahalanobis

    def fit_noise(self, noise: Any) -> Self:
        """Fit the Gaussian of the noisy copies, on their vectors (m, d) or on `ClassMoments` of vectors of length 1.

        Raises and warns as `fit`.
        """
        settings: dict[str, Any] = {"shrinkage": self.shrinkage, "floor": self.floor, "dtype": self.dtype}
        if isinstance(noise, ClassMoments):
            # A rule that needs two halves of the data has only one here.
            settings["shrinkage"] = "oas" if self.shrinkage == "likelihood" else self.shrinkage
            self.noise_ = NormalisedMahalanobis.from_moments(noise.pooled(), **settings)
        else:
            self.noise_ = NormalisedMahalanobis(**settings).fit(noise)
        self._metric, self._precision = None, None
        if hasattr(self, "whitening_") and self.noise_.n_features_in_ != self.n_features_in_:
            raise MismatchError(f"noise: expected {self.n_features_in_} features, got {self.noise_.n_features_in_}")
        return self

    def state_tensors(self) -> dict[str, Tensor]:
        """The state of both Gaussians; that of the copies as `noise.NAME`."""
        own = super().state_tensors()
        return {**own, **{f"{_PREFIX}.{name}": tensor for name, tensor in self.noise_.state_tensors().items()}}

    def scaled(self, factor: float) -> Self:
        """The detector for vectors that are all `factor` > 0 times as long: it is the same one. Raises as the others'."""
        check_factor(factor)
        return self.from_state(
            self.state_tensors(),
            shrinkage=self.shrinkage,
            floor=self.floor,
            classes=self.classes_,
            effective_shrinkage=self.shrinkage_,
            effective_rank=self.effective_rank_,
            precision=self.precision,
        )

    def contrasted(self, x: Any) -> tuple[Tensor, Tensor]:
        """`sq_distances` (n, k) and the ratio d / d_noise by itself, (n,); larger is more OOD, and +inf as in `score`."""
        weighed, _, _, ratio = self._weigh(x)
        return weighed, ratio

    def own_sq_distances(self, x: Any) -> Tensor:
        """Squared distance to every class before it is weighed, (n, k); otherwise as `sq_distances`."""
        return self._measured(x)[0][0]

    def to(self, device: Any) -> Self:
        """Move the fitted state, and with it the scoring, to a device; returns itself."""
        self._check_fitted()
        for gaussian, tensors in ((self, super().state_tensors()), (self.noise_, self.noise_.state_tensors())):
            for name, tensor in tensors.items():
                setattr(gaussian, f"{name}_", tensor.to(device))
        self._renew_metric(self.precision).prepare()
        return self

    def _lowest(self, x: Any) -> Tensor:
        return self._distances(x)[1]

    def _distances(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self._weigh(x)[:3]

    def _weigh(self, x: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (distances, nearest, index), (_, noise, _) = self._measured(x)
        noise = noise.clamp(min=_NEAREST)
        # A row that cannot be scored, by either Gaussian, is infinitely far, whatever the other one says.
        ratio = torch.where(noise.isfinite(), nearest / noise, math.inf).nan_to_num(nan=math.inf, posinf=math.inf)
        weighed = (distances * ratio[:, None]).nan_to_num(nan=math.inf, posinf=math.inf)
        return weighed, (nearest * ratio).nan_to_num(nan=math.inf, posinf=math.inf), index, ratio

    def _gaussians(self) -> list[Gaussian]:
        return [*super()._gaussians(), *self.noise_._gaussians()]

    def _is_current(self, whitenings: tuple[Tensor, ...]) -> bool:
        return super()._is_current(whitenings) and whitenings[1] is self.noise_.whitening_

    def _load(
        self, tensors: dict[str, Tensor], classes: Any, effective_shrinkage: float, effective_rank: float
    ) -> Self:
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{_PREFIX}.")}
        super()._load(own, classes, effective_shrinkage, effective_rank)
        noise = NormalisedMahalanobis.from_state(part(tensors, _PREFIX), shrinkage=self.shrinkage, floor=self.floor)
        same = noise.whitening_.shape == self.whitening_.shape and noise.dtype == self.dtype
        if not same or len(noise.classes_) != 1:
            raise FormatError("noise: not one Gaussian of the width and dtype of the fit data's")
        self.noise_ = noise
        return self

    def _check_fitted(self) -> None:
        super()._check_fitted()
        if not hasattr(self, "noise_"):
            raise NotFittedError("ContrastedMahalanobis has no noisy copies to contrast with: call fit_noise(x)")
