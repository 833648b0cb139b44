"""Triton kernel of `whitened_sq_distance`: from raw rows to class distances in one launch. Imported by its launcher alone.

W comes as `rm_ood.ops.packing` lays it out: blocks of 128 rows by 64 columns on and below the diagonal, panel after panel.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Otherwise a batch of one row would be compiled anew.
@triton.jit(do_not_specialize=["n", "n_tokens"])
def distance_kernel(  # pragma: no cover - compiled by Triton, never run by Python
    x,
    rows,
    factors,
    center,
    tiles,
    scales,
    shifts,
    sq,
    lowest,
    nearest,
    partials,
    tickets,
    n,
    d,
    n_tokens,
    item_stride,
    token_stride,
    plane,
    x_scale,
    PANEL: tl.constexpr,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    BM: tl.constexpr,
    BJ: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
    X_PARTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    BULK_COPY: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Program (m, s, g): rows m BM to (m + 1) BM, every SPLIT-th tile row of W_g from s on, their squares summed.

    x: items `item_stride` apart; with `rows` (n,) that token of each, `token_stride` apart. factors: (n,) float32, what a
    row is multiplied by. center: (d,) float32, what is then taken off. tiles: descriptor of (g PARTS plane, WIDTH), blocks
    (BJ, WIDTH), with WIDTH 64 and PANEL 128; the tensor itself without BULK_COPY. scales (g, d), shifts (g, k, d),
    sq (g, n, k), lowest (g, n): float32; nearest (g, n) int64. partials (g, SPLIT, n, K_PAD) float32 and tickets
    (g, row blocks) int32, zero before and after, are unused where SPLIT is 1. WIDEN: for the interpreter, which multiplies
    bfloat16 wrongly.
    """
    m, s, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    item = m * BM + tl.arange(0, BM)
    inside = item < n
    start = item.to(tl.int64) * item_stride
    if HAS_ROWS:
        token = tl.load(rows + item, mask=inside, other=0)
        readable = inside & (token >= 0) & (token < n_tokens)
        start += token.to(tl.int64) * token_stride
    else:
        readable = inside
    factor = tl.full([BM], x_scale, tl.float32)
    if HAS_FACTORS:
        factor *= tl.load(factors + item, mask=inside, other=0.0)
    column = tl.arange(0, WIDTH)
    if BULK_COPY:
        kind = tiles.dtype
    else:
        kind = tiles.dtype.element_ty
        corner = tiles + tl.arange(0, BJ)[:, None] * WIDTH + column[None, :]
    source = x + start[:, None] + column[None, :]
    classes = tl.arange(0, K_PAD)
    total = tl.zeros([BM, K_PAD], tl.float32)

    n_rows = tl.cdiv(d, BJ)
    for turn in range(tl.cdiv(n_rows, SPLIT)):
        # Back and forth over the programs: short tile rows are paired with long ones.
        row = turn * SPLIT + tl.where(turn % 2 == 0, s, SPLIT - 1 - s)
        first = row * BJ
        panel = first // PANEL
        base = g * PARTS * plane + panel * (panel + 1) * PANEL + first % PANEL
        n_blocks = tl.where(row < n_rows, tl.cdiv(tl.minimum(first + BJ, d), WIDTH), 0)
        acc = tl.zeros([BM, BJ], tl.float32)
        for block in range(n_blocks):
            within = readable[:, None] & (block * WIDTH + column < d)[None, :]
            value = tl.load(source + block * WIDTH, mask=within, other=0.0)
            wide = value.to(tl.float32) * factor[:, None]
            if HAS_CENTER:
                middle = tl.load(center + block * WIDTH + column, mask=block * WIDTH + column < d, other=0.0)
                wide -= (middle * x_scale)[None, :]
            x0 = wide.to(kind)
            x1 = x0
            x2 = x0
            if X_PARTS > 1:
                rest = wide - x0.to(tl.float32)
                x1 = rest.to(kind)
                if X_PARTS > 2:
                    x2 = (rest - x1.to(tl.float32)).to(kind)
            for part in tl.static_range(PARTS):
                at = base + part * plane + block * PANEL
                if BULK_COPY:
                    w = tl.trans(tiles.load([at, 0]))
                else:
                    w = tl.trans(tl.load(corner + at.to(tl.int64) * WIDTH))
                acc = _multiply(x0, w, acc, WIDEN)
                # What is dropped is below the last part kept of either side.
                if X_PARTS > 1 and (part + 1 < PARTS or PARTS < X_PARTS):
                    acc = _multiply(x1, w, acc, WIDEN)
                if X_PARTS > 2 and part + 2 < PARTS:
                    acc = _multiply(x2, w, acc, WIDEN)
        j = first + tl.arange(0, BJ)
        scale = tl.load(scales + g * d + j, mask=j < d, other=0.0)
        z = acc * scale[None, :]
        for c in range(K):
            offset = tl.load(shifts + (g * K + c) * d + j, mask=j < d, other=0.0)
            apart = z - offset[None, :]
            total += tl.where(classes[None, :] == c, tl.sum(apart * apart, 1)[:, None], 0.0)

    if SPLIT == 1:
        _finish(total, classes, item, inside, readable, sq, lowest, nearest, n, g, K, K_PAD)
    else:
        spot = item[:, None] * K_PAD + classes[None, :]
        own = partials + (g * SPLIT + s).to(tl.int64) * n * K_PAD
        tl.store(own + spot, total, mask=inside[:, None])
        # Every thread's partial sums are written before one thread tells the others.
        tl.debug_barrier()
        ticket = tickets + g * tl.num_programs(0) + m
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            # In a fixed order: the same bits whoever comes last.
            total = tl.zeros([BM, K_PAD], tl.float32)
            for other in range(SPLIT):
                theirs = partials + (g * SPLIT + other).to(tl.int64) * n * K_PAD
                total += tl.load(theirs + spot, mask=inside[:, None], other=0.0, volatile=True)
            tl.store(ticket, 0)
            _finish(total, classes, item, inside, readable, sq, lowest, nearest, n, g, K, K_PAD)


@triton.jit
def _multiply(a, b, acc, WIDEN: tl.constexpr):  # pragma: no cover - compiled by Triton
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _finish(  # pragma: no cover - compiled by Triton
    total,
    classes,
    item,
    inside,
    readable,
    sq,
    lowest,
    nearest,
    n,
    g,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
):
    # NaN would pass every `score > threshold`; a token that is not there cannot be scored.
    total = tl.where((total == total) & readable[:, None], total, float("inf"))
    total = tl.where(classes[None, :] < K, total, float("inf"))
    least = tl.min(total, 1)
    which = tl.min(tl.where(total == least[:, None], classes[None, :], K_PAD), 1)
    at = g.to(tl.int64) * n + item
    tl.store(sq + at[:, None] * K + classes[None, :], total, mask=inside[:, None] & (classes < K)[None, :])
    tl.store(lowest + at, least, mask=inside)
    tl.store(nearest + at, which.to(tl.int64), mask=inside)
