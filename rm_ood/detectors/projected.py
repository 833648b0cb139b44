"""A detector that does not see some directions, such as the one the reward is read along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from rm_ood.detectors.base import Detector
from rm_ood.detectors.learned import check_names, check_tensors, part
from rm_ood.errors import FormatError, InputError, NotFittedError
from rm_ood.vectors import as_vectors, check_finite, unit_rows

# What is left of a unit direction beside those before it: below this it is rounding.
_DEPENDENT = 1e-6


class Projected:
    """An inner detector on vectors without their components along `direction`; larger is more OOD.

    The reward's direction dominates a reward model's last layer, and shifted inputs often move towards the centre along
    it. The vectors are rotated so that the directions become the first columns, and these are left out: d - c columns
    are left, of a covariance that is as regular as before. Rotations change no Mahalanobis, cosine or Euclidean score.

    Args:
        detector: an unfitted detector; it is cloned.
        direction: (d,) or (c, d), c < d: weight rows of the head, linearly independent, of any length.

    Attributes:
        inner_: the fitted detector, of width d - c. n_features_in_: d.
        reflectors_: unit vectors (c, d) float64, whose Householder reflections one after the other are the rotation.
    """

    inner_: Detector
    n_features_in_: int

    def __init__(self, detector: Detector, direction: Any) -> None:
        if not isinstance(detector, Detector):
            raise InputError(f"detector: expected a detector, got {type(detector).__name__}")
        direction = torch.as_tensor(direction)
        direction = as_vectors(direction[None] if direction.ndim == 1 else direction, name="direction")
        check_finite(direction, name="direction")
        self.detector = detector
        self.direction = direction
        self.reflectors_ = _reflectors(direction)
        self.n_features_in_ = direction.shape[1]

    def fit(self, x: Any, y: Any = None) -> Self:
        """Fit a clone of the detector on vectors (n, d) without the directions. Raises and warns as its `fit`.

        Raises:
            MismatchError: another width than that of `direction`.
        """
        self.inner_ = self.detector.clone().fit(self.project(x), y)
        return self

    def project(self, x: Any) -> Tensor:
        """Vectors (n, d) without the directions: (n, d - c), float32 or wider; lengths in the rest are kept.

        For fits from moments. A row that is not finite becomes NaN. Raises as `score`.
        """
        x = as_vectors(x, n_features=self.n_features_in_)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for reflector in self.reflectors_.to(x):
            # Products and a sum, not a matrix product: an autocast around it would round that to bfloat16.
            x = x - 2 * (x * reflector).sum(1, keepdim=True) * reflector
        projected: Tensor = x[:, len(self.reflectors_) :]
        return projected

    def score(self, x: Any) -> Tensor:
        """The inner detector's scores (n,), in its unit; +inf where a row cannot be scored.

        Raises:
            NotFittedError: before fit. MismatchError: another width. InputError: not a dense real (n, d).
        """
        return self._fitted().score(self.project(x))

    def clone(self) -> Self:
        """An unfitted detector with the same settings."""
        return type(self)(self.detector, self.direction)

    def state_tensors(self) -> dict[str, Tensor]:
        """`direction`, `reflectors`, and the inner detector's state as `inner.NAME`."""
        inner = {f"inner.{name}": tensor for name, tensor in self._fitted().state_tensors().items()}
        return {"direction": self.direction, "reflectors": self.reflectors_, **inner}

    def to(self, device: torch.device | str) -> Self:
        """Move the fitted state, and with it the scoring, to a device; returns itself.

        Raises:
            InputError: the inner detector cannot be moved.
        """
        inner = self._fitted()
        if not hasattr(inner, "to"):
            raise InputError(f"device={device}: {type(inner).__name__} has no to(device)")
        inner.to(device)
        self.direction, self.reflectors_ = self.direction.to(device), self.reflectors_.to(device)
        return self

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], rebuild: Callable[[dict[str, Tensor]], Detector]) -> Self:
        """Rebuild a detector from `state_tensors()`; it scores bit-identically.

        Args:
            tensors: exactly the names of `state_tensors()`.
            rebuild: makes the inner detector from its own tensors, as `MahalanobisDetector.from_state` does.

        Raises:
            FormatError: a tensor is missing, unknown or of another form, or `rebuild` refuses its part.
        """
        inner = part(tensors, "inner")
        check_names(tensors, {"direction", "reflectors", *(f"inner.{name}" for name in inner)})
        direction, reflectors = tensors["direction"], tensors["reflectors"]
        check_tensors(
            {"direction": direction.double(), "reflectors": reflectors},
            {"direction": ("c d", torch.float64), "reflectors": ("c d", torch.float64)},
        )
        fitted = rebuild(inner)
        detector = cls(fitted.clone(), direction)
        # Another machine may round the reflectors otherwise: those of the fit are taken, where they fit the direction.
        if not torch.allclose(detector.reflectors_, reflectors, 1e-6, 1e-6):
            raise FormatError("reflectors: not those of the direction")
        detector.reflectors_, detector.inner_ = reflectors.contiguous(), fitted
        return detector

    def _fitted(self) -> Detector:
        if not hasattr(self, "inner_"):
            raise NotFittedError("Projected is not fitted; call fit(x, y) first")
        return self.inner_


def _reflectors(direction: Tensor) -> Tensor:
    """Householder vectors (c, d) of the QR decomposition of the directions, scaled to length 1 first."""
    c, d = direction.shape
    if not 0 < c < d:
        raise InputError(f"direction: expected 1 to {d - 1} directions of {d} features, got {c}")
    rest = unit_rows(direction)
    reflectors = rest.new_zeros(c, d)
    for i in range(c):
        v = rest[i].clone()
        v[:i] = 0
        length = torch.linalg.vector_norm(v)
        if not float(length) > _DEPENDENT:
            raise InputError(f"direction: row {i} is zero, or a combination of the rows before it")
        # Away from the axis, on the side that does not cancel.
        v[i] += torch.copysign(length, v[i])
        reflectors[i] = v / torch.linalg.vector_norm(v)
        rest = rest - 2 * torch.outer(rest @ reflectors[i], reflectors[i])
    return reflectors
