"""Detectors by name."""

from __future__ import annotations

from typing import Any

from rm_ood.detectors.base import Detector
from rm_ood.detectors.baselines import KNearestNeighbours, VectorNorm
from rm_ood.detectors.gaussian import NormalisedMahalanobis, SingleGaussian
from rm_ood.detectors.mahalanobis import MahalanobisDetector
from rm_ood.detectors.relative import RelativeMahalanobis
from rm_ood.detectors.rewards import EnergyScore, MaxSoftmax, RewardLevel
from rm_ood.detectors.subspace import ResidualSubspace
from rm_ood.errors import InputError

# On vectors (n, d); the last three on rewards: (n, 2) of pairs, (n, 2) of pairs, (n, 1).
DETECTORS: dict[str, type[Any]] = {
    "mahalanobis": MahalanobisDetector,
    "single_gaussian": SingleGaussian,
    "mahalanobis++": NormalisedMahalanobis,
    "relative": RelativeMahalanobis,
    "knn": KNearestNeighbours,
    "vim": ResidualSubspace,
    "norm": VectorNorm,
    "energy": EnergyScore,
    "max_softmax": MaxSoftmax,
    "reward": RewardLevel,
}


def detector(name: str, **settings: Any) -> Detector:
    """An unfitted detector: one of `DETECTORS`, with the settings of its constructor.

    Raises:
        InputError: an unknown name, a setting that this detector does not have, or one that it refuses.
    """
    if name not in DETECTORS:
        raise InputError(f"detector={name!r}: expected one of {', '.join(map(repr, DETECTORS))}")
    try:
        made: Detector = DETECTORS[name](**settings)
    except TypeError as error:
        raise InputError(f"detector={name!r}: {error}") from error
    return made
