"""The distance and scatter kernels on a GPU: correctness, then time against the device's ceilings, PyTorch and pytorch-ood.

Every shape is checked against float64 first, and 200 launches must give the same bits. Times are replays of a CUDA graph
over copies of W, twice what the second-level cache holds and at least four; `bandwidth` and `rate` are shares, in percent,
of what a copy and a half-precision product reach in the same run. The ratios, how many times faster ours is, are to the best
PyTorch formulation (product and squares in half and single precision, eager and compiled), replayed too, and of a call of
ours to one of pytorch-ood's `predict_features`, in their rows. The span means of an 8B-shaped model's hidden states are
PyTorch's, with their bandwidth.
"""

from __future__ import annotations

import functools
import importlib.metadata
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from device import bandwidth, events_timing, graph_timing, half_rate
from harness import Row, Timing
from peers import pytorch_ood

from rm_ood import ops
from rm_ood.channels import Channel
from rm_ood.hooks import span_mean
from rm_ood.ops import distance_launch, reference, scatter_launch
from rm_ood.ops.packing import MODES, Packed, pack, unpack

TESTS = ("tests/ops/test_packing.py", "tests/ops/test_kernels_on_gpu.py")
# n, d, mode: nine, because each is compiled for some twenty ways.
SHAPES = (
    (1, 1024, "fp16x2"),
    (4096, 1024, "fp16x2"),
    (1, 4096, "fp16x2"),
    (64, 4096, "fp16x2"),
    (4096, 4096, "fp16"),
    (4096, 4096, "fp16x2"),
    (65536, 4096, "fp16x2"),
    (1, 8192, "fp16x2"),
    (65536, 8192, "fp16x2"),
)
CLASSES, COPIES, MOST_COPIES = 2, 4, 64
_FIT_ROWS, _FIT_WIDTH = 65536, 4096


def measure() -> Iterator[Row]:
    """Rows for both kernels; raises where there is no GPU, or a result is wrong."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "the suite kernels needs a GPU; without one, tests/kernels says what the compiler makes of them"
        )
    copy, rate = bandwidth(), half_rate()
    yield _row("device", "copy", "", "uint8", "bandwidth", copy / 1e9, None, "GB/s")
    yield _row("device", "torch.mm", "n=8192", "float16", "rate", rate / 1e12, None, "TFLOP/s")
    for n, d, mode in SHAPES:
        yield from _distances(n, d, mode, copy, rate)
    yield from _scatters()
    yield from _span_means(copy)


def _distances(n: int, d: int, mode: str, copy: float, rate: float) -> Iterator[Row]:
    rng = torch.Generator("cuda").manual_seed(0)
    whitening = torch.randn(d, d, generator=rng, device="cuda").tril_(-1).mul_(0.5 / d**0.5)
    whitening.diagonal().copy_(torch.rand(d, generator=rng, device="cuda") + 1)
    means = torch.randn(CLASSES, d, generator=rng, device="cuda", dtype=torch.float64)
    x = (means[torch.arange(n, device="cuda") % CLASSES] + torch.randn(n, d, generator=rng, device="cuda")).bfloat16()
    packed = pack([(whitening, means)], mode=mode)
    _check(x, packed)
    copies = [packed] + [_copy(packed) for _ in range(_copies(packed.tiles.nbytes) - 1)]
    ours = graph_timing([lambda p=p: ops.packed_sq_distance(x, p) for p in copies])
    distance_launch.tune(x, packed)
    tuned = graph_timing([lambda p=p: ops.packed_sq_distance(x, p) for p in copies])
    shape, dtype = f"n={n} d={d} k={CLASSES}", f"{mode}/bfloat16"
    parts = MODES[mode].parts
    read = packed.tiles.nbytes + x.nbytes
    work = parts * n * d * d
    for name, timing in {"rm_ood": ours, "rm_ood tuned": tuned}.items():
        yield _row("distance", name, shape, dtype, "time", 1e6 * timing.median, timing, "us")
        yield _row("distance", name, shape, dtype, "bandwidth", 100 * read / timing.median / copy, None, "%")
        yield _row("distance", name, shape, dtype, "rate", 100 * work / timing.median / rate, None, "%")
    for name, timing in _by_pytorch(x, whitening, means).items():
        ratio = statistics.median(timing.samples) / ours.median
        yield _row("distance", name, shape, dtype, "time", 1e6 * timing.median, timing, "us", ratio)
    peer = _peer()
    if peer is not None and n <= 4096:
        fit = torch.randn(2 * d, d, generator=rng, device="cuda")
        other = peer(None).fit_features(fit, torch.arange(2 * d, device="cuda") % CLASSES)
        wide = x.float()
        # Calls against calls: the peer cannot be captured in a graph, and gaps between its launches are part of it.
        called = events_timing(lambda: ops.packed_sq_distance(x, packed))
        yield _row("distance", "rm_ood call", shape, dtype, "time", 1e6 * called.median, called, "us")
        timing = events_timing(lambda: other.predict_features(wide))
        name, ratio = f"pytorch-ood {importlib.metadata.version('pytorch-ood')}", timing.median / called.median
        yield _row("distance", name, shape, "float32", "time", 1e6 * timing.median, timing, "us", ratio)


def _copies(size: int) -> int:
    """Of a W of so many bytes, such that a round of them leaves none in the cache."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    return min(MOST_COPIES, max(COPIES, -(-2 * cache // size)))


@functools.cache
def _peer() -> Any:
    """pytorch-ood's detector; None, with a word about it, on machines that do not have it."""
    try:
        return pytorch_ood().Mahalanobis
    except ModuleNotFoundError as error:
        print(f"no rows of pytorch-ood: {error}", file=sys.stderr)
        return None


