"""What every detector offers."""

from __future__ import annotations

from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor


@runtime_checkable
class Detector(Protocol):
    """Settings in the constructor, learned state in `fit`, one sign: a larger score is more out-of-distribution."""

    def fit(self, x: Any, y: Any = None) -> Self:
        """Learn from in-distribution vectors (n, d) and their class labels (n,); returns itself."""
        ...

    def score(self, x: Any) -> Tensor:
        """Scores (n,) of vectors (n, d), in the detector's own unit; +inf where a row cannot be scored."""
        ...

    def clone(self) -> Self:
        """An unfitted detector with the same settings."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """The learned state by name, enough to score bit-identically after a load."""
        ...
