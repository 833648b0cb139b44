"""`rm_ood::whitened_sq_distance`: squared Mahalanobis distances to all classes in one pass over x.

The derivation is in ops/README.md. On a GPU the whitening comes packed, and `rm_ood::packed_sq_distance` is one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rm_ood.ops import distance_launch
from rm_ood.ops.arithmetic import AS_IS, exact_dtype, without_autocast
from rm_ood.ops.packing import Packed, unpack

# 512 rows of x by one block of z stay in the L2 cache.
_CHUNK = 512
# Rows of W at a time, by the most rows of x times classes: for few, call overhead and one read of W are the time, and large
# products win; for many, the triangle that is left out is, and differences that stay in cache.
_BLOCKS = ((32, 512), (256, 256))
_BLOCK = 128
# Rows times classes of one chunk: bounds the (rows, k, block) differences to 8 MiB in float32.
_PAIRS = 8192


def whitened_sq_distance(
    x: Tensor, whitening: Tensor, center: Tensor, class_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared Mahalanobis distance of each row of `x` to each class: z = W (x - center), d_c = |z - t_c|^2.

    Every term is a square, so a distance is never negative. A row with NaN or infinity, or whose distance overflows,
    is +inf to every class it overflows for; other rows do not notice. No gradient flows through.

    Args:
        x: vectors, (n, d), any floating dtype and strides.
        whitening: W, lower triangular, (d, d) float32 or float64; its dtype is that of the computation.
        center: a point near the class means, (d,), in the units of x.
        class_offsets: t_c = W (mean_c - center), (k, d), k >= 1.

    Returns:
        Squared distances (n, k), their minimum (n,), and the class of the minimum (n,) int64 (the lowest index on
        ties and for rows of +inf), dimensionless, in the dtype of `whitening`.
    """
    x = x.detach()
    # The dispatcher costs more than the arithmetic on small batches; on other devices it picks the kernel.
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _forward(x, whitening, center, class_offsets)
    result: tuple[Tensor, Tensor, Tensor] = _operator(x, whitening, center, class_offsets)
    return result


