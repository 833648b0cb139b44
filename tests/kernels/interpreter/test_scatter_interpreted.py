"""The scatter kernel in Triton's interpreter, on CPU."""

from __future__ import annotations

import pytest
import torch
from whitenings import draws, gaussian

from rm_ood import ops
from rm_ood.ops import reference, scatter, scatter_launch
from rm_ood.ops.distance_launch import Device


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def error(got, whitening):
    """Spectral error in the whitened metric, relative to n."""
    turned = whitening @ got @ whitening.T
    return torch.linalg.matrix_norm(turned, ord=2).item()


@pytest.mark.parametrize("split_x", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "d", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (3, 2, 63, torch.bfloat16),
        (257, 16, 100, torch.float16),
        (600, 3, 70, torch.float32),
    ],
)
def test_scatter_is_as_accurate_as_float32(n, k, d, dtype, split_x):
    factor, means, _ = gaussian(d, k)
    x = draws(n, factor, means).to(dtype)
    labels = torch.arange(n) % k
    pivot = x.double().mean(0) + 0.3
    counts, sums, got = scatter_launch.launch(x, labels, pivot, k, split_x)
    exact = reference.class_scatter(x.double(), labels, pivot, k)
    plain = reference.class_scatter(x.float(), labels, pivot.float(), k)
    assert torch.equal(counts, exact[0])
    assert [sums.dtype, got.dtype] == [torch.float64, torch.float64]
    scale = exact[2].diagonal().sqrt()
    budget = max(2 * ((plain[2].double() - exact[2]) / torch.outer(scale, scale)).abs().max().item(), 1e-6)
    assert ((got - exact[2]) / torch.outer(scale, scale)).abs().max() <= budget
    # Of n rows a column sum is up to sqrt(n) of its scale.
    assert ((sums - exact[1]) / (scale * n**0.5)).abs().max() <= 1e-6
    assert torch.equal(got, got.T)


def test_precision_of_a_fit():
    factor, means, whitening = gaussian(48, 2)
    x = draws(2048, factor, means).float()
    labels = torch.arange(2048) % 2
    pivot = x.double().mean(0)
    exact = reference.class_scatter(x.double(), labels, pivot, 2)[2]
    for split_x in (True, False):
        got = scatter_launch.launch(x, labels, pivot, 2, split_x)[2]
        assert error(got - exact, whitening.double()) / 2048 <= 1e-3


def test_means_of_many_deviations_strides_and_constant_columns():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, 70, generator=rng) + 3e5
    x[:, 7] = 5.0
    labels = torch.randint(2, (300,), generator=rng)
    pivot = x.double().mean(0)
    exact = reference.class_scatter(x.double(), labels, pivot, 2)
    for variant in (x, x.T.contiguous().T, x.repeat(1, 2)[:, :70]):
        got = scatter_launch.launch(variant, labels, pivot, 2)
        torch.testing.assert_close(got[2], exact[2], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(got[1], exact[1], rtol=1e-5, atol=1e-3)
    assert not got[2][7].any()


def test_shares_of_the_rows_add_up(monkeypatch):
    factor, means, _ = gaussian(20, 2)
    x, labels = draws(1600, factor, means).float(), torch.arange(1600) % 2
    pivot = x.double().mean(0)
    exact = reference.class_scatter(x.double(), labels, pivot, 2)
    for processors in (1, 100):
        monkeypatch.setattr(scatter_launch, "device_of", lambda _, p=processors: Device(90, p))
        counts, sums, got = scatter_launch.launch(x, labels, pivot, 2)
        scale = exact[2].diagonal().sqrt()
        assert torch.equal(counts, exact[0])
        assert ((sums - exact[1]) / (scale * 40)).abs().max() <= 1e-6
        assert ((got - exact[2]) / torch.outer(scale, scale)).abs().max() <= 1e-6


def test_no_rows_and_the_operator(monkeypatch):
    x = torch.randn(40, 9, generator=torch.Generator().manual_seed(1))
    labels, pivot = torch.arange(40) % 2, x.double().mean(0)
    empty = scatter_launch.launch(x[:0], labels[:0], pivot, 2)
    assert [tuple(t.shape) for t in empty] == [(2,), (2, 9), (9, 9)]
    assert not any(t.any() for t in empty)
    monkeypatch.setattr(scatter.scatter_launch, "preferred", lambda *_: True)
    got = torch.ops.rm_ood.class_scatter(x, labels, pivot, 2)
    assert torch.equal(got[2], scatter_launch.launch(x, labels, pivot, 2)[2])
    torch.testing.assert_close(got[2], ops.class_scatter(x, labels, pivot, 2)[2], rtol=1e-5, atol=1e-4)