def _by_pytorch(x: torch.Tensor, whitening: torch.Tensor, means: torch.Tensor) -> dict[str, Timing]:
    """The same distances as products and reductions, in half and in single precision, eager and compiled."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        factor, offsets = whitening.to(dtype), (means @ whitening.double().T).float()
        rows = x.to(dtype)

        def distances(
            rows: torch.Tensor, factor: torch.Tensor, offsets: torch.Tensor = offsets
        ) -> tuple[torch.Tensor, ...]:
            z = (rows @ factor.T).float()
            sq = torch.stack([(z - offset).square().sum(1) for offset in offsets], 1)
            lowest = sq.min(1)
            return sq, lowest.values, lowest.indices

        factors = [factor, *(factor.clone() for _ in range(_copies(factor.nbytes) - 1))]
        # Compiled for this very shape: nothing is left of another, nor made to serve several.
        torch._dynamo.reset()
        for way, call in {"eager": distances, "compiled": torch.compile(distances, dynamic=False)}.items():
            calls: Sequence[Callable[[], object]] = [lambda c=call, f=f, r=rows: c(r, f) for f in factors]
            found[f"torch {str(dtype).removeprefix('torch.')} {way}"] = graph_timing(calls)
    return found


def _check(x: torch.Tensor, packed: Packed) -> None:
    """Against float64 on the first rows; and every launch gives the same bits."""
    part = x[:512]
    stored = unpack(packed.tiles, packed.scales, packed.x_scale, dtype=torch.float64)[0]
    middle = 0 if packed.center is None else packed.center.double()
    z = (part.double() - middle) @ stored.T
    truth = (z[:, None] - packed.shifts[0].double()).square().sum(2)
    first = ops.packed_sq_distance(x, packed)
    worst = float(((first[0][0, :512].double() - truth) / truth).abs().max())
    if not worst <= 1e-5:
        raise RuntimeError(f"{packed.mode}, {tuple(x.shape)}: a distance is off by {worst:.1e}")
    for _ in range(200):
        if not torch.equal(ops.packed_sq_distance(x, packed)[0], first[0]):
            raise RuntimeError(f"{packed.mode}, {tuple(x.shape)}: two launches differ")


def _copy(packed: Packed) -> Packed:
    tiles, scales, shifts = packed.tiles.clone(), packed.scales.clone(), packed.shifts.clone()
    return replace(packed, tiles=tiles, scales=scales, shifts=shifts)


def _scatters() -> Iterator[Row]:
    n, d = _FIT_ROWS, _FIT_WIDTH
    rng = torch.Generator("cuda").manual_seed(0)
    x = (torch.randn(n, d, generator=rng, device="cuda") + 3).bfloat16()
    labels, pivot = torch.arange(n, device="cuda") % CLASSES, torch.full((d,), 3.0, dtype=torch.float64, device="cuda")
    part = slice(0, 4096)
    truth = reference.class_scatter(x[part].double(), labels[part], pivot, CLASSES)[2]
    for split_x, mode in ((True, "fp16x4"), (False, "float32")):
        got = scatter_launch.launch(x[part], labels[part], pivot, CLASSES, split_x)[2]
        worst = float((got - truth).abs().max() / truth.diagonal().max())
        if not worst <= 1e-5:
            raise RuntimeError(f"scatter, {mode}: off by {worst:.1e}")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timing = events_timing(lambda s=split_x: scatter_launch.launch(x, labels, pivot, CLASSES, s), rounds=5)
        peak = torch.cuda.max_memory_allocated() - before
        yield _row(
            "scatter", "rm_ood", f"n={n} d={d} k={CLASSES}", mode, "time", 1e3 * timing.median, timing, "ms", None, peak
        )
    near = pivot.float()
    plain = events_timing(lambda: (centred := x.float() - near).T @ centred, rounds=5)
    exact = events_timing(lambda: ops.class_scatter(x, labels, pivot, CLASSES), rounds=3)
    for name, dtype, timing in (("torch", "float32", plain), ("class_scatter", "float64", exact)):
        yield _row("scatter", name, f"n={n} d={d} k={CLASSES}", dtype, "time", 1e3 * timing.median, timing, "ms")


def _span_means(copy: float) -> Iterator[Row]:
    b, t, h = 8, 512, 4096
    hidden = torch.randn(b, t, h, device="cuda", dtype=torch.bfloat16)
    read_out, half = hidden[:, -1].float(), torch.arange(t, device="cuda") < t // 2
    masks, channel = [half.repeat(b, 1), ~half.repeat(b, 1)], Channel("response", 0.67, "mean")
    timing = graph_timing([lambda: [span_mean(hidden, mask, read_out, channel) for mask in masks]])
    shape = f"batch={b} tokens={t} d={h}"
    yield _row("span_means", "torch", shape, "bfloat16", "time", 1e6 * timing.median, timing, "us")
    # Each vector has to be read once: both spans together are the whole.
    share = 100 * hidden.nbytes / timing.median / copy
    yield _row("span_means", "torch", shape, "bfloat16", "bandwidth", share, None, "%")


def _row(
    op: str,
    provider: str,
    shape: str,
    dtype: str,
    metric: str,
    value: float,
    timing: Timing | None,
    unit: str,
    ratio: float | None = None,
    peak: int | None = None,
) -> Row:
    scale = None if timing is None else value / timing.median
    low, high = (None, None) if timing is None or scale is None else (scale * timing.low, scale * timing.high)
    return Row("kernels", op, provider, shape, dtype, metric, value, low, high, unit, peak, ratio)
