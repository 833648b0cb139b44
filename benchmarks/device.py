"""Timing on a GPU: replays of a captured graph, and the ceilings of the device measured in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from harness import Timing


def graph_timing(calls: Sequence[Callable[[], object]], *, rounds: int = 15, seconds: float = 0.005) -> Timing:
    """Seconds of one call, from replays of a CUDA graph that has each of `calls` once.

    Several calls on copies of the same data keep the second-level cache from holding them: what serving finds, where a
    forward pass lies between two calls.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return events_timing(graph.replay, per=len(calls), rounds=rounds, seconds=seconds)


def events_timing(call: Callable[[], object], *, per: int = 1, rounds: int = 15, seconds: float = 0.005) -> Timing:
    """Seconds of one call of `per` that `call` makes, between events on the current stream."""
    call()
    once = _between(call, 1)
    repeats = max(1, round(seconds / max(once, 1e-6)))
    return Timing(tuple(_between(call, repeats) / (repeats * per) for _ in range(rounds)))


def _between(call: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(events_timing(lambda: target.copy_(source)).samples)


def half_rate() -> float:
    """Floating-point operations a second of a large half-precision product."""
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.float16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / statistics.median(events_timing(lambda: torch.mm(a, b, out=out)).samples)
