"""Scoring vectors: `MahalanobisDetector.score` beside pytorch-ood's `Mahalanobis.predict_features`, one thread.

Both are fitted on the same rows, without shrinkage, and must agree before they are timed. CPU time, median over
alternating rounds; the ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import torch
from harness import Row, alternate
from peers import pytorch_ood

from rm_ood import MahalanobisDetector

TESTS = ("tests/ops/test_distance.py", "tests/detectors/test_mahalanobis.py")
WIDTHS = (384, 1024)
BATCHES = (1, 64, 4096)
CLASSES = 2


def measure() -> Iterator[Row]:
    """Two rows a shape: ours with its ratio, and the peer."""
    torch.set_num_threads(1)
    peer_type = pytorch_ood().Mahalanobis
    peer_name = f"pytorch-ood {importlib.metadata.version('pytorch-ood')}"
    rng = torch.Generator().manual_seed(0)
    for d in WIDTHS:
        x = torch.randn(10 * d, d, generator=rng) + 1
        y = torch.arange(len(x)) % CLASSES
        ours = MahalanobisDetector(shrinkage=0.0, floor=0.0).fit(x, y)
        peer = peer_type(None).fit_features(x, y)
        for n in BATCHES:
            probe = torch.randn(n, d, generator=rng) + 1
            _check_agreement(ours.score(probe), peer.predict_features(probe), len(x))
            timings = alternate(
                {
                    "rm_ood": lambda ours=ours, probe=probe: ours.score(probe),
                    peer_name: lambda peer=peer, probe=probe: peer.predict_features(probe),
                },
                rounds=31,
                seconds=0.05,
            )
            ratio = timings["rm_ood"].times_faster_than(timings[peer_name])
            for provider, timing in timings.items():
                yield Row(
                    suite="scoring",
                    op="whitened_sq_distance",
                    provider=provider,
                    shape=f"n={n} d={d} k={CLASSES}",
                    dtype="float32",
                    metric="cpu_time",
                    value=1e6 * timing.median,
                    low=1e6 * timing.low,
                    high=1e6 * timing.high,
                    unit="us",
                    ratio=ratio if provider == "rm_ood" else None,
                )


def _check_agreement(ours: torch.Tensor, peer: torch.Tensor, n_fit: int) -> None:
    # The peer's covariance is a sum, not a mean, and its score is half the distance.
    scaled = 2 * (n_fit - CLASSES) * peer
    worst = float(((scaled - ours).abs() / ours).max())
    if not worst < 1e-2:
        raise RuntimeError(f"the two detectors differ by up to {worst:.1%}: the timings would compare different work")
