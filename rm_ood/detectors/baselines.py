"""Baselines on vectors: nearest neighbours, what a principal subspace leaves, and the length alone."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from rm_ood.detectors.learned import Forms, Learned, check_dtype, check_scale, fail_closed
from rm_ood.errors import CalibrationError, FormatError, InputError
from rm_ood.ops.arithmetic import exact_dtype, without_autocast
from rm_ood.vectors import as_vectors, check_finite, unit_rows

# Rows of x times fit vectors of one block of products: bounds it to 32 MiB in float32.
_PRODUCTS = 2**23


class KNearestNeighbours(Learned):
    """Distance to the k-th nearest fit vector, by exact search; larger is more OOD.

    A fit vector is its own nearest neighbour. Unlike the Gaussian detectors, which keep aggregates, the state holds
    every fit vector: n d numbers, of which text can sometimes be guessed.

    Args:
        k: which neighbour, 1 to n.
        metric: `"cosine"`: 1 - cos, in [0, 2]; orders vectors as Sun et al.'s Euclidean distance of normalised vectors.
            `"euclidean"`: in the units of x.
        dtype: float32 or float64 of the stored vectors and of scoring.

    Attributes:
        bank_: the fit vectors less `center_`, at length 1 for the cosine, (n, d). center_: their mean, or 0, (d,).

    Reference:
        Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022.
    """

    _SETTINGS = ("k", "metric", "dtype")
    _TENSORS: ClassVar[Forms] = {"bank": ("n d", None), "center": ("d", torch.float64)}

    bank_: Tensor
    center_: Tensor

    def __init__(
        self,
        k: int = 10,
        *,
        metric: Literal["cosine", "euclidean"] = "cosine",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"k={k!r}: expected a whole number from 1")
        if metric not in ("cosine", "euclidean"):
            raise InputError(f"metric={metric!r}: expected 'cosine' or 'euclidean'")
        check_dtype(dtype)
        self.k = k
        self.metric = metric
        self.dtype = dtype

    def fit(self, x: Any, y: Any = None) -> Self:
        """Keep vectors (n, d); `y` is not read.

        Raises:
            NonFiniteError: NaN or infinity. CalibrationError: fewer than k rows, a row of zeros under the cosine, or a
                scale outside `dtype`. InputError: not a dense real (n, d).
        """
        x = as_vectors(x)
        check_finite(x)
        if len(x) < self.k:
            raise CalibrationError(f"k={self.k} needs at least {self.k} fit vectors, got {len(x)}")
        if self.metric == "cosine":
            zeros = int((x == 0).all(1).sum())
            if zeros:
                raise CalibrationError(
                    f"x: {zeros} of {len(x)} rows are all zeros and have no direction; leave them out"
                )
            center = x.new_zeros(x.shape[1], dtype=torch.float64)
        else:
            # About the mean: the expansion of the squares in `score` would cancel far from 0.
            center = x.double().mean(0)
            check_scale(float((x - center).square().sum(1).max()), self.dtype)
        bank = self._placed(x, center)
        self.bank_, self.center_ = bank, center
        self.n_features_in_ = x.shape[1]
        return self

    def score(self, x: Any) -> Tensor:
        """Distance to the k-th nearest fit vector, (n,) in `dtype`.

        +inf where a row is not finite or, under the cosine, all zeros.

        Raises:
            NotFittedError: before fit. MismatchError: another width. InputError: not a dense real (n, d).
        """
        self._check_fitted()
        x = as_vectors(x, n_features=self.n_features_in_).to(self.bank_.device)
        distances = self.bank_.new_empty(len(x))
        chunk = max(1, _PRODUCTS // len(self.bank_))
        with torch.no_grad(), without_autocast(x.device.type):
            # |b|^2 / 2, which is the same for all at length 1.
            exact = exact_dtype(x.device.type, self.bank_.dtype)
            bank = self.bank_.to(exact)
            half_sq = bank.square().sum(1) / 2 if self.metric == "euclidean" else self.bank_.new_zeros(())
            for start in range(0, len(x), chunk):
                rows = self._placed(x[start : start + chunk], self.center_)
                # |row - b|^2 / 2 less |row|^2 / 2, which orders as the distance does.
                order = half_sq - rows.to(exact) @ bank.T
                kth = order.topk(self.k, largest=False).indices[:, -1]
                # The distance itself from the difference: the products would cancel between near neighbours.
                distances[start : start + chunk] = torch.linalg.vector_norm(rows - self.bank_[kth], dim=1)
        return fail_closed(distances if self.metric == "euclidean" else distances.square() / 2)

    def _placed(self, x: Tensor, center: Tensor) -> Tensor:
        return (x - center if self.metric == "euclidean" else unit_rows(x)).to(self.dtype)

    def _check_loaded(self) -> None:
        if len(self.bank_) < self.k:
            raise FormatError(f"bank: expected at least k={self.k} rows, got {len(self.bank_)}")
        if self.metric == "cosine":
            lengths = torch.linalg.vector_norm(self.bank_, dim=1)
            if not torch.allclose(lengths, torch.ones_like(lengths), 1e-4, 1e-4) or bool(self.center_.any()):
                raise FormatError("bank: not of length 1 about 0, as metric='cosine' stores it")


class VectorNorm(Learned):
    """Minus the Euclidean length: vectors of text that a model does not know are often shorter; larger is more OOD.

    Attributes:
        width_: d, () int64: nothing else is learned.
    """

    _TENSORS: ClassVar[Forms] = {"width": ("", torch.int64)}

    width_: Tensor

    def fit(self, x: Any, y: Any = None) -> Self:
        """Note the width of vectors (n, d); `y` is not read.

        Raises:
            NonFiniteError: NaN or infinity. InputError: not a dense real (n, d).
        """
        x = as_vectors(x)
        check_finite(x)
        self.width_, self.n_features_in_ = torch.tensor(x.shape[1]), x.shape[1]
        return self

    def score(self, x: Any) -> Tensor:
        """Minus the length of each row, (n,) float64, in the units of x; +inf where a row, or its length, is not finite.

        Raises:
            NotFittedError: before fit. MismatchError: another width. InputError: not a dense real (n, d).
        """
        self._check_fitted()
        x = as_vectors(x, n_features=self.n_features_in_)
        return fail_closed(-torch.linalg.vector_norm(x, dim=1, dtype=torch.float64))

    def _check_loaded(self) -> None:
        self.n_features_in_ = int(self.width_)
        if self.n_features_in_ < 1:
            raise FormatError(f"width: expected at least 1, got {self.n_features_in_}")
