"""Fitting on vectors: `MahalanobisDetector` beside pytorch-ood, oodeel and two estimators of scikit-learn.

Time: median over alternating rounds, CPU time on one thread (wall-clock of a waited call on a GPU); the ratio is to
pytorch-ood, whose products are float32: ours are float64. Memory: the resident memory that a fit on batches of 512 adds, in
a process of its own.
"""

from __future__ import annotations

import functools
import importlib.metadata
import time
import warnings
from collections.abc import Callable, Iterator

import threadpoolctl
import torch
from harness import Row, alternate, memory_of, waited
from peers import oodeel_mahalanobis, pytorch_ood
from sklearn.covariance import EmpiricalCovariance, LedoitWolf

from rm_ood import ClassMoments, MahalanobisDetector

TESTS = ("tests/ops/test_scatter.py", "tests/ops/test_linalg.py", "tests/test_moments.py")
WIDTHS = (384, 1024, 4096)
ROWS, CLASSES, BATCH = 8192, 2, 512
MEMORY_ROWS = (8192, 98304)
MEMORY_WIDTH = 1024
PROVIDERS = ("rm_ood", "pytorch-ood", "oodeel", "scikit-learn EmpiricalCovariance", "scikit-learn LedoitWolf")


def measure() -> Iterator[Row]:
    """Time a width and provider, then peak memory a number of rows and provider."""
    torch.set_num_threads(1)
    # NumPy's products of the peers too.
    threadpoolctl.threadpool_limits(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for d in WIDTHS:
        x = (torch.randn(ROWS, d, generator=torch.Generator().manual_seed(0)) + 1).to(device)
        y = torch.arange(ROWS, device=device) % CLASSES
        # The others take over a minute at the largest width, and are not made for a GPU.
        names = PROVIDERS if d <= 1024 and device.type == "cpu" else PROVIDERS[:2]
        calls: dict[str, Callable[[], object]] = {name: functools.partial(_fit, name, x, y) for name in names}
        clock = time.process_time if device.type == "cpu" else waited
        timings = alternate(calls, rounds=7 if d <= 1024 else 3, seconds=0, clock=clock)
        for name, timing in timings.items():
            ratio = None if name == "pytorch-ood" else timing.times_faster_than(timings["pytorch-ood"])
            metric = "cpu_time" if device.type == "cpu" else "time"
            seconds = (timing.median, timing.low, timing.high)
            yield _row(name, f"n={ROWS} d={d} k={CLASSES}", metric, *(1e3 * s for s in seconds), "ms", ratio=ratio)
    if device.type == "cpu":
        for n in MEMORY_ROWS:
            for name in PROVIDERS:
                peak = memory_of("fit", f"stream({name!r}, 4096)", f"stream({name!r}, {n})")
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
    package, _, estimator = provider.partition(" ")
    version = "" if package == "rm_ood" else f" {importlib.metadata.version(package)}"
    peak = int(value * 2**20) if metric == "peak_memory" else None
    return Row(
        suite="fit",
        op="class_scatter",
        provider=f"{package}{version} {estimator}".rstrip(),
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
        if provider == "oodeel":
            return oodeel_mahalanobis()._fit_layer(0, x, {"labels": y.numpy()})
        centred = x - torch.stack([x[y == c].mean(0) for c in range(CLASSES)])[y]
        estimator = LedoitWolf if provider.endswith("LedoitWolf") else EmpiricalCovariance
        return estimator(assume_centered=True).fit(centred.numpy())


def stream(provider: str, n: int) -> None:
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
