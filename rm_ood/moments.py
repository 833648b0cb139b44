"""Streaming per-class count, mean and pooled scatter: one pass, additive, exact to float64.

The state is held about a pivot near the mean (ops/README.md), so it adds up over batches, files and processes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rm_ood.errors import CalibrationError, FormatError, InputError, MismatchError
from rm_ood.ops import class_scatter
from rm_ood.ops.linalg import about_another_pivot
from rm_ood.vectors import as_tensor, as_vectors, check_finite

# Rows held back until the product with them is worth the (d, d) sum in memory.
_FLUSH_ROWS = 2048
# Rows of one update that are moved to the device at a time.
_MOST_ROWS = 2**15
# Rows whose mean stands for that of an update: the scatter about it is larger by one part in so many, on average.
_SAMPLED_ROWS = 256


# Embedding is often done in inference mode; a state made there could not be added to outside of it.
_outside_inference_mode = torch.inference_mode(False)


class ClassMoments:
    """Counts, class means and within-class scatter of vectors that arrive in pieces.

    Any split of the data into `update` calls, shards and merges, in any order, gives the same moments: to about 1e-12 where
    the products are float64, and as far as float32 goes elsewhere.

    Args:
        n_features: d.
        n_classes: k; labels are 0 to k - 1.
        device: where the (d, d) float64 state lives and the products run.
        exact: float64 products on every device. Otherwise half- and single-precision vectors on GPUs whose float64 is slow go
            to a kernel, which keeps what float32 does: some 6 digits of a variance, and where the largest variance is 1e5
            times the least, about 1e-3 of the least.

    Raises:
        InputError: sizes below 1.
    """

    @_outside_inference_mode
    def __init__(
        self,
        n_features: int,
        n_classes: int = 1,
        *,
        device: torch.device | str = "cpu",
        exact: bool = False,
    ) -> None:
        if n_features < 1 or n_classes < 1:
            raise InputError(f"n_features={n_features}, n_classes={n_classes}: both must be at least 1")
        self.exact = exact
        self.n_features = n_features
        self.n_classes = n_classes
        self.device = torch.device(device)
        self._counts = torch.zeros(n_classes, dtype=torch.int64, device=self.device)
        self._pivot = torch.zeros(n_features, dtype=torch.float64, device=self.device)
        self._sums = self._pivot.new_zeros(n_classes, n_features)
        # Pages of zeros that nothing has touched yet: the first rows bring a scatter of their own.
        self._scatter = torch.from_numpy(np.zeros((n_features, n_features))).to(self.device)
        self._n_at_pivot = 0
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._n_pending = 0

    @_outside_inference_mode
    def update(self, x: Any, y: Any = None) -> Self:
        """Add vectors (n, d), tensor or array, with classes (n,) in [0, k); `y` may be left out when k is 1.

        Raises:
            NonFiniteError: NaN or infinity; the message has the first row indices and the count. Nothing is added.
            InputError: not a dense real (n, d); labels missing, not one a row, or out of range.
            MismatchError: another width.
        """
        x, y = self._checked(x, y)
        if len(x) >= _FLUSH_ROWS:
            self._flush()
            self._accumulate(x, y)
        elif len(x):
            check_finite(x)
            # A copy: the caller may reuse the buffer of the batch before it is flushed.
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            self._pending.append((x.to(self.device, wide, copy=True), y.to(self.device, copy=True)))
            self._n_pending += len(x)
            if self._n_pending >= _FLUSH_ROWS:
                self._flush()
        return self

    def merge(self, other: ClassMoments) -> Self:
        """Add the moments of other data.

        Raises:
            MismatchError: another width or number of classes.
        """
        return self._combine(other, 1)

    @_outside_inference_mode
    def subtract(self, other: ClassMoments) -> Self:
        """Take away the moments of data that were added before.

        Raises:
            MismatchError: another width or number of classes.
            InputError: `other` has more rows of a class than this has.
        """
        self._check_same_shape(other)
        if bool((other.counts > self.counts.to(other.device)).any()):
            raise InputError(
                f"subtract: counts {other.counts.tolist()} are more than {self.counts.tolist()} that were added"
            )
        self._combine(other, -1)
        # What rounding left of a class that is gone would be read as its mean.
        self._sums[self._counts == 0] = 0.0
        left = bool(self._counts.any())
        if not left:
            self._scatter.zero_()
        # The rows that chose the pivot may be gone: choose again with the next ones.
        self._n_at_pivot = int(left)
        return self

    @_outside_inference_mode
    def all_reduce(self, group: Any = None) -> Self:
        """Sum the moments of all processes of a `torch.distributed` group; each ends with the total.

        A process without data takes part with zeros. Tensors only are sent, no pickles.

        Raises:
            MismatchError: the processes differ in width or number of classes; raised on all of them.
        """
        self._flush()
        d, k = self.n_features, self.n_classes
        shape = torch.tensor([d, -d, k, -k], dtype=torch.int64, device=self.device)
        dist.all_reduce(shape, dist.ReduceOp.MAX, group=group)
        high_d, low_d, high_k, low_k = shape.tolist()
        if high_d != -low_d or high_k != -low_k:
            raise MismatchError(
                f"all_reduce: processes hold {-low_d} to {high_d} features and {-low_k} to {high_k} classes"
            )
        n = self._counts.sum().to(torch.float64)
        located = torch.cat([(n * self._mean()), n[None]])
        dist.all_reduce(located, group=group)
        pivot = located[:-1] / located[-1].clamp(min=1)
        # A sum may end in other bits on other ranks; the states add up only about the very same pivot.
        dist.broadcast(pivot, group=group, group_src=0)
        self._shift(pivot)
        packed = torch.cat([self._counts.to(torch.float64), self._sums.flatten(), self._scatter.flatten()])
        dist.all_reduce(packed, group=group)
        counts, sums, scatter = packed[:k], packed[k : k + k * d], packed[k + k * d :]
        self._counts = counts.round().to(torch.int64)
        self._sums, self._scatter = sums.view(k, d).clone(), scatter.view(d, d).clone()
        self._n_at_pivot = int(self._counts.sum())
        return self

    def state_tensors(self) -> dict[str, Tensor]:
        """counts (k,) int64; pivot (d,), sums (k, d) and scatter (d, d) about it, float64: the state itself, not a copy, and
        only until the next update."""
        self._flush()
        return {"counts": self._counts, "pivot": self._pivot, "sums": self._sums, "scatter": self._scatter}

    @classmethod
    @_outside_inference_mode
    def from_state(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Moments on the CPU that hold a copy of `state_tensors()`.

        Raises:
            FormatError: a tensor that is missing, unknown, or of another shape or dtype.
        """
        sums = tensors.get("sums")
        if sums is None or sums.ndim != 2 or 0 in sums.shape:
            raise FormatError(f"moments: expected sums (k, d) among {sorted(tensors)}")
        moments = cls(sums.shape[1], sums.shape[0])
        own = moments.state_tensors()
        expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()}
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != expected:
            raise FormatError(f"moments: expected {expected}, got {found}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        moments._n_at_pivot = int(moments._counts.sum())
        return moments

    @_outside_inference_mode
    def copy(self) -> ClassMoments:
        """An independent copy, equal to the bit."""
        self._flush()
        return copy.deepcopy(self)

    @_outside_inference_mode
    def pooled(self) -> ClassMoments:
        """The moments of the same rows as one class; independent of this."""
        self._flush()
        pooled = ClassMoments(self.n_features, device=self.device, exact=self.exact)
        pooled._counts, pooled._sums = self._counts.sum()[None], self._sums.sum(0, keepdim=True)
        pooled._pivot, pooled._scatter = self._pivot.clone(), self._scatter.clone()
        pooled._n_at_pivot = self._n_at_pivot
        return pooled

    @property
    def n_samples(self) -> int:
        """Rows added so far."""
        return int(self.counts.sum())

    @property
    def counts(self) -> Tensor:
        """Rows of each class, (k,) int64."""
        self._flush()
        return self._counts.clone()

    @property
    def means(self) -> Tensor:
        """Class means (k, d) float64, in the units of x; NaN for a class without rows."""
        self._flush()
        return self._pivot + self._sums / self._counts[:, None]

    def within_scatter(self) -> Tensor:
        """Sum over rows of (x - mean of its class)(x - mean of its class)^T, (d, d) float64, units of x squared.

        The diagonal of a feature that is constant within every class is exactly 0.

        Raises:
            CalibrationError: the squares overflow.
        """
        self._flush()
        # sum_c n_c m_c m_c^T as one product of (k, d) factors, m_c the mean about the pivot.
        scaled = self._sums / self._counts.clamp(min=1).to(torch.float64).sqrt()[:, None]
        within = torch.addmm(self._scatter, scaled.T, scaled, alpha=-1)
        diagonal = within.diagonal()
        # Products of two features are at most their squares.
        if not bool(diagonal.isfinite().all()):
            raise CalibrationError("the squares of the vectors overflow; rescale them")
        # What is left of a feature that only moves between the classes is rounding of the two terms, and of their sums.
        rounding = 256 * torch.finfo(torch.float64).eps * max(1.0, int(self._counts.sum()) / 4096)
        constant = diagonal <= rounding * self._scatter.diagonal()
        if bool(constant.any()):
            within[constant] = 0.0
            within[:, constant] = 0.0
        return within

    def _checked(self, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        x = as_vectors(x, n_features=self.n_features)
        if y is None:
            if self.n_classes > 1:
                raise InputError(f"y: labels are needed for {self.n_classes} classes")
            y = torch.zeros(len(x), dtype=torch.int64)
        y = y.detach() if isinstance(y, Tensor) else as_tensor(y, name="y")
        if y.shape != x.shape[:1]:
            raise InputError(f"y: expected shape ({len(x)},), got {tuple(y.shape)}")
        if len(y) and (y.is_floating_point() or y.is_complex()):
            raise InputError(f"y: expected integer classes, got {y.dtype}")
        y = y.to(torch.int64)
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.n_classes:
            raise InputError(f"y: classes {int(y.min())} to {int(y.max())} are outside 0 to {self.n_classes - 1}")
        return x, y

    @_outside_inference_mode
    def _flush(self) -> None:
        if self._pending:
            x = torch.cat([x for x, _ in self._pending])
            y = torch.cat([y for _, y in self._pending])
            self._accumulate(x, y)
            self._pending, self._n_pending = [], 0

    def _accumulate(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (n, d), n > 0, of classes y; NaN and infinity are refused."""
        pivot = self._pivot_with(_sampled_mean(x).to(self.device) - self._pivot, len(x))
        pieces = zip(torch.split(x, _MOST_ROWS), torch.split(y, _MOST_ROWS), strict=True)
        each = (
            class_scatter(rows.to(self.device), labels.to(self.device), pivot, self.n_classes, self.exact)
            for rows, labels in pieces
        )
        counts, sums, scatter = next(each)
        for more_counts, more_sums, more_scatter in each:
            counts += more_counts
            sums += more_sums
            scatter += more_scatter
        # NaN and infinity pass through the sums, which are needed anyway.
        if not bool(sums.isfinite().all()):
            check_finite(x)
        if self._n_at_pivot == 0:
            self._pivot, self._n_at_pivot = pivot, len(x)
            self._counts, self._sums, self._scatter = counts, sums, scatter
        else:
            self._move_to(pivot, len(x))
            self._add(counts, sums, scatter, 1)

    def _pivot_with(self, mean: Tensor, n: int) -> Tensor:
        """The pivot to have with n more rows, of a mean about the present one: the mean of all when the rows have doubled.

        The rows that chose the pivot may lie far from the others. About the mean of at least half of all rows the
        scatter is at most twice the one about the mean of all, so taking the means out cancels no more than that.
        """
        n_all = int(self._counts.sum()) + n
        if n_all < 2 * self._n_at_pivot:
            return self._pivot
        return self._pivot + (self._sums.sum(0) + n * mean) / n_all

    def _move_to(self, pivot: Tensor, n: int) -> None:
        """Take the pivot that `_pivot_with` has chosen for n more rows."""
        if pivot is not self._pivot:
            self._n_at_pivot = int(self._counts.sum()) + n
            self._shift(pivot)

    def _add(self, counts: Tensor, sums: Tensor, scatter: Tensor, sign: int) -> None:
        self._counts += sign * counts
        self._sums += sign * sums
        self._scatter.add_(scatter, alpha=sign)

    def _mean(self) -> Tensor:
        return self._pivot + self._sums.sum(0) / self._counts.sum().clamp(min=1)

    def _shift(self, pivot: Tensor) -> None:
        if self._counts.any():
            self._sums, left, right = self._about(pivot)
            self._scatter.addmm_(left, right)
        self._pivot = pivot

    def _about(self, pivot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums about another pivot, and what it adds to the scatter, as the factors of a product."""
        return about_another_pivot(self._sums, self._counts, self._pivot - pivot)

    def _check_same_shape(self, other: ClassMoments) -> None:
        if (other.n_features, other.n_classes) != (self.n_features, self.n_classes):
            raise MismatchError(
                f"moments of {other.n_features} features and {other.n_classes} classes cannot be combined with "
                f"{self.n_features} features and {self.n_classes} classes"
            )

    @_outside_inference_mode
    def _combine(self, other: ClassMoments, sign: int) -> Self:
        self._check_same_shape(other)
        self._flush()
        other._flush()
        if other._n_at_pivot == 0:
            return self
        if sign > 0:
            n = int(other._counts.sum())
            self._move_to(self._pivot_with(other._mean().to(self.device) - self._pivot, n), n)
        sums, left, right = other._about(self._pivot.to(other.device))
        self._add(other._counts.to(self.device), sums.to(self.device), other._scatter.to(self.device), sign)
        self._scatter.addmm_(left.to(self.device), right.to(self.device), alpha=sign)
        return self


def _sampled_mean(x: Tensor) -> Tensor:
    """Of rows drawn at random, from all over x (n, d): near that of all, whatever their order. (d,) float64."""
    if len(x) > _SAMPLED_ROWS:
        drawn = torch.randint(len(x), (_SAMPLED_ROWS,), generator=torch.Generator().manual_seed(0), device="cpu")
        x = x[drawn.to(x.device)]
    return x.mean(0, dtype=torch.float64)
