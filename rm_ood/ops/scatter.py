"""`rm_ood::class_scatter`: counts, sums and the pooled scatter of a batch, in one pass over it (two for float32 products).

The derivation is in ops/README.md. In float64 unless asked otherwise, but on GPUs whose float64 is slow a kernel takes half- and
single-precision vectors where nothing is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rm_ood.ops import scatter_launch
from rm_ood.ops.arithmetic import exact_dtype
from rm_ood.ops.linalg import about_other_pivots, lower_products, mirror_

# Rows that are centred at a time, on a CPU and elsewhere: few for the copy, and enough to pay for the (d, d) sum in memory.
_ROWS, _ROWS_ELSEWHERE = 256, 2048
# Rows that are added up in float32, where that is asked for, before float64 takes over.
_STRETCH = 1024


def class_scatter(
    x: Tensor, labels: Tensor, pivot: Tensor, n_classes: int, products: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, sums and pooled scatter of the rows of `x` about a common pivot, in float64.

    Args:
        x: vectors, (n, d), any floating dtype and strides, finite.
        labels: class of each row, (n,) int64 in [0, n_classes); not checked here.
        pivot: (d,) float64, near the mean: about 0 a mean of 1e5 standard deviations would swallow the spread.
        n_classes: k >= 1.
        products: as of `ClassMoments`.

    Returns:
        Counts (k,) int64; sums of x - pivot per class (k, d) float64, units of x; the sum over all rows of
        (x - pivot)(x - pivot)^T, (d, d) float64, symmetric, units of x squared.
    """
    x = x.detach()
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _forward(x, labels, pivot, n_classes, products)
    result: tuple[Tensor, Tensor, Tensor] = _operator(x, labels, pivot, n_classes, products)
    return result


def _forward(
    x: Tensor, labels: Tensor, pivot: Tensor, n_classes: int, products: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    d = x.shape[1]
    counts = torch.zeros(n_classes, dtype=torch.int64, device=x.device)
    counts.index_add_(0, labels, torch.ones_like(labels))
    sums = pivot.new_zeros(n_classes, d)
    scatter = pivot.new_zeros(d, d)
    device_type = x.device.type
    narrow = products == torch.float32 and x.dtype != torch.float64
    with torch.no_grad():
        # Where PyTorch may round float32 products to fewer bits there is nothing between those and float64.
        if not narrow or exact_dtype(device_type, torch.float32) == torch.float64:
            _add_rows(scatter, sums, x, labels, pivot)
        else:
            # About the means of the classes: what they are apart would leave few digits for what is within them.
            near = (_class_sums(x, labels, n_classes) / counts.clamp(min=1)[:, None]).float()
            for rows, y in zip(torch.split(x, _STRETCH), torch.split(labels, _STRETCH), strict=True):
                some, some_sums = near.new_zeros(d, d), near.new_zeros(n_classes, d)
                _add_rows(some, some_sums, rows, y, near)
                scatter += some
                sums += some_sums
            sums, left, right = about_other_pivots(sums, counts, near.double() - pivot)
            scatter.addmm_(left, right)
    return counts, sums, mirror_(scatter)


def _add_rows(scatter: Tensor, sums: Tensor, x: Tensor, labels: Tensor, pivot: Tensor) -> None:
    """Add rows to the lower triangle of a scatter and to class sums about a pivot (d,), or one of each class (k, d)."""
    size = _ROWS if x.is_cpu else _ROWS_ELSEWHERE
    memory = pivot.new_empty(min(len(x), size), x.shape[1])
    products = lower_products(scatter, memory)
    for rows, y in zip(torch.split(x, size), torch.split(labels, size), strict=True):
        if len(rows) < len(memory):
            memory = memory[: len(rows)]
            products = lower_products(scatter, memory)
        # In two steps: one would convert into memory of its own.
        memory.copy_(rows).sub_(pivot if pivot.ndim == 1 else pivot[y])
        sums.index_add_(0, y, memory)
        for part, left, right in products:
            part.addmm_(left, right)


def _class_sums(x: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    sums = torch.zeros(n_classes, x.shape[1], dtype=torch.float64, device=x.device)
    for rows, y in zip(torch.split(x, _ROWS), torch.split(labels, _ROWS), strict=True):
        sums.index_add_(0, y, rows.double())
    return sums


def _dispatched(
    x: Tensor, labels: Tensor, pivot: Tensor, n_classes: int, products: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if products is None and scatter_launch.preferred(x.device, x.dtype, n_classes):
        return scatter_launch.launch(x, labels, pivot, n_classes)
    return _forward(x, labels, pivot, n_classes, products)


_operator = torch.library.custom_op("rm_ood::class_scatter", _dispatched, mutates_args=())


@_operator.register_fake
def _(
    x: Tensor, labels: Tensor, pivot: Tensor, n_classes: int, products: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    d = x.shape[1]
    return (
        labels.new_empty(n_classes),
        pivot.new_empty(n_classes, d),
        pivot.new_empty(d, d),
    )
