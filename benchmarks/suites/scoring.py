"""Scoring vectors: `MahalanobisDetector.score` beside pytorch-ood, scikit-learn and scipy, on the GPU where there is one.

All have the same covariance, without shrinkage, and must agree before they are timed; scikit-learn's distance is to one mean
only. On a CPU one thread and CPU time; on a GPU wall-clock time of a call that is waited for, ours and pytorch-ood's alone.
Median over alternating rounds; the ratio, how many times faster than pytorch-ood, is the median of the rounds' own.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator

import scipy.spatial.distance
import torch
from harness import Row, Timing, alternate
from peers import pytorch_ood
from sklearn.covariance import EmpiricalCovariance

from rm_ood import MahalanobisDetector

TESTS = ("tests/ops/test_distance.py", "tests/detectors/test_mahalanobis.py")
# d, k, rows to fit on, batches.
SHAPES = (
    (384, 2, 3840, (1, 64, 4096)),
    (384, 16, 3840, (1, 64, 4096)),
    (1024, 2, 8192, (1, 64, 4096)),
    (4096, 2, 8192, (1, 64, 4096)),
)
# n d^2 above which peers without tensors would take the whole run.
_SLOW = 2**27


def measure() -> Iterator[Row]:
    """A row a shape and provider."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for d, k, n_fit, batches in SHAPES:
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(n_fit, d, generator=rng) + 1
        y = torch.arange(n_fit) % k
        ours = MahalanobisDetector(shrinkage=0.0, floor=0.0).fit(x, y).to(device)
        others = _peers(x.to(device), y.to(device), ours, k)
        for n in batches:
            probe = torch.randn(n, d, generator=rng).add(1).to(device)
            yield from _compare(ours, others, probe, k)


def _compare(
    ours: MahalanobisDetector, others: dict[str, Callable[[torch.Tensor], torch.Tensor]], probe: torch.Tensor, k: int
) -> Iterator[Row]:
    n, d = probe.shape
    is_small = probe.device.type == "cpu" and n * d * d <= _SLOW
    calls: dict[str, Callable[[], object]] = {"rm_ood": lambda: ours.score(probe)}
    for name, score in others.items():
        if name.startswith("pytorch-ood") or is_small:
            _check_agreement(ours.score(probe), score(probe).to(probe.device), exact=not name.startswith("scikit"))
            calls[name] = lambda score=score: score(probe)
    clock = time.process_time if probe.device.type == "cpu" else _waited
    timings = alternate(calls, rounds=31 if n * d * d <= _SLOW else 9, seconds=0.05, clock=clock)
    for provider, timing in timings.items():
        yield Row(
            suite="scoring",
            op="whitened_sq_distance",
            provider=provider,
            shape=f"n={n} d={d} k={k}",
            dtype="float32",
            metric="cpu_time" if probe.device.type == "cpu" else "time",
            value=1e6 * timing.median,
            low=1e6 * timing.low,
            high=1e6 * timing.high,
            unit="us",
            ratio=_ratio(timings, provider),
        )


def _ratio(timings: dict[str, Timing], provider: str) -> float | None:
    peer = next(name for name in timings if name.startswith("pytorch-ood"))
    return timings[provider].times_faster_than(timings[peer]) if provider != peer else None


def _peers(
    x: torch.Tensor, y: torch.Tensor, ours: MahalanobisDetector, k: int
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Squared distances to the nearest class by the others, from the same fit."""
    peer = pytorch_ood().Mahalanobis(None).fit_features(x, y)
    precision = (ours.whitening_.double().T @ ours.whitening_.double()).cpu().numpy()
    means = ours.means_.cpu().numpy()
    single = EmpiricalCovariance()
    single.location_, single.precision_ = means[0], precision

    def by_scipy(probe: torch.Tensor) -> torch.Tensor:
        apart = scipy.spatial.distance.cdist(probe.numpy(), means, "mahalanobis", VI=precision)
        return torch.from_numpy(apart).square().amin(1)

    named = {"scikit-learn": lambda probe: torch.from_numpy(single.mahalanobis(probe.numpy())), "scipy": by_scipy}
    found = {f"{name} {importlib.metadata.version(name)}": call for name, call in named.items()}
    # The peer's covariance is a sum, not a mean, and its score is half the distance.
    scale = 2 * (len(x) - k)
    ood = f"pytorch-ood {importlib.metadata.version('pytorch-ood')}"
    return {ood: lambda probe: scale * peer.predict_features(probe), **found}


def _check_agreement(ours: torch.Tensor, theirs: torch.Tensor, *, exact: bool) -> None:
    # A distance to one mean is never below that to the nearest.
    change = (theirs - ours) / ours
    worst = float(change.abs().max() if exact else (-change).max())
    if not worst < 1e-2:
        raise RuntimeError(f"two detectors differ by up to {worst:.1%}: the timings would compare different work")


def _waited() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
