"""Scoring vectors: `MahalanobisDetector.score` beside pytorch-ood's `Mahalanobis.predict_features`, one thread.

Both are fitted on the same rows, without shrinkage, and must agree before they are timed. CPU time, median over
alternating rounds; the ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock

import torch
from harness import Row, alternate

from rm_ood import MahalanobisDetector

TESTS = ("tests/ops/test_distance.py", "tests/detectors/test_mahalanobis.py")
WIDTHS = (384, 1024)
BATCHES = (1, 64, 4096)
CLASSES = 2


def measure() -> Iterator[Row]:
    """Two rows a shape: ours with its ratio, and the peer."""
    torch.set_num_threads(1)
    peer_type = _peer_type()
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


def _peer_type() -> Any:
    # pytorch-ood imports torchvision for its data sets; its Mahalanobis does not use it, so `--no-deps` is enough here.
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Placeholder())
    return importlib.import_module("pytorch_ood.detector").Mahalanobis


class _Placeholder(MetaPathFinder, Loader):
    """Lets `import torchvision...` pass; whatever is taken from it does nothing."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(name=spec.name)

    def exec_module(self, module: Any) -> None:
        pass
