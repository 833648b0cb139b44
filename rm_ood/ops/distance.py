"""`rm_ood::whitened_sq_distance`: squared Mahalanobis distances to all classes in one pass over x.

The derivation is in ops/README.md. On a GPU the whitening comes packed, and `rm_ood::packed_sq_distance` is one launch.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from rm_ood.ops import distance_launch
from rm_ood.ops.arithmetic import exact_dtype, without_autocast
from rm_ood.ops.packing import Packed, unpack
from rm_ood.ops.triangle import KEPT_ROWS, Triangle, Workspace

# Rows of x at a time, by the most columns, and elsewhere than on a CPU: W is read once for all of them.
_CHUNKS, _CHUNK_ELSEWHERE = ((2048, 512), (math.inf, 1024)), 2048
# Rows times classes times columns up to which the differences of all classes at once are fastest: they stay in cache.
_DIFFERENCES = 2**16
# Least share of |z|^2 + |t_c|^2 that a distance from their expansion may have: what cancels then costs some bits.
_UNCANCELLED = 0.25


def whitened_sq_distance(
    x: Tensor, whitening: Tensor, center: Tensor, class_offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared Mahalanobis distance of each row of `x` to each class: z = W (x - center), d_c = |z - t_c|^2.

    A sum of squares, or what cannot cancel by more than three quarters: never negative. A row with NaN or infinity, or whose
    distance overflows, is +inf to every class it overflows for; other rows do not notice. No gradient flows through.

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
    exact = exact_dtype(x.device.type, whitening.dtype)
    with torch.no_grad():
        triangle = Triangle(whitening.to(exact))
        by_class = triangle_sq_distance(x, triangle, center, class_offsets.to(exact)[:, None])
        sq = by_class.T.to(whitening.dtype).contiguous()
        return sq, sq.amin(1), sq.argmin(1)


def triangle_sq_distance(x: Tensor, whitening: Triangle, center: Tensor, class_offsets: Tensor) -> Tensor:
    """The distances alone, by class (k, n), with W held ready in the dtype of the offsets (k, 1, d).

    No tensor may ask for a gradient.
    """
    device_type = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(device_type):
        with without_autocast(device_type):
            return triangle_sq_distance(x, whitening, center, class_offsets)
    n, d = x.shape
    # Kept memory is for a thread, which on a GPU may feed several streams.
    if n <= KEPT_ROWS and x.is_cpu:
        sq = _squares(whitening.whiten(x, center), class_offsets)
    else:
        chunk = next(rows for most, rows in _CHUNKS if d <= most) if x.is_cpu else _CHUNK_ELSEWHERE
        space = whitening.workspace(min(n, chunk))
        sq = torch.cat([_by_parts(rows, whitening, center, class_offsets, space) for rows in torch.split(x, chunk)], 1)
    # inf - inf and 0 * inf inside the products are NaN; NaN would pass every `score > threshold`.
    return sq.nan_to_num_(torch.inf, torch.inf)


def _by_parts(x: Tensor, whitening: Triangle, center: Tensor, class_offsets: Tensor, space: Workspace) -> Tensor:
    if len(x) != len(space.centred):
        space = whitening.workspace(len(x))
    parts = whitening.parts(x, center, space)
    each = (_squares(z, class_offsets[..., first : first + z.shape[1]]) for first, z in parts)
    # One after the other: a part is overwritten by the next.
    return functools.reduce(Tensor.add_, each)


def _squares(z: Tensor, class_offsets: Tensor) -> Tensor:
    if z.shape[0] * class_offsets.numel() <= _DIFFERENCES:
        differences = z - class_offsets
        squares: Tensor = torch.linalg.vecdot(differences, differences)
        return squares
    # Which rows need their differences is a question to the device: not asked where the answer has to be waited for.
    return _expanded(z, class_offsets) if z.is_cpu else _by_class(z, class_offsets)


def _by_class(z: Tensor, class_offsets: Tensor) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(z - t, dim=1) for t in class_offsets]).square_()


def _expanded(z: Tensor, class_offsets: Tensor) -> Tensor:
    """|z|^2 + |t|^2 - 2 z t, and by differences the pairs that this would cancel too much of, or that it overflows for."""
    least = torch.linalg.vector_norm(z, dim=1).square_() + class_offsets.square().sum(2)
    t = class_offsets[:, 0]
    # The product of so few columns is several times as slow the other way round.
    sq = torch.addmm(least, t, z.T, alpha=-2)
    spare = torch.sub(sq, least, alpha=_UNCANCELLED, out=least)
    # What overflows is NaN here, and so is the smallest of them then.
    if not float(spare.amin()) >= 0:
        n, d = z.shape
        cancelled = (spare >= 0).logical_not_().view(-1).nonzero().view(-1)
        for pairs in torch.split(cancelled, max(1, _DIFFERENCES // d)):
            classes = pairs.div(n, rounding_mode="floor")
            differences = z.index_select(0, pairs - n * classes).sub_(t.index_select(0, classes))
            sq.view(-1).index_copy_(0, pairs, torch.linalg.vector_norm(differences, dim=1).square_())
    return sq


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
