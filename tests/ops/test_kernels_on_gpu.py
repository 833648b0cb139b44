"""The kernels on a device: the interpreter's matrix again, and what only a device shows."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import *  # noqa: F403 - the matrix of both devices
from kernel_cases import check, launched
from whitenings import draws, gaussian

from rm_ood import ops
from rm_ood.detectors import ContrastedMahalanobis, MahalanobisDetector, NormalisedMahalanobis
from rm_ood.ops import distance_launch, reference, scatter_launch
from rm_ood.ops.packing import MODES, pack

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture
def device():
    return "cuda"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 576, 2), (257, 576, 16), (1000, 1024, 4), (65, 2048, 2)])
def test_launches_of_more_work_agree_to_the_bit(n, d, k, dtype, mode):
    factor, means, whitening = gaussian(d, k)
    x = draws(n, factor, means).to("cuda", dtype)
    packed = pack([(whitening, means)], mode=mode)
    check("cuda", x.cpu(), packed, launched("cuda", x, packed))
    there = packed.to("cuda")
    first = ops.packed_sq_distance(x, there)[0]
    again = [ops.packed_sq_distance(x, there)[0] for _ in range(50)]
    assert all(torch.equal(sq, first) for sq in again), "launches differ: a race"


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


def test_graphs_that_replay_at_once_do_not_share_tickets():
    factor, means, whitening = gaussian(384, 2)
    packed = pack([(whitening, means)]).to("cuda")
    inputs = [draws(n, factor, means, seed=n).to("cuda", torch.bfloat16) for n in (1, 2, 40, 200)]
    expected = [ops.packed_sq_distance(x, packed)[0] for x in inputs]
    graphs, results = [], []
    for x in inputs:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(ops.packed_sq_distance(x, packed)[0])
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(sq, want) for sq, want in zip(results, expected, strict=True))


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


def test_scatter_of_means_far_off_strides_and_no_rows():
    rng = torch.Generator().manual_seed(0)
    x = (torch.randn(300, 70, generator=rng) + 3e5).cuda()
    x[:, 7] = 5.0
    labels = torch.randint(2, (300,), generator=rng).cuda()
    pivot = x.double().mean(0)
    truth = reference.class_scatter(x.double(), labels, pivot, 2)
    for variant in (x, x.T.contiguous().T, x.repeat(1, 2)[:, :70]):
        counts, sums, got = scatter_launch.launch(variant, labels, pivot, 2)
        assert torch.equal(counts, truth[0])
        torch.testing.assert_close(got, truth[2], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(sums, truth[1], rtol=1e-5, atol=1e-3)
        assert not got[7].any()
    assert not any(t.any() for t in scatter_launch.launch(x[:0], labels[:0], pivot, 2))
