"""Detectors: vectors in, one OOD score a vector out."""

from rm_ood.detectors.base import Detector
from rm_ood.detectors.mahalanobis import MahalanobisDetector

__all__ = ["Detector", "MahalanobisDetector"]
