"""The distance kernel against float64, for whichever device a suite's fixture `device` names: "cpu" is Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from whitenings import draws, exact, gaussian, in_float32

from rm_ood.ops import distance_launch
from rm_ood.ops.distance_launch import Blocks
from rm_ood.ops.packing import MODES, pack

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# Without an underscore: a star import takes it along.
@pytest.fixture(autouse=True)
def poisoned(device):
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=device).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def launched(device, x, packed, *, rows=None, factors=None, blocks=None):
    """The kernel's results on the CPU, of a launch on the device."""
    packed = packed.to(device)
    form = (packed.tiles, packed.scales, packed.shifts, packed.center)
    rows, factors = (None if given is None else given.to(device) for given in (rows, factors))
    found = distance_launch.launch(x.to(device), *form, rows, factors, packed.x_scale, blocks)
    return tuple(result.cpu() for result in found)


def check(device, x, packed, got, *, near=2e-6):
    """Twice the error of the same formula in float32 PyTorch, or `near` times the distance where that is more."""
    truth, plain = exact(x, packed), in_float32(x, packed).double()
    # Tensor cores add up with fewer bits than float32 has.
    budget = torch.maximum(2 * (plain - truth).abs().amax(), (near if device == "cpu" else 1e-5) * truth)
    assert ((got[0].double() - truth).abs() <= budget).all()
    assert torch.equal(got[1], got[0].amin(2))
    assert torch.equal(got[2], got[0].argmin(2))


def test_outputs_are_poisoned_before_the_kernel_writes_them(device, request):
    assert "poisoned" in request.fixturenames
    assert torch.empty(3, 2, device=device).isnan().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("n", "d", "k", "dtype"),
    [(1, 1, 1, FP32), (1, 384, 2, BF16), (3, 63, 16, FP16), (17, 200, 4, FP32), (257, 130, 1, BF16)],
)
def test_kernel_is_as_accurate_as_float32(device, n, d, k, dtype, mode):
    factor, means, whitening = gaussian(d, k)
    x = draws(n, factor, means).to(dtype)
    packed = pack([(whitening, means)], mode=mode)
    check(device, x, packed, launched(device, x, packed))


