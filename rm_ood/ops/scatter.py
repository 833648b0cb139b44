"""`rm_ood::class_scatter`: counts, sums and the pooled scatter of a batch, in one pass over it.

The derivation is in ops/README.md. In float64, but on GPUs whose float64 is slow a kernel takes half- and single-precision
vectors, unless float64 is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rm_ood.ops import scatter_launch
from rm_ood.ops.linalg import lower_products, mirror_

# Rows that are centred at a time, on a CPU and elsewhere: few for the copy, and enough to pay for the (d, d) sum in memory.
_ROWS, _ROWS_ELSEWHERE = 256, 2048


def class_scatter(
    x: Tensor, labels: Tensor, pivot: Tensor, n_classes: int, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, sums and pooled scatter of the rows of `x` about a common pivot, in float64.

    Args:
        x: vectors, (n, d), any floating dtype and strides, finite.
        labels: class of each row, (n,) int64 in [0, n_classes); not checked here.
        pivot: (d,) float64, near the mean: about 0 a mean of 1e5 standard deviations would swallow the spread.
        n_classes: k >= 1.
        exact: float64 products on every device, as `ClassMoments(exact=)`.

    Returns:
        Counts (k,) int64; sums of x - pivot per class (k, d) float64, units of x; the sum over all rows of
        (x - pivot)(x - pivot)^T, (d, d) float64, symmetric, units of x squared.
    """
    x = x.detach()
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _forward(x, labels, pivot, n_classes)
    result: tuple[Tensor, Tensor, Tensor] = _operator(x, labels, pivot, n_classes, exact)
    return result


def _forward(x: Tensor, labels: Tensor, pivot: Tensor, n_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    d = x.shape[1]
    counts = torch.zeros(n_classes, dtype=torch.int64, device=x.device)
    counts.index_add_(0, labels, torch.ones_like(labels))
    sums = pivot.new_zeros(n_classes, d)
    scatter = pivot.new_zeros(d, d)
    size = _ROWS if x.is_cpu else _ROWS_ELSEWHERE
    with torch.no_grad():
        centred = pivot.new_empty(min(len(x), size), d)
        products = lower_products(scatter, centred)
        for rows, y in zip(torch.split(x, size), torch.split(labels, size), strict=True):
            if len(rows) < len(centred):
                centred = centred[: len(rows)]
                products = lower_products(scatter, centred)
            # In two steps: one would convert into memory of its own.
            centred.copy_(rows).sub_(pivot)
            sums.index_add_(0, y, centred)
            for part, left, right in products:
                part.addmm_(left, right)
    return counts, sums, mirror_(scatter)


def _dispatched(
    x: Tensor, labels: Tensor, pivot: Tensor, n_classes: int, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    if not exact and scatter_launch.preferred(x.device, x.dtype, n_classes):
        return scatter_launch.launch(x, labels, pivot, n_classes)
    return _forward(x, labels, pivot, n_classes)


_operator = torch.library.custom_op("rm_ood::class_scatter", _dispatched, mutates_args=())


@_operator.register_fake
def _(x: Tensor, labels: Tensor, pivot: Tensor, n_classes: int, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    d = x.shape[1]
    return (
        labels.new_empty(n_classes),
        pivot.new_empty(n_classes, d),
        pivot.new_empty(d, d),
    )
