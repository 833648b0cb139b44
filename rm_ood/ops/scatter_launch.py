"""Launching the scatter kernel, and where it is the better choice: on GPUs whose float64 is slow."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from rm_ood.errors import InputError, MismatchError
from rm_ood.ops.distance_launch import INPUTS, MOST_CLASSES, device_of, unavailable, unsupported
from rm_ood.ops.linalg import about_another_pivot, mirror_

# Columns of a tile, rows at a time, warps, stages. float32 products run outside the tensor cores, in smaller tiles: larger
# ones become TF32 on 10.0.
TILES = {True: (64, 32, 8, 3), False: (32, 32, 4, 2)}
# Rows that are added up in float32 before float64 takes over.
STRETCH = 512
# Compute capabilities with float64 at half of float32's rate: there a plain float64 product is as fast, and exact.
_FLOAT64 = (80, 90, 100)
# Largest |x - pivot| of a column after scaling: half precision ends at 65,504.
_EXPONENT = 15


def preferred(device: torch.device, dtype: torch.dtype, n_classes: int) -> bool:
    """Whether vectors of a dtype go to the kernel on a device, where float64 was not asked for."""
    if device.type != "cuda" or dtype not in INPUTS or n_classes > MOST_CLASSES:
        return False
    return unavailable(device) is None and device_of(device).capability not in _FLOAT64


def launch(
    x: Tensor, labels: Tensor, pivot: Tensor, n_classes: int, split_x: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, sums and scatter as `class_scatter`; float32 inside stretches of 512 rows, float64 across them.

    Args:
        x: (n, d) bfloat16, float16 or float32. labels, pivot, n_classes: as there, n_classes at most 16.
        split_x: products of half-precision parts on tensor cores; else float32.

    Raises:
        MismatchError: labels or a pivot of another size or dtype. InputError: a dtype or a number of classes too large.
    """
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64:
        raise MismatchError(f"labels: expected int64 of shape ({len(x)},), got {labels.dtype} {tuple(labels.shape)}")
    if pivot.shape != x.shape[1:] or pivot.dtype != torch.float64:
        raise MismatchError(f"pivot: expected float64 of shape ({x.shape[1]},), got {pivot.dtype} {tuple(pivot.shape)}")
    if reason := unsupported(x, n_classes):
        raise InputError(f"the scatter kernel takes no {reason}")
    # The kernel takes one step in memory from one to the next.
    labels, pivot = labels.contiguous(), pivot.contiguous()
    kernel = importlib.import_module("rm_ood.ops.scatter_kernel").scatter_kernel
    if x.stride(-1) != 1:
        x = x.contiguous()
    n, d = x.shape
    counts = torch.zeros(n_classes, dtype=torch.int64, device=x.device)
    counts.index_add_(0, labels, torch.ones_like(labels))
    if n == 0:
        return counts, pivot.new_zeros(n_classes, d), pivot.new_zeros(d, d)
    # The kernel's pivot is a float32; the difference to the one that was asked for comes back in at the end.
    near = pivot.float()
    low, high = torch.aminmax(x, dim=0)
    widest = torch.maximum((high - near).abs(), (low - near).abs())
    exponents = _EXPONENT - torch.frexp(widest).exponent
    scales = torch.ldexp(torch.ones_like(near), torch.where(widest > 0, exponents, 0).clamp(-100, 100))
    columns, rows, warps, stages = TILES[split_x]
    across = -(-d // columns)
    tiles = across * (across + 1) // 2
    # Several waves of programs; shares of the rows are added up afterwards, in a fixed order.
    shares = max(1, min(-(-n // STRETCH), 2 * device_of(x.device).processors // tiles))
    scatter = pivot.new_zeros(shares, d, d)
    sums = pivot.new_zeros(shares, n_classes, d)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[(tiles, shares)](
            x,
            labels,
            near,
            scales,
            scatter,
            sums,
            n,
            d,
            x.stride(0),
            K=n_classes,
            K_PAD=max(16, 1 << (n_classes - 1).bit_length()),
            BT=columns,
            BN=rows,
            LONG=STRETCH // rows,
            SPLIT_X=split_x,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
    # In place: of a wide model each (d, d) float64 is a gigabyte.
    whole = scatter[0] if shares == 1 else scatter.sum(0)
    del scatter
    total, left, right = about_another_pivot(sums.sum(0), counts, near.double() - pivot)
    return counts, total, mirror_(whole.addmm_(left, right))
