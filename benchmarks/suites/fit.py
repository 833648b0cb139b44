"""Fitting on vectors: `MahalanobisDetector` from streamed batches beside pytorch-ood and scikit-learn's LedoitWolf.

Time: median over alternating rounds, CPU time on one thread (wall-clock of a waited call on a GPU); the ratio is to
pytorch-ood. Memory: the resident memory that a fit on batches of 512 adds, in a process of its own.
"""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from harness import Row, alternate
from peers import pytorch_ood
from sklearn.covariance import LedoitWolf

from rm_ood import ClassMoments, MahalanobisDetector

TESTS = ("tests/ops/test_scatter.py", "tests/test_moments.py")
WIDTHS = (384, 1024, 4096)
ROWS, CLASSES, BATCH = 8192, 2, 512
MEMORY_ROWS = (8192, 98304)
MEMORY_WIDTH = 1024
PROVIDERS = ("rm_ood", "pytorch-ood", "scikit-learn")


def measure() -> Iterator[Row]:
    """Time a width and provider, then peak memory a number of rows and provider."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for d in WIDTHS:
        x = (torch.randn(ROWS, d, generator=torch.Generator().manual_seed(0)) + 1).to(device)
        y = torch.arange(ROWS, device=device) % CLASSES
        # scikit-learn takes over a minute at this width, and has no GPU.
        names = [p for p in PROVIDERS if p != "scikit-learn" or (d <= 1024 and device.type == "cpu")]
        calls: dict[str, Callable[[], object]] = {name: functools.partial(_fit, name, x, y) for name in names}
        clock = time.process_time if device.type == "cpu" else _waited
        timings = alternate(calls, rounds=7 if d <= 1024 else 3, seconds=0, clock=clock)
        for name, timing in timings.items():
            ratio = None if name == "pytorch-ood" else timing.times_faster_than(timings["pytorch-ood"])
            metric = "cpu_time" if device.type == "cpu" else "time"
            seconds = (timing.median, timing.low, timing.high)
            yield _row(name, f"n={ROWS} d={d} k={CLASSES}", metric, *(1e3 * s for s in seconds), "ms", ratio=ratio)
    if device.type == "cpu":
        for n in MEMORY_ROWS:
            for name in PROVIDERS:
                peak = _peak_memory(name, n)
                yield _row(name, f"n={n} d={MEMORY_WIDTH} k={CLASSES}", "peak_memory", peak / 2**20, None, None, "MiB")


def _row(
    provider: str,
    shape: str,
    metric: str,
    value: float,
    low: float | None,
    high: float | None,
    unit: str,
    *,
    ratio: float | None = None,
) -> Row:
    version = "" if provider == "rm_ood" else f" {importlib.metadata.version(provider)}"
    peak = int(value * 2**20) if metric == "peak_memory" else None
    return Row(
        suite="fit",
        op="class_scatter",
        provider=provider + version,
        shape=shape,
        dtype="float32",
        metric=metric,
        value=value,
        low=low,
        high=high,
        unit=unit,
        peak_memory=peak,
        ratio=ratio,
    )


def _fit(provider: str, x: torch.Tensor, y: torch.Tensor) -> object:
    """A fitted detector of vectors that are there as a whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if provider == "rm_ood":
            return MahalanobisDetector().fit(x, y)
        if provider == "pytorch-ood":
            return pytorch_ood().Mahalanobis(None).fit_features(x, y)
        centred = x.clone()
        for c in range(CLASSES):
            centred[y == c] -= centred[y == c].mean(0)
        return LedoitWolf(assume_centered=True).fit(centred.numpy())


def _stream(provider: str, n: int) -> None:
    """Fit on batches that come one after the other; what a provider must keep, it keeps."""
    rng = torch.Generator().manual_seed(0)
    batches = ((torch.randn(BATCH, MEMORY_WIDTH, generator=rng) + 1) for _ in range(n // BATCH))
    labels = torch.arange(BATCH) % CLASSES
    if provider == "rm_ood":
        moments = ClassMoments(MEMORY_WIDTH, CLASSES)
        for batch in batches:
            moments.update(batch, labels)
        MahalanobisDetector.from_moments(moments)
    else:
        _fit(provider, torch.cat(list(batches)), labels.repeat(n // BATCH))


def _peak_memory(provider: str, n: int) -> int:
    """Bytes of resident memory that a fit adds at its highest, in a process that has fitted 4,096 rows before."""
    code = (
        "import torch; from suites import fit; torch.set_num_threads(1); fit.pytorch_ood();"
        f"fit._stream({provider!r}, 4096); print(fit._added_memory({provider!r}, {n}))"
    )
    folder = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout)


def _added_memory(provider: str, n: int) -> int:
    """KiB between resident memory now and its peak during a fit."""
    # The peak counts from here; the resource module's would count from the parent of this process.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _kib("VmRSS")
    _stream(provider, n)
    return _kib("VmHWM") - before


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _waited() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
