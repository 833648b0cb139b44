"""The kernels on a device: the interpreter's matrix again, and what only a device shows."""

from __future__ import annotations

import pytest
import torch
from whitenings import draws, exact, gaussian, in_float32

from rm_ood import ops
from rm_ood.detectors import ContrastedMahalanobis, MahalanobisDetector, NormalisedMahalanobis
from rm_ood.ops import distance_launch, reference, scatter_launch
from rm_ood.ops.packing import MODES, pack

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def check(x, packed, got):
    truth, plain = exact(x, packed), in_float32(x, packed).double()
    budget = torch.maximum(2 * (plain - truth).abs().amax(), 1e-5 * truth)
    assert ((got[0].double() - truth).abs() <= budget).all()
    assert torch.equal(got[1], got[0].amin(2))
    assert torch.equal(got[2], got[0].argmin(2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("n", "d", "k"), [(1, 1, 1), (3, 63, 16), (17, 384, 2), (257, 576, 2), (1000, 1024, 4), (65, 2048, 2)]
)
def test_kernel_is_as_accurate_as_float32(n, d, k, dtype, mode):
    factor, means, whitening = gaussian(d, k)
    x = draws(n, factor, means).to("cuda", dtype)
    packed = pack([(whitening, means)], mode=mode).to("cuda")
    got = ops.packed_sq_distance(x, packed)
    check(x, packed, got)
    again = [ops.packed_sq_distance(x, packed)[0] for _ in range(50)]
    assert all(torch.equal(sq, got[0]) for sq in again), "launches differ: a race"
    factors = torch.full((n,), 0.5, device="cuda")
    hidden = (2 * x)[:, None].expand(n, 3, d)
    rows = torch.arange(n, device="cuda") % 3
    rows[0] = 3
    scaled = ops.packed_sq_distance(hidden, packed, rows=rows, factors=factors)
    assert torch.isposinf(scaled[1][:, 0]).all()
    torch.testing.assert_close(scaled[0][:, 1:], got[0][:, 1:], rtol=1e-4, atol=0)


def test_rows_that_cannot_be_scored_are_infinite():
    factor, means, whitening = gaussian(150, 2)
    packed = pack([(whitening, means)] * 2).to("cuda")
    x = draws(100, factor, means).to("cuda", torch.bfloat16)
    clean = ops.packed_sq_distance(x, packed)[0]
    x[3, 0], x[4, 149] = torch.nan, torch.inf
    sq, _, nearest = ops.packed_sq_distance(x, packed)
    assert torch.isposinf(sq[:, 3:5]).all()
    assert (nearest[:, 3:5] == 0).all()
    others = torch.ones(100, dtype=torch.bool, device="cuda")
    others[3:5] = False
    assert torch.equal(sq[:, others], clean[:, others])


@pytest.mark.parametrize("n", [1, 64, 300])
def test_calls_are_captured_in_a_graph_and_do_not_wait(n):
    factor, means, whitening = gaussian(384, 2)
    packed = pack([(whitening, means)]).to("cuda")
    x = draws(n, factor, means).to("cuda", torch.bfloat16)
    other = draws(n, factor, means, seed=9).to("cuda", torch.bfloat16)
    expected = [ops.packed_sq_distance(v, packed)[0] for v in (x, other)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.packed_sq_distance(x, packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, held = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        sq = ops.packed_sq_distance(held, packed)[0]
    for value, want in zip((x, other), expected, strict=True):
        held.copy_(value)
        graph.replay()
        assert torch.equal(sq, want)
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for _ in range(25):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(ops.packed_sq_distance(x, packed)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(sq, expected[0]) for sq in found), "streams share their tickets"


def test_one_launch_and_tuning():
    factor, means, whitening = gaussian(384, 2)
    packed = pack([(whitening, means)] * 2).to("cuda")
    x = draws(8, factor, means).to("cuda", torch.bfloat16)
    expected = ops.packed_sq_distance(x, packed)[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        ops.packed_sq_distance(x, packed)
        torch.cuda.synchronize()
    kernels = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, kernels
    distance_launch.tune(x, packed)
    torch.testing.assert_close(ops.packed_sq_distance(x, packed)[0], expected, rtol=1e-5, atol=0)


def test_detectors_use_the_kernel():
    rng = torch.Generator().manual_seed(5)
    x, y = torch.randn(600, 48, generator=rng) + 2, torch.arange(600) % 2
    for kind in (MahalanobisDetector, NormalisedMahalanobis, ContrastedMahalanobis):
        detector = kind(shrinkage=0.1).fit(x, y)
        if kind is ContrastedMahalanobis:
            detector.fit_noise(2 * x)
        expected = detector.sq_distances(x)
        assert detector.to("cuda").precision["mode"] == "fp16x2"
        torch.testing.assert_close(detector.sq_distances(x.cuda()).cpu(), expected, rtol=1e-4, atol=0)
    assert ops.backend_info()["cuda"] == "triton"


@pytest.mark.parametrize("split_x", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (257, 100, 16), (5000, 384, 2), (3000, 1024, 2)])
def test_scatter_is_as_accurate_as_float32(n, d, k, dtype, split_x):
    rng = torch.Generator().manual_seed(0)
    x = (torch.randn(n, d, generator=rng) + 3).to("cuda", dtype)
    labels = torch.arange(n, device="cuda") % k
    pivot = x.double().mean(0) + 0.1
    counts, sums, got = scatter_launch.launch(x, labels, pivot, k, split_x)
    truth = reference.class_scatter(x.double(), labels, pivot, k)
    assert torch.equal(counts, truth[0])
    scale = truth[2].diagonal().sqrt()
    assert ((got - truth[2]) / torch.outer(scale, scale)).abs().max() <= 1e-5
    assert ((sums - truth[1]) / (scale * n**0.5)).abs().max() <= 1e-5
    assert torch.equal(scatter_launch.launch(x, labels, pivot, k, split_x)[2], got)
