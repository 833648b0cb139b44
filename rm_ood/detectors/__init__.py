"""Detectors: vectors in, one OOD score a vector out."""

from rm_ood.detectors.base import Detector
from rm_ood.detectors.baselines import KNearestNeighbours, VectorNorm
from rm_ood.detectors.conditional import ConditionalMahalanobis
from rm_ood.detectors.contrasted import ContrastedMahalanobis
from rm_ood.detectors.gaussian import NormalisedMahalanobis, SingleGaussian
from rm_ood.detectors.mahalanobis import MahalanobisDetector
from rm_ood.detectors.projected import Projected
from rm_ood.detectors.registry import DETECTORS, detector
from rm_ood.detectors.relative import RelativeMahalanobis
from rm_ood.detectors.rewards import EnergyScore, MaxSoftmax, RewardLevel
from rm_ood.detectors.subspace import ResidualSubspace

__all__ = [
    "DETECTORS",
    "ConditionalMahalanobis",
    "ContrastedMahalanobis",
    "Detector",
    "EnergyScore",
    "KNearestNeighbours",
    "MahalanobisDetector",
    "MaxSoftmax",
    "NormalisedMahalanobis",
    "Projected",
    "RelativeMahalanobis",
    "ResidualSubspace",
    "RewardLevel",
    "SingleGaussian",
    "VectorNorm",
    "detector",
]
