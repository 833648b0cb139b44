"""What detectors share: settings and learned tensors by name, and the checks of a state that comes back."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rm_ood.errors import CalibrationError, FormatError, InputError, NotFittedError

# Name -> sizes and dtype, None for the scoring dtype. "n d": a letter is one size in all tensors, d the width of x, and
# none is 0 but those with a star.
Forms = dict[str, tuple[str, torch.dtype | None]]


class Learned:
    """Base of detectors whose learned state is a few tensors, kept as attributes with a trailing underscore.

    Class attributes:
        _SETTINGS: constructor arguments, each an attribute of the same name.
        _TENSORS: the form of each tensor.
    """

    _SETTINGS: ClassVar[tuple[str, ...]] = ()
    _TENSORS: ClassVar[Forms] = {}

    n_features_in_: int

    def clone(self) -> Self:
        """An unfitted detector with the same settings."""
        return type(self)(**{name: getattr(self, name) for name in self._SETTINGS})

    def state_tensors(self) -> dict[str, Tensor]:
        """The learned state by name; `from_state` makes a detector of it that scores bit-identically."""
        self._check_fitted()
        return {name: getattr(self, f"{name}_") for name in self._TENSORS}

    def to(self, device: torch.device | str) -> Self:
        """Move the learned state, and with it the scoring, to a device; returns itself."""
        for name, tensor in self.state_tensors().items():
            setattr(self, f"{name}_", tensor.to(device))
        return self

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], **settings: Any) -> Self:
        """Rebuild a fitted detector from `state_tensors()` and its settings; the dtype comes from the tensors.

        Raises:
            FormatError: a tensor is missing, unknown, of another shape or dtype, not finite, or not a possible state.
        """
        dtype, sizes = check_tensors(tensors, cls._TENSORS)
        if "dtype" in cls._SETTINGS:
            settings["dtype"] = dtype
        detector = cls(**settings)
        for name, tensor in tensors.items():
            setattr(detector, f"{name}_", tensor.contiguous())
        if "d" in sizes:
            detector.n_features_in_ = sizes["d"]
        detector._check_loaded()
        return detector

    def _check_loaded(self) -> None:
        """Refuse, with FormatError, tensors of the right form that no fit can have made."""

    def _check_fitted(self) -> None:
        if not all(hasattr(self, f"{name}_") for name in self._TENSORS):
            raise NotFittedError(f"{type(self).__name__} is not fitted; call fit(x) first")


def check_dtype(dtype: torch.dtype) -> None:
    """Raises InputError for a dtype of the state other than float32 and float64."""
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f"dtype={dtype}: expected torch.float32 or torch.float64")


def check_scale(square: float, dtype: torch.dtype) -> None:
    """Refuse vectors whose typical squared length leaves the range of `dtype`: distances would all be infinite, or 0.

    Raises:
        CalibrationError: `square` within 2^20 of the range's ends; 0 passes.
    """
    range_ = torch.finfo(dtype)
    if square and not range_.tiny * 2**20 <= square <= range_.max / 2**20:
        raise CalibrationError(f"the scale of the vectors does not fit {dtype}; rescale them, or use float64")


def check_tensors(tensors: dict[str, Tensor], expected: Forms) -> tuple[torch.dtype, dict[str, int]]:
    """The scoring dtype and the sizes by letter of tensors in these forms.

    Raises:
        FormatError: names the tensor, what was expected and what came.
    """
    check_names(tensors, set(expected))
    sizes: dict[str, int] = {}
    scoring: torch.dtype | None = None
    for name, (letters, dtype) in expected.items():
        tensor, axes = tensors[name], letters.split()
        if dtype is None:
            scoring = scoring or tensor.dtype
            dtype = scoring if scoring in (torch.float32, torch.float64) else torch.float32
        fits = tensor.ndim == len(axes) and all(
            got == sizes[axis] if axis in sizes else got or axis[0] == "*"
            for got, axis in zip(tensor.shape, axes, strict=True)
        )
        if not fits or tensor.dtype != dtype:
            named = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
            raise FormatError(
                f"{name}: expected {dtype} of shape ({named}), got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise FormatError(f"{name}: holds NaN or infinity")
        sizes.update(zip(axes, tensor.shape, strict=True))
    return scoring or torch.float64, sizes


def check_names(tensors: dict[str, Tensor], expected: set[str]) -> None:
    """Raises FormatError where the names are not exactly those expected."""
    if tensors.keys() != expected:
        missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        raise FormatError(f"detector state: missing {missing}, unknown {unknown}")


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of an inner detector: those whose names start with `prefix` and a dot, without these."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def fail_closed(scores: Tensor, finite: Tensor | None = None) -> Tensor:
    """Scores with +inf where they, or the rows `finite` (n,) says it of, are not finite."""
    usable = scores.isfinite() if finite is None else scores.isfinite() & finite
    return torch.where(usable, scores, torch.inf)
