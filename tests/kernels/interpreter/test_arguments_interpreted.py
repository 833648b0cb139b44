"""What the launchers are given: the kernels read memory as it lies, so they trust nothing of it."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from whitenings import draws, gaussian

from rm_ood.errors import InputError, MismatchError
from rm_ood.ops import distance_launch, reference, scatter_launch
from rm_ood.ops.distance_launch import Device
from rm_ood.ops.packing import pack

BF16 = torch.bfloat16


def launched(x, packed, *, rows=None, factors=None):
    form = (packed.tiles, packed.scales, packed.shifts, packed.center)
    return distance_launch.launch(x, *form, rows, factors, packed.x_scale)[0]


def spread(values):
    """The same values, with others between them in memory."""
    wide = torch.full((len(values), 2), 7).to(values.dtype)
    wide[:, 0] = values
    return wide[:, 0]


def test_strides_of_rows_factors_and_labels():
    factor, means, whitening = gaussian(70, 2)
    packed = pack([(whitening, means)])
    x = draws(20, factor, means).to(BF16)[:, None].repeat(1, 3, 1)
    x[:, 1] *= 2
    rows = torch.arange(20) % 3
    factors = torch.rand(20, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = launched(x, packed, rows=rows, factors=factors)
    assert torch.equal(launched(x, packed, rows=spread(rows), factors=spread(factors)), expected)
    labels = (torch.arange(20) // 3) % 2
    pivot = x[:, 0].double().mean(0)
    counts, sums, scatter = scatter_launch.launch(x[:, 0], spread(labels), spread(pivot), 2)
    truth = reference.class_scatter(x[:, 0].double(), labels, pivot, 2)
    assert torch.equal(counts, truth[0])
    torch.testing.assert_close(sums, truth[1], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scatter, truth[2], rtol=1e-4, atol=1e-1)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"x": torch.zeros(3, 90)}, MismatchError, "x: expected 70 features, got 90"),
        ({"x": torch.zeros(3, 50)}, MismatchError, "x: expected 70 features, got 50"),
        ({"x": torch.zeros(3, 70).double()}, InputError, "no vectors of torch.float64"),
        ({"x": torch.zeros(3, 2, 70)}, InputError, r"expected \(n, d\), or \(n, T, d\) with rows"),
        ({"rows": torch.zeros(3).long()}, InputError, r"expected \(n, d\), or \(n, T, d\) with rows"),
        ({"x": torch.zeros(3, 2, 70), "rows": torch.zeros(3).int()}, MismatchError, "rows: expected torch.int64"),
        ({"x": torch.zeros(3, 2, 70), "rows": torch.zeros(2).long()}, MismatchError, r"rows: .*of shape \(3,\)"),
        ({"factors": torch.ones(3).double()}, MismatchError, "factors: expected torch.float32"),
        ({"factors": torch.ones(3, 1)}, MismatchError, r"factors: expected torch.float32 of shape \(3,\)"),
        ({"factors": torch.ones(3, device="meta")}, MismatchError, "on meta"),
    ],
)
def test_distance_refuses_what_it_would_misread(given, error, message):
    _, means, whitening = gaussian(70, 2)
    with pytest.raises(error, match=message):
        launched(**{"x": torch.zeros(3, 70), "packed": pack([(whitening, means)]), **given})


def test_distance_refuses_more_classes_than_it_has_registers_for():
    _, means, whitening = gaussian(20, 17)
    with pytest.raises(InputError, match="17 classes, more than 16"):
        launched(torch.zeros(1, 20), pack([(whitening, means)]))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"labels": torch.zeros(5).int()}, MismatchError, "labels: expected int64"),
        ({"labels": torch.zeros(4).long()}, MismatchError, r"labels: .* of shape \(5,\)"),
        ({"pivot": torch.zeros(3).double()}, MismatchError, r"pivot: .* of shape \(4,\)"),
        ({"pivot": torch.zeros(4)}, MismatchError, "pivot: expected float64"),
        ({"x": torch.zeros(5, 4).double()}, InputError, "no vectors of torch.float64"),
        ({"n_classes": 17}, InputError, "17 classes, more than 16"),
    ],
)
def test_scatter_refuses_what_it_would_misread(given, error, message):
    good = {"x": torch.zeros(5, 4), "labels": torch.zeros(5).long(), "pivot": torch.zeros(4).double(), "n_classes": 1}
    with pytest.raises(error, match=message):
        scatter_launch.launch(**{**good, **given})


class Held(TorchDispatchMode):
    """The most bytes of large float64 tensors that were held at once."""

    def __init__(self, least):
        super().__init__()
        self.least, self.alive, self.peak = least, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple) else (result,):
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64 and made.numel() >= self.least:
                self.alive.setdefault(made.data_ptr(), []).append((weakref.ref(made), made.untyped_storage().nbytes()))
        sizes = [max((size for ref, size in refs if ref() is not None), default=0) for refs in self.alive.values()]
        self.peak = max(self.peak, sum(sizes))
        return result


def test_scatter_holds_two_matrices_at_most(monkeypatch):
    monkeypatch.setattr(scatter_launch, "device_of", lambda _: Device(90, 1))
    d = 96
    x = torch.randn(40, d, generator=torch.Generator().manual_seed(0))
    with Held(d * d) as held:
        scatter_launch.launch(x, torch.arange(40) % 2, x.double().mean(0), 2)
    assert d * d * 8 <= held.peak <= 2 * d * d * 8