@pytest.mark.parametrize(("n", "d", "k"), [(40, 576, 2), (129, 320, 3)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_default_mode_on_wider_vectors(device, n, d, k, dtype):
    factor, means, whitening = gaussian(d, k)
    x = draws(n, factor, means).to(dtype)
    packed = pack([(whitening, means)])
    assert packed.mode == "fp16x2"
    check(device, x, packed, launched(device, x, packed))


def test_width_of_a_large_model(device):
    d, k = 4096, 2
    rng = torch.Generator().manual_seed(0)
    # A whitening by hand: the Gaussian of one this wide takes too long.
    whitening = torch.randn(d, d, generator=rng).tril_(-1).mul_(0.5 / d**0.5)
    whitening.diagonal().copy_(torch.rand(d, generator=rng) + 1)
    means = torch.randn(k, d, generator=rng, dtype=torch.float64)
    packed = pack([(whitening, means)], mode="fp16x2")
    x = (means.repeat(2, 1)[:3] + torch.randn(3, d, generator=rng)).to(BF16)
    check(device, x, packed, launched(device, x, packed, blocks=Blocks(16, 128, 4, 3)))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_uneven_features(device, dtype):
    """One feature a million times as wide as the others: its power of two leaves them half precision's smallest numbers."""
    whitening = torch.eye(64)
    whitening[0, 0] = 1e-6
    means = torch.zeros(1, 64, dtype=torch.float64)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1e6
    x = x.to(dtype)
    packed = pack([(whitening, means)])
    check(device, x, packed, launched(device, x, packed))
    asked = pack([(whitening, means)], mode="fp16x2")
    truth, got = exact(x, asked), launched(device, x, asked)[0].double()
    off = ((got - truth) / truth).abs().max()
    assert off < asked.x_rounding
    # The 8 bits of a bfloat16 fit where the 24 of a float32 do not.
    assert dtype == BF16 or off > 0.01 * asked.x_rounding


@pytest.mark.parametrize("condition", [1e6, 1e10])
def test_nearly_singular_covariance(device, condition):
    factor, means, whitening = gaussian(96, 2, condition=condition)
    x = draws(20, factor, means).to(BF16)
    for mode in ("fp16x2", "bf16x3"):
        packed = pack([(whitening, means)], mode=mode)
        check(device, x, packed, launched(device, x, packed))


def test_strides_and_tokens_of_hidden_states(device):
    factor, means, whitening = gaussian(70, 2)
    packed = pack([(whitening, means)])
    x = draws(24, factor, means).to(device, BF16)
    expected = launched(device, x, packed)
    wide = torch.full((24, 140), torch.nan, dtype=BF16, device=device)
    wide[:, :70] = x
    spread = torch.full((24, 140), torch.nan, dtype=BF16, device=device)
    spread[:, ::2] = x
    for variant in (wide[:, :70], spread[:, ::2], x.T.contiguous().T):
        assert torch.equal(launched(device, variant, packed)[0], expected[0])
    hidden = torch.full((24, 5, 70), torch.nan, dtype=BF16, device=device)
    rows = torch.arange(24, device=device) % 5
    hidden[torch.arange(24, device=device), rows] = x
    assert torch.equal(launched(device, hidden, packed, rows=rows)[0], expected[0])
    rows[3], rows[4] = -1, 5
    sq, lowest, nearest = launched(device, hidden, packed, rows=rows)
    others = ~((rows < 0) | (rows > 4)).cpu()
    assert torch.isposinf(sq[0, ~others]).all()
    assert torch.isposinf(lowest[0, ~others]).all()
    assert (nearest[0, ~others] == 0).all()
    assert torch.equal(sq[0, others], expected[0][0, others])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("mode", ["fp16x2", "bf16x3"])
def test_factors_scale_the_rows(device, dtype, mode):
    factor, means, whitening = gaussian(100, 2, condition=100)
    packed = pack([(whitening, means)], mode=mode)
    scale = torch.rand(9, generator=torch.Generator().manual_seed(2)) + 0.5
    x = (draws(9, factor, means) / scale[:, None]).to(dtype)
    got = launched(device, x, packed, factors=scale)
    check(device, x.double() * scale.double()[:, None], packed, got, near=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [5, 20])
def test_rows_that_cannot_be_scored_are_infinite_and_others_do_not_notice(device, bad, n):
    factor, means, whitening = gaussian(150, 2)
    for mode in MODES:
        packed = pack([(whitening, means)], mode=mode)
        x = draws(n, factor, means).to(BF16)
        clean = launched(device, x, packed)
        for column in (0, 149):
            x[3, column] = bad
        sq, lowest, nearest = launched(device, x, packed)
        assert torch.isposinf(sq[0, 3]).all()
        assert torch.isposinf(lowest[0, 3])
        assert nearest[0, 3] == 0
        others = torch.arange(n) != 3
        assert torch.equal(sq[0, others], clean[0][0, others])


def test_vectors_beyond_the_range_of_the_mode(device):
    factor, means, whitening = gaussian(30, 1)
    x = draws(4, factor, means).float()
    x[1] *= 1e12
    assert torch.isposinf(launched(device, x, pack([(whitening, means)], mode="fp16x2"))[0][0, 1]).all()
    wide = pack([(whitening, means)], mode="bf16x3")
    check(device, x, wide, launched(device, x, wide), near=1e-5)


def test_ties_and_no_rows(device):
    factor, means, whitening = gaussian(20, 1)
    packed = pack([(whitening, means.expand(3, 20))])
    x = draws(6, factor, means).to(BF16)
    assert (launched(device, x, packed)[2] == 0).all()
    assert [tuple(t.shape) for t in launched(device, x[:0], packed)] == [(1, 0, 3), (1, 0), (1, 0)]


def test_several_whitenings_in_one_launch(device):
    d = 90
    one, other = gaussian(d, 2, seed=3), gaussian(d, 1, condition=50, seed=4)
    packed = pack([(one[2], one[1]), (other[2], other[1])])
    x = draws(21, one[0], one[1]).to(BF16)
    got = launched(device, x, packed)
    assert got[0].shape == (2, 21, 2)
    check(device, x, packed, got)
    # A whitening of fewer classes repeats its last one.
    assert torch.equal(got[0][1, :, 0], got[0][1, :, 1])
