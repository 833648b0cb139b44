"""Triton kernel of `class_scatter`: class sums and the lower triangle of the scatter. Imported by its launcher alone."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def scatter_kernel(  # pragma: no cover - compiled by Triton, never run by Python
    x,
    labels,
    pivot,
    scales,
    scatter,
    sums,
    n,
    d,
    row_stride,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    LONG: tl.constexpr,
    SPLIT_X: tl.constexpr,
):
    """Program (tile, s): one BT by BT tile on or below the diagonal, over the s-th share of the rows, BN at a time.

    x (n, d), rows `row_stride` apart. labels (n,) int64. pivot, scales (d,) float32, the latter powers of two that take
    the largest |x - pivot| of a column to just below 2^15. scatter (shares, d, d), sums (shares, k, d) float64, about the
    pivot; nothing is written above the diagonal tiles. SPLIT_X: products of two half-precision parts, all four of them, on
    tensor cores; else float32. LONG BN rows are added up in float32, all of them in float64.
    """
    tile, s = tl.program_id(0), tl.program_id(1)
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    left, right = i * BT + tl.arange(0, BT), j * BT + tl.arange(0, BT)
    left_pivot = tl.load(pivot + left, mask=left < d, other=0.0)
    right_pivot = tl.load(pivot + right, mask=right < d, other=0.0)
    left_scale = tl.load(scales + left, mask=left < d, other=1.0)
    right_scale = tl.load(scales + right, mask=right < d, other=1.0)
    classes = tl.arange(0, K_PAD)
    total = tl.zeros([BT, BT], tl.float64)
    by_class = tl.zeros([K_PAD, BT], tl.float64)
    share = tl.cdiv(tl.cdiv(n, BN * LONG), tl.num_programs(1))
    for stretch in range(s * share, (s + 1) * share):
        acc = tl.zeros([BT, BT], tl.float32)
        summed = tl.zeros([K_PAD, BT], tl.float32)
        for part in range(LONG):
            row = (stretch * LONG + part) * BN + tl.arange(0, BN)
            start = (row.to(tl.int64) * row_stride)[:, None]
            inside = (row < n)[:, None]
            a = tl.load(x + start + left[None, :], mask=inside & (left < d)[None, :], other=0.0).to(tl.float32)
            b = tl.load(x + start + right[None, :], mask=inside & (right < d)[None, :], other=0.0).to(tl.float32)
            a = tl.where(inside, (a - left_pivot[None, :]) * left_scale[None, :], 0.0)
            b = tl.where(inside, (b - right_pivot[None, :]) * right_scale[None, :], 0.0)
            member = classes[:, None] == tl.load(labels + row, mask=row < n, other=-1)[None, :]
            if SPLIT_X:
                a0 = a.to(tl.float16)
                b0 = b.to(tl.float16)
                a1 = (a - a0.to(tl.float32)).to(tl.float16)
                b1 = (b - b0.to(tl.float32)).to(tl.float16)
                # The product of the lower parts too: without it the scatter would lose, always in one direction.
                acc = tl.dot(tl.trans(a0), b0, acc)
                acc = tl.dot(tl.trans(a0), b1, acc)
                acc = tl.dot(tl.trans(a1), b0, acc)
                acc = tl.dot(tl.trans(a1), b1, acc)
                summed = tl.dot(member.to(tl.float16), a0, summed)
                summed = tl.dot(member.to(tl.float16), a1, summed)
            else:
                acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
                summed = tl.dot(member.to(tl.float32), a, summed, input_precision="ieee")
        total += acc.to(tl.float64)
        by_class += summed.to(tl.float64)

    total = total / left_scale.to(tl.float64)[:, None] / right_scale.to(tl.float64)[None, :]
    at = (s.to(tl.int64) * d + left[:, None]) * d + right[None, :]
    tl.store(scatter + at, total, mask=(left < d)[:, None] & (right < d)[None, :])
    # Every row of tiles has the sums of its columns; the tile on the diagonal writes them.
    at = (s.to(tl.int64) * K + classes[:, None]) * d + left[None, :]
    mine = (classes < K)[:, None] & (left < d)[None, :] & (i == j)
    tl.store(sums + at, by_class / left_scale.to(tl.float64)[None, :], mask=mine)
