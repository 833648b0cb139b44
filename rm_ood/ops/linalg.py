"""Linear algebra of symmetric and triangular matrices, at half of the work of general ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Columns up to which a triangle is inverted at once; of a factor that are made at once, by the most columns of all.
_INVERTED = 128
_FACTORED = ((1024, 96), (math.inf, 192))
# Rows of a sum of products whose part left of the diagonal is one product, and of those that cross the diagonal.
_LEFT, _CROSSING = 512, 24
# Rows that are mirrored at a time.
_MIRRORED = 64


def inverse(factor: Tensor) -> Tensor:
    """The inverse of a lower triangular (d, d) with a positive diagonal, zeros above it: d^3 / 3 operations, not d^3."""
    result = torch.zeros_like(factor, memory_format=torch.contiguous_format)
    _invert(factor, result)
    return result


def _invert(factor: Tensor, result: Tensor) -> None:
    d = len(factor)
    if d <= _INVERTED:
        eye = torch.eye(d, dtype=factor.dtype, device=factor.device)
        result.copy_(torch.linalg.solve_triangular(factor, eye, upper=False).tril())
        return
    half = d // 2
    first, last = slice(None, half), slice(half, None)
    _invert(factor[first, first], result[first, first])
    _invert(factor[last, last], result[last, last])
    # [[A, 0], [B, C]]^-1 has -C^-1 B A^-1 below the diagonal.
    below = torch.linalg.solve_triangular(factor[first, first], factor[last, first], upper=False, left=False)
    result[last, first] = torch.linalg.solve_triangular(factor[last, last], below, upper=False).neg_()


def cholesky_(matrix: Tensor) -> tuple[Tensor, int]:
    """L with L L^T = a symmetric matrix (d, d), contiguous, in its memory; what is above the diagonal of L is undefined.

    By columns, as the solvers take it: the rows of the matrix become its columns.

    Returns:
        L, and 0 or the size of the first leading block that is not positive definite.
    """
    # All of it at once on a GPU. On a CPU torch.linalg clears the other half of a factor more slowly than it computes this
    # one where rows lie a power of two apart in memory; those of a block do not.
    d = len(matrix)
    size = next(columns for most, columns in _FACTORED if d <= most) if matrix.is_cpu else d
    for first in range(0, d, size):
        own, above = slice(first, first + size), slice(None, first)
        beyond = slice(first + size, None)
        left = matrix[above, own].T
        factor, info = torch.linalg.cholesky_ex(matrix[own, own].addmm_(left, left.T, alpha=-1), upper=True)
        if int(info) != 0:
            return matrix.T, first + int(info)
        matrix[own, own] = factor
        rest = matrix[own, beyond].addmm_(left, matrix[above, beyond], alpha=-1)
        matrix[own, beyond] = torch.linalg.solve_triangular(factor.T, rest, upper=False)
    return matrix.T, 0


def lower_products(lower: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The (part, left, right) whose `part += left right` add x^T x of rows x (n, d) to the lower triangle of a (d, d).

    What is above it is undefined then. To be kept while x is filled anew: making them costs up to a fifth of the products.
    """
    d = len(lower)
    # On a GPU each product is a launch.
    size = _CROSSING if lower.is_cpu else _LEFT
    blocks = []
    for start in range(0, d, _LEFT):
        end = min(start + _LEFT, d)
        if start:
            blocks.append((slice(start, end), slice(start)))
        for first in range(start, end, size):
            last = min(first + size, end)
            blocks.append((slice(first, last), slice(start, last)))
    return [(lower[rows, columns], x[:, rows].T, x[:, columns]) for rows, columns in blocks]


def about_another_pivot(sums: Tensor, counts: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class sums (k, d) about the pivot less delta (d,), and what that adds to the scatter, as the factors of a product.

    Args:
        sums, counts: of each class, (k, d) about the pivot, and (k,).
    """
    # t delta^T + delta t^T + n delta delta^T, t the sum and n the number of all rows.
    half = torch.addcmul(sums.sum(0), counts.sum(), delta, value=0.5)
    return sums + counts[:, None] * delta, torch.stack([half, delta], 1), torch.stack([delta, half])


def mirror_(lower: Tensor) -> Tensor:
    """A matrix with its lower triangle above the diagonal as well, in place."""
    # On a GPU each step of the loop would be four launches.
    size = _MIRRORED if lower.is_cpu else len(lower)
    for first in range(0, len(lower), size):
        some = slice(first, first + size)
        lower[:first, some] = lower[some, :first].T
        own = lower[some, some]
        own.tril_().add_(own.tril(-1).T)
    return lower