def _forward(x: Tensor, whitening: Tensor, center: Tensor, class_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, k = x.shape[0], class_offsets.shape[0]
    chunk = max(1, min(_CHUNK, _PAIRS // k))
    exact = exact_dtype(x.device.type, whitening.dtype)
    if exact != whitening.dtype:
        sq = _forward(x, whitening.to(exact), center, class_offsets.to(exact))[0].to(whitening.dtype)
        return sq, sq.amin(1), sq.argmin(1)
    with torch.no_grad() if torch.is_grad_enabled() else AS_IS, without_autocast(x.device.type):
        if n <= chunk:
            sq = _sq_distances(x, whitening, center, class_offsets)
        else:
            parts = torch.split(x, chunk)
            sq = torch.cat([_sq_distances(rows, whitening, center, class_offsets) for rows in parts])
        # inf - inf and 0 * inf inside the product are NaN; NaN would pass every `score > threshold`.
        sq.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        return sq, sq.amin(1), sq.argmin(1)


def _sq_distances(x: Tensor, whitening: Tensor, center: Tensor, class_offsets: Tensor) -> Tensor:
    d = x.shape[1]
    # Centred in the wider of the two dtypes: a float64 row far from 0 keeps its digits.
    centred = (x - center).to(whitening.dtype)
    pairs = len(x) * len(class_offsets)
    block = next((block for most, block in _BLOCKS if pairs <= most), _BLOCK)
    if d <= block:
        return _squares(centred, whitening, class_offsets)
    # W is lower triangular: its rows up to `last` have only zeros from column `last` on.
    sq = _squares(centred[:, :block], whitening[:block, :block], class_offsets[:, :block])
    for first in range(block, d, block):
        last = min(first + block, d)
        sq += _squares(centred[:, :last], whitening[first:last, :last], class_offsets[:, first:last])
    return sq


def _squares(centred: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    z = torch.nn.functional.linear(centred, rows)
    # All classes at once: faster than class by class at every size that was measured.
    squares: Tensor = torch.linalg.vector_norm(z.unsqueeze(1) - offsets, dim=2).square_()
    return squares


_operator = torch.library.custom_op("rm_ood::whitened_sq_distance", _forward, mutates_args=())


@_operator.register_fake
def _(x: Tensor, whitening: Tensor, center: Tensor, class_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[0]
    sq = whitening.new_empty(n, class_offsets.shape[0])
    return sq, whitening.new_empty(n), whitening.new_empty(n, dtype=torch.int64)


def packed_sq_distance(
    x: Tensor, packed: Packed, *, rows: Tensor | None = None, factors: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances of each row of `x` to the classes of g packed whitenings, in one launch where a kernel runs.

    z = W_g x with the W_g that the packed form holds, d_gc = |z - t_gc|^2. A row that cannot be scored, or that leaves the
    range of the mode (64 times the fit data's), is +inf.

    Args:
        x: (n, d) bfloat16, float16 or float32, any strides; or (n, T, d) with `rows`.
        packed: from `pack`, on the device of x.
        rows: (n,) int64, the token of each item to take; one outside [0, T) cannot be scored.
        factors: (n,) float32 that the rows are multiplied by first, such as one over their lengths.

    Returns:
        Squared distances (g, n, k), their minimum (g, n), float32, and its class (g, n) int64, as `whitened_sq_distance`.

    Raises:
        MismatchError: another width than that of the whitenings, or rows or factors of another size, dtype or device.
        InputError: a dtype or a number of classes that the kernel does not take; tokens without `rows`, or the reverse.
    """
    result: tuple[Tensor, Tensor, Tensor] = _packed_operator(
        x.detach(), packed.tiles, packed.scales, packed.shifts, packed.center, rows, factors, packed.x_scale
    )
    return result


def _packed(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    shifts: Tensor,
    center: Tensor | None,
    rows: Tensor | None,
    factors: Tensor | None,
    x_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    distance_launch.check(x, scales, shifts, rows, factors)
    if distance_launch.unavailable(x.device) is None:
        return distance_launch.launch(x, tiles, scales, shifts, center, rows, factors, x_scale)
    return emulate(x, tiles, scales, shifts, center, rows, factors, x_scale)


def emulate(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    shifts: Tensor,
    center: Tensor | None,
    rows: Tensor | None,
    factors: Tensor | None,
    x_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel computes, from the packed form, in plain PyTorch: unpacks W in every call, so slow."""
    if rows is not None:
        there = (rows >= 0) & (rows < x.shape[1])
        x = x[torch.arange(len(x), device=x.device), torch.where(there, rows, 0)]
        x = x.masked_fill(~there[:, None], torch.nan)
    x = x.to(scales.dtype)
    if factors is not None:
        x = x * factors[:, None]
    if center is not None:
        x = x - center
    if tiles.dtype == torch.float16:
        x = x.masked_fill((x * x_scale).to(torch.float16).isinf(), torch.inf)
    whitenings = unpack(tiles, scales, x_scale, dtype=scales.dtype)
    each = [_forward(x, w, torch.zeros_like(w[0]), t) for w, t in zip(whitenings, shifts, strict=True)]
    sq, lowest, nearest = zip(*each, strict=True)
    return torch.stack(sq), torch.stack(lowest), torch.stack(nearest)


_packed_operator = torch.library.custom_op("rm_ood::packed_sq_distance", _packed, mutates_args=())


@_packed_operator.register_fake
def _(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    shifts: Tensor,
    center: Tensor | None,
    rows: Tensor | None,
    factors: Tensor | None,
    x_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    distance_launch.check(x, scales, shifts, rows, factors)
    (g, k), n = shifts.shape[:2], x.shape[0]
    return shifts.new_empty(g, n, k), shifts.new_empty(g, n), shifts.new_empty(g, n, dtype=torch.int64)
