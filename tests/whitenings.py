"""Gaussians for the tests of the kernels: hostile spectra, means far from 0 in a few features, exact answers."""

from __future__ import annotations

import torch
from torch import Tensor

from rm_ood.ops.packing import Packed, unpack


def gaussian(d: int, k: int, *, condition: float = 1e4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factor (d, d) and class means (k, d), float64, and the float32 whitening; six features lie 50 sd off."""
    rng = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))[0]
    spectrum = torch.logspace(0, torch.tensor(condition).log10().item(), d, dtype=torch.float64)
    factor = torch.linalg.cholesky((turn * spectrum) @ turn.T)
    spread = torch.linalg.vector_norm(factor, dim=1)
    middle = torch.randn(d, generator=rng, dtype=torch.float64) * spread
    middle[torch.randperm(d, generator=rng)[:6]] *= 50
    means = middle + torch.randn(k, d, generator=rng, dtype=torch.float64) @ factor.T
    whitening = torch.linalg.solve_triangular(factor, torch.eye(d, dtype=torch.float64), upper=False)
    return factor, means, whitening.tril().float()


def draws(n: int, factor: Tensor, means: Tensor, *, seed: int = 1) -> Tensor:
    """n rows (n, d) of the Gaussian, float64, the classes in turn."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, factor.shape[0], generator=rng, dtype=torch.float64)
    return means[torch.arange(n) % len(means)] + noise @ factor.T


def exact(x: Tensor, packed: Packed) -> Tensor:
    """(g, n, k) float64 distances under the whitenings that the packed form holds, on the device of x."""
    stored = unpack(packed.tiles, packed.scales, packed.x_scale, dtype=torch.float64)
    z = (x.double() - (0 if packed.center is None else packed.center.double())) @ stored.transpose(1, 2)
    return (z[:, :, None] - packed.shifts.double()[:, None]).square().sum(3)


def in_float32(x: Tensor, packed: Packed) -> Tensor:
    """(g, n, k): the same formula in plain float32 PyTorch."""
    z = (x.float() - (0 if packed.center is None else packed.center)) @ packed.whitenings().transpose(1, 2)
    return (z[:, :, None] - packed.shifts[:, None]).square().sum(3)
