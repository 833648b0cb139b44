"""Detectors that see rewards only: the two of a pair, or one. What vectors are worth is the difference to these."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from rm_ood.detectors.learned import Forms, Learned, fail_closed
from rm_ood.errors import CalibrationError, FormatError, InputError
from rm_ood.moments import ClassMoments
from rm_ood.vectors import as_vectors, check_finite


class _PairScore(Learned):
    """A fixed function of the rewards (n, 2) of pairs: nothing is learned, and `score` works without `fit`."""

    _SETTINGS = ("temperature",)

    n_features_in_ = 2

    def __init__(self, temperature: float = 1.0) -> None:
        if not (math.isfinite(temperature) and temperature > 0):
            raise InputError(f"temperature={temperature}: expected a finite number above 0")
        self.temperature = temperature

    def fit(self, x: Any, y: Any = None) -> Self:
        """Check the rewards (n, 2) of pairs; there is nothing to learn, and `y` is not read.

        Raises:
            NonFiniteError: NaN or infinity. MismatchError: not two columns. InputError: not a dense real (n, d).
        """
        check_finite(as_vectors(x, n_features=2))
        return self


class EnergyScore(_PairScore):
    """Energy of a pair's two rewards, -T logsumexp(rewards / T): close to minus the larger one; larger is more OOD.

    The order of the two does not matter. `temperature` T is in the units of the reward.

    Reference:
        Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020; on reward pairs by LeVine et al., "A
        Baseline Analysis of Reward Models' Ability To Accurately Analyze Foundation Models Under Distribution Shift",
        arXiv 2311.14743.
    """

    def score(self, x: Any) -> Tensor:
        """Energies (n,) float64, in the units of the reward; +inf where a reward is not finite.

        Raises:
            MismatchError: not two columns. InputError: not a dense real (n, d).
        """
        x = as_vectors(x, n_features=2).double()
        first, second = x.unbind(1)
        # The larger reward plus a rest in [0, T log 2], so that nothing overflows.
        rest = (-(first - second).abs() / self.temperature).exp().log1p() * self.temperature
        return fail_closed(-torch.maximum(first, second) - rest, x.isfinite().all(1))


class MaxSoftmax(_PairScore):
    """Minus the probability of the preferred response, softmax(rewards / T): from -1 (sure) to -1/2 (a tie).

    Reference:
        Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples", ICLR 2017.
    """

    def score(self, x: Any) -> Tensor:
        """Scores (n,) float64, a negative probability; +inf where a reward is not finite. Raises as `EnergyScore`."""
        x = as_vectors(x, n_features=2).double()
        margin = (x[:, 0] - x[:, 1]).abs() / self.temperature
        return fail_closed(-margin.sigmoid(), x.isfinite().all(1))


class RewardLevel(Learned):
    """The reward itself as OOD score: low rewards ("low"), or rewards far from the fit data's mean ("both").

    Args:
        side: `"low"`: minus the reward, in its units, as the paper's energy is close to. `"both"`: |reward - mean| in
            standard deviations of the fit data.

    Attributes:
        mean_, spread_: mean and standard deviation (n - 1) of the fit rewards, () float64.
    """

    _SETTINGS = ("side",)
    _TENSORS: ClassVar[Forms] = {"mean": ("", torch.float64), "spread": ("", torch.float64)}

    n_features_in_ = 1
    mean_: Tensor
    spread_: Tensor

    def __init__(self, side: Literal["low", "both"] = "low") -> None:
        if side not in ("low", "both"):
            raise InputError(f"side={side!r}: expected 'low' or 'both'")
        self.side = side

    def fit(self, x: Any, y: Any = None) -> Self:
        """Learn mean and spread of rewards (n, 1); `y` is not read.

        Raises:
            NonFiniteError: NaN or infinity. CalibrationError: fewer than two rewards, or all equal.
            MismatchError: not one column. InputError: not a dense real (n, 1).
        """
        x = as_vectors(x, n_features=1)
        moments = ClassMoments(1, device=x.device).update(x)
        n, scatter = moments.n_samples, moments.within_scatter()[0, 0]
        if n < 2 or not float(scatter) > 0:
            raise CalibrationError(f"x: {n} rewards without spread; pass rewards of different responses")
        self.mean_, self.spread_ = moments.means[0, 0], (scatter / (n - 1)).sqrt()
        return self

    def score(self, x: Any) -> Tensor:
        """Scores (n,) float64 of rewards (n, 1); +inf where a reward is not finite.

        Raises:
            NotFittedError: before fit. MismatchError: not one column. InputError: not a dense real (n, 1).
        """
        self._check_fitted()
        reward = as_vectors(x, n_features=1)[:, 0].to(self.mean_.device, torch.float64)
        return fail_closed(-reward if self.side == "low" else (reward - self.mean_).abs() / self.spread_)

    def _check_loaded(self) -> None:
        if not float(self.spread_) > 0:
            raise FormatError(f"spread: expected a number above 0, got {float(self.spread_)}")
