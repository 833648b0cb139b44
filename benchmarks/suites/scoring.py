"""Scoring vectors: `MahalanobisDetector.score` beside pytorch-ood, oodeel, scikit-learn and scipy, on the GPU where there is one.

All have the same covariance, without shrinkage, and must agree, each in its own unit, before they are timed; scikit-learn's
distance is to one mean only. 16 classes lie one standard deviation a feature apart, two coincide nearly, as a reward model's
do. On a CPU one thread and CPU time; on a GPU wall-clock time of a call that is waited for, ours and pytorch-ood's alone.
Median over alternating rounds; the ratio, how many times faster than pytorch-ood, is the median of the rounds' own. On a CPU
also the resident memory that a score of 4,096 vectors adds at its highest, in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import scipy.spatial.distance
import threadpoolctl
import torch
from harness import Row, Timing, alternate, memory_of, waited
from peers import oodeel_mahalanobis, pytorch_ood
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
# n d^2 above which all but pytorch-ood would take the whole run.
_SLOW = 2**32
MEMORY_SHAPE = (4096, 1024, 2)


def measure() -> Iterator[Row]:
    """A row a shape and provider."""
    torch.set_num_threads(1)
    # NumPy's products of the peers too.
    threadpoolctl.threadpool_limits(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for d, k, n_fit, batches in SHAPES:
        found = scorers(d, k, n_fit, device)
        for n in batches:
            yield from _compare(found, vectors(n, d, k=k).to(device), k)
    if device.type == "cpu":
        n, d, k = MEMORY_SHAPE
        for name in found:
            first = f"(scorers({d}, {k}, 8192)[{name!r}].score, vectors({n}, {d}))"
            peak = memory_of("scoring", first, "ready[0](ready[1])")
            yield _row(name, n, d, k, "peak_memory", peak / 2**20, None, None, "MiB", peak_memory=peak)


def vectors(n: int, d: int, *, k: int = 2, seed: int = 1) -> torch.Tensor:
    """Rows (n, d) of k classes in turn."""
    apart = 0.0 if k == 2 else 1.0
    means = apart * torch.randn(k, d, generator=torch.Generator().manual_seed(k))
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 1 + means[torch.arange(n) % k]


def _compare(found: dict[str, Scorer], probe: torch.Tensor, k: int) -> Iterator[Row]:
    n, d = probe.shape
    on_gpu = probe.is_cuda
    compared = {
        name: scorer
        for name, scorer in found.items()
        if name.startswith(("rm_ood", "pytorch-ood")) or (not on_gpu and n * d * d <= _SLOW)
    }
    squares = {name: scorer.in_squares(scorer.score(probe)).to(probe.device) for name, scorer in compared.items()}
    for name, theirs in squares.items():
        _check_agreement(squares["rm_ood"], theirs, exact=not name.startswith("scikit"))
    calls: dict[str, Callable[[], object]] = {
        name: lambda score=scorer.score: score(probe) for name, scorer in compared.items()
    }
    # Seconds a sample, and samples, by what one call takes.
    rounds = 31 if n * d * d <= 2**27 else 5
    timings = alternate(calls, rounds=rounds, seconds=0.02, clock=waited if on_gpu else time.process_time)
    for provider, timing in timings.items():
        numbers = (1e6 * timing.median, 1e6 * timing.low, 1e6 * timing.high)
        metric = "time" if on_gpu else "cpu_time"
        yield _row(provider, n, d, k, metric, *numbers, "us", ratio=_ratio(timings, provider))


def _row(
    provider: str,
    n: int,
    d: int,
    k: int,
    metric: str,
    value: float,
    low: float | None,
    high: float | None,
    unit: str,
    **more: Any,
) -> Row:
    shape = f"n={n} d={d} k={k}"
    return Row("scoring", "whitened_sq_distance", provider, shape, "float32", metric, value, low, high, unit, **more)


def _ratio(timings: dict[str, Timing], provider: str) -> float | None:
    peer = next(name for name in timings if name.startswith("pytorch-ood"))
    return timings[provider].times_faster_than(timings[peer]) if provider != peer else None


class Scorer(NamedTuple):
    """A library's own score of vectors (n, d), and what makes the squared distance to the nearest class of it."""

    score: Callable[[torch.Tensor], Any]
    in_squares: Callable[[Any], torch.Tensor]


def scorers(d: int, k: int, n_fit: int, device: torch.device | str = "cpu") -> dict[str, Scorer]:
    """Each library's scorer, named with its version, from the same fit."""
    x, y = vectors(n_fit, d, k=k, seed=0), torch.arange(n_fit) % k
    ours = MahalanobisDetector(shrinkage=0.0, floor=0.0).fit(x, y).to(device)
    peer = pytorch_ood().Mahalanobis(None).fit_features(x.to(device), y.to(device))
    precision = (ours.whitening_.double().T @ ours.whitening_.double()).cpu().numpy()
    means = ours.means_.cpu().numpy()
    single = EmpiricalCovariance()
    single.location_, single.precision_ = means[0], precision
    other = oodeel_mahalanobis()
    other._classes = ours.classes_
    # Its own pseudo-inverse takes minutes at the largest width.
    other._layer_stats = [(dict(enumerate(ours.means_.cpu().float())), torch.from_numpy(precision).float())]

    def by_scipy(probe: torch.Tensor) -> Any:
        return scipy.spatial.distance.cdist(probe.numpy(), means, "mahalanobis", VI=precision).min(1)

    # pytorch-ood's covariance is a sum, not a mean, and its score is half the distance; oodeel's is half of it as well.
    scale = 2 * (n_fit - k)
    others = {
        "pytorch-ood": Scorer(peer.predict_features, lambda half: scale * half),
        "oodeel": Scorer(lambda probe: other._score_layer(0, probe, {}), lambda half: 2 * torch.from_numpy(half)),
        "scikit-learn": Scorer(lambda probe: single.mahalanobis(probe.numpy()), torch.from_numpy),
        "scipy": Scorer(by_scipy, lambda root: torch.from_numpy(root).square()),
    }
    named = {f"{name} {importlib.metadata.version(name)}": scorer for name, scorer in others.items()}
    return {"rm_ood": Scorer(ours.score, lambda sq: sq), **named}


def _check_agreement(ours: torch.Tensor, theirs: torch.Tensor, *, exact: bool) -> None:
    # A distance to one mean is never below that to the nearest.
    change = (theirs - ours) / ours
    worst = float(change.abs().max() if exact else (-change).max())
    if not worst < 1e-2:
        raise RuntimeError(f"two detectors differ by up to {worst:.1%}: the timings would compare different work")
