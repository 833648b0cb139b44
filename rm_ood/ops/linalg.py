"""Linear algebra of symmetric and triangular matrices, at half of the work of general ones."""

from __future__ import annotations

import torch
from scipy.linalg import blas, lapack
from torch import Tensor

from rm_ood.ops.triangle import BLOCK, block_rows

# Columns up to which a triangle is inverted at once.
_INVERTED = 256


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


def cholesky(matrix: Tensor) -> tuple[Tensor, int]:
    """L with L L^T = a symmetric matrix (d, d), by columns and with anything above its diagonal; and 0, or the size of the
    first leading block that is not positive definite."""
    if not matrix.is_cpu or matrix.dtype != torch.float64:
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor, int(info)
    # torch.linalg clears what is above the diagonal: that takes longer than the factorisation.
    found, info = lapack.dpotrf(matrix.numpy().T, lower=1, clean=0)
    return torch.from_numpy(found), int(info)


def add_products_(lower: Tensor, x: Tensor) -> None:
    """Add x^T x of rows x (n, d) to the lower triangle of a contiguous (d, d); what is above it is undefined then."""
    if not x.is_cpu or x.dtype != torch.float64:
        size = block_rows(len(lower))
        for first in range(0, len(lower), size):
            some = slice(first, first + size)
            lower[some, : first + size].addmm_(x[:, some].T, x[:, : first + size])
    elif len(x):
        # By columns, as BLAS has them, the upper triangle is the lower one by rows.
        blas.dsyrk(1.0, x.numpy().T, 1.0, lower.numpy().T, overwrite_c=1)


def mirror_(lower: Tensor) -> Tensor:
    """A matrix with its lower triangle above the diagonal as well, in place."""
    # On a GPU each step of the loop would be four launches.
    size = BLOCK if lower.is_cpu else len(lower)
    for first in range(0, len(lower), size):
        some = slice(first, first + size)
        lower[:first, some] = lower[some, :first].T
        own = lower[some, some]
        own.tril_().add_(own.tril(-1).T)
    return lower
