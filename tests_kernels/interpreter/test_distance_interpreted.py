"""The distance kernel in Triton's interpreter, on CPU: `TRITON_INTERPRET=1 python -m pytest tests_kernels/interpreter`."""

from __future__ import annotations

import pytest
import torch
from whitenings import draws, exact, gaussian, in_float32

from rm_ood import ops
from rm_ood.detectors import ContrastedMahalanobis, MahalanobisDetector, NormalisedMahalanobis
from rm_ood.ops import distance_launch, metric
from rm_ood.ops.distance_launch import Blocks, Device, Tickets
from rm_ood.ops.packing import MODES, pack

# The interpreter is NumPy, which warns of the NaN and infinities that are put in on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def launched(x, packed, *, rows=None, factors=None, blocks=None):
    form = (packed.tiles, packed.scales, packed.shifts, packed.center)
    return distance_launch.launch(x, *form, rows, factors, packed.x_scale, blocks)


def check(x, packed, got, *, near=2e-6):
    """Twice the error of the same formula in float32 PyTorch, or `near` times the distance where that is more."""
    truth, plain = exact(x, packed), in_float32(x, packed).double()
    budget = torch.maximum(2 * (plain - truth).abs().amax(), near * truth)
    assert ((got[0].double() - truth).abs() <= budget).all()
    assert torch.equal(got[1], got[0].amin(2))
    assert torch.equal(got[2], got[0].argmin(2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("n", "d", "k", "dtype"),
    [(1, 1, 1, FP32), (1, 384, 2, BF16), (3, 63, 16, FP16), (17, 200, 4, FP32), (257, 130, 1, BF16)],
)
def test_kernel_is_as_accurate_as_float32(n, d, k, dtype, mode):
    factor, means, whitening = gaussian(d, k)
    x = draws(n, factor, means).to(dtype)
    packed = pack([(whitening, means)], mode=mode)
    check(x, packed, launched(x, packed))


@pytest.mark.parametrize(("n", "d", "k"), [(40, 576, 2), (129, 320, 3)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_default_mode_on_wider_vectors(n, d, k, dtype):
    factor, means, whitening = gaussian(d, k)
    x = draws(n, factor, means).to(dtype)
    packed = pack([(whitening, means)])
    assert packed.mode == "fp16x2"
    check(x, packed, launched(x, packed))


def test_width_of_a_large_model():
    d, k = 4096, 2
    rng = torch.Generator().manual_seed(0)
    # A whitening by hand: the Gaussian of one this wide takes too long.
    whitening = torch.randn(d, d, generator=rng).tril_(-1).mul_(0.5 / d**0.5)
    whitening.diagonal().copy_(torch.rand(d, generator=rng) + 1)
    means = torch.randn(k, d, generator=rng, dtype=torch.float64)
    packed = pack([(whitening, means)], mode="fp16x2")
    x = (means.repeat(2, 1)[:3] + torch.randn(3, d, generator=rng)).to(BF16)
    check(x, packed, launched(x, packed, blocks=Blocks(16, 128, 4, 3)))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_uneven_features(dtype):
    """One feature a million times as wide as the others: its power of two leaves them half precision's smallest numbers."""
    whitening = torch.eye(64)
    whitening[0, 0] = 1e-6
    means = torch.zeros(1, 64, dtype=torch.float64)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1e6
    x = x.to(dtype)
    packed = pack([(whitening, means)])
    check(x, packed, launched(x, packed))
    asked = pack([(whitening, means)], mode="fp16x2")
    truth, got = exact(x, asked), launched(x, asked)[0].double()
    off = ((got - truth) / truth).abs().max()
    assert off < asked.x_rounding
    # The 8 bits of a bfloat16 fit where the 24 of a float32 do not.
    assert dtype == BF16 or off > 0.01 * asked.x_rounding


@pytest.mark.parametrize("condition", [1e6, 1e10])
def test_nearly_singular_covariance(condition):
    factor, means, whitening = gaussian(96, 2, condition=condition)
    x = draws(20, factor, means).to(BF16)
    for mode in ("fp16x2", "bf16x3"):
        packed = pack([(whitening, means)], mode=mode)
        check(x, packed, launched(x, packed))


def test_strides_and_tokens_of_hidden_states():
    factor, means, whitening = gaussian(70, 2)
    packed = pack([(whitening, means)])
    x = draws(24, factor, means).to(BF16)
    expected = launched(x, packed)
    wide = torch.full((24, 140), torch.nan, dtype=BF16)
    wide[:, :70] = x
    spread = torch.full((24, 140), torch.nan, dtype=BF16)
    spread[:, ::2] = x
    for variant in (wide[:, :70], spread[:, ::2], x.T.contiguous().T):
        assert torch.equal(launched(variant, packed)[0], expected[0])
    hidden = torch.full((24, 5, 70), torch.nan, dtype=BF16)
    rows = torch.arange(24) % 5
    hidden[torch.arange(24), rows] = x
    assert torch.equal(launched(hidden, packed, rows=rows)[0], expected[0])
    rows[3], rows[4] = -1, 5
    sq, lowest, nearest = launched(hidden, packed, rows=rows)
    others = ~((rows < 0) | (rows > 4))
    assert torch.isposinf(sq[0, ~others]).all()
    assert torch.isposinf(lowest[0, ~others]).all()
    assert (nearest[0, ~others] == 0).all()
    assert torch.equal(sq[0, others], expected[0][0, others])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("mode", ["fp16x2", "bf16x3"])
def test_factors_scale_the_rows(dtype, mode):
    factor, means, whitening = gaussian(100, 2, condition=100)
    packed = pack([(whitening, means)], mode=mode)
    scale = torch.rand(9, generator=torch.Generator().manual_seed(2)) + 0.5
    x = (draws(9, factor, means) / scale[:, None]).to(dtype)
    got = launched(x, packed, factors=scale)
    check(x.double() * scale.double()[:, None], packed, got, near=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [5, 20])
def test_rows_that_cannot_be_scored_are_infinite_and_others_do_not_notice(bad, n):
    factor, means, whitening = gaussian(150, 2)
    for mode in MODES:
        packed = pack([(whitening, means)], mode=mode)
        x = draws(n, factor, means).to(BF16)
        clean = launched(x, packed)
        for column in (0, 149):
            x[3, column] = bad
        sq, lowest, nearest = launched(x, packed)
        assert torch.isposinf(sq[0, 3]).all()
        assert torch.isposinf(lowest[0, 3])
        assert nearest[0, 3] == 0
        others = torch.arange(n) != 3
        assert torch.equal(sq[0, others], clean[0][0, others])


def test_vectors_beyond_the_range_of_the_mode():
    factor, means, whitening = gaussian(30, 1)
    x = draws(4, factor, means).float()
    x[1] *= 1e12
    assert torch.isposinf(launched(x, pack([(whitening, means)], mode="fp16x2"))[0][0, 1]).all()
    wide = pack([(whitening, means)], mode="bf16x3")
    check(x, wide, launched(x, wide), near=1e-5)


def test_ties_and_no_rows():
    factor, means, whitening = gaussian(20, 1)
    packed = pack([(whitening, means.expand(3, 20))])
    x = draws(6, factor, means).to(BF16)
    assert (launched(x, packed)[2] == 0).all()
    assert [tuple(t.shape) for t in launched(x[:0], packed)] == [(1, 0, 3), (1, 0), (1, 0)]


def test_several_whitenings_in_one_launch():
    d = 90
    one, other = gaussian(d, 2, seed=3), gaussian(d, 1, condition=50, seed=4)
    packed = pack([(one[2], one[1]), (other[2], other[1])])
    x = draws(21, one[0], one[1]).to(BF16)
    got = launched(x, packed)
    assert got[0].shape == (2, 21, 2)
    check(x, packed, got)
    # A whitening of fewer classes repeats its last one.
    assert torch.equal(got[0][1, :, 0], got[0][1, :, 1])


def test_shared_work_adds_up_in_a_fixed_order(monkeypatch):
    factor, means, whitening = gaussian(260, 2)
    packed = pack([(whitening, means)])
    x = draws(37, factor, means).to(BF16)
    counters = Tickets(torch.device("cpu"))
    monkeypatch.setattr(distance_launch, "tickets", lambda device: counters.take(0))
    results = []
    for processors in (1, 6, 100):
        monkeypatch.setattr(distance_launch, "device_of", lambda _, p=processors: Device(90, p, interpreted=True))
        results.append(launched(x, packed, blocks=Blocks(16, 32, 4, 3)))
        again = launched(x, packed, blocks=Blocks(16, 32, 4, 3))
        assert torch.equal(results[-1][0], again[0])
        check(x, packed, results[-1])
        assert not counters.take(0).any()
    assert not torch.equal(results[0][0], results[2][0]), "the work was not split"


def test_operator_runs_the_kernel(monkeypatch):
    factor, means, whitening = gaussian(40, 2)
    packed = pack([(whitening, means)])
    x = draws(3, factor, means).to(BF16).requires_grad_()
    expected = launched(x.detach(), packed)
    got = ops.packed_sq_distance(x, packed)
    assert torch.equal(got[0], expected[0])
    assert not got[0].requires_grad
    assert ops.backend_info()["cpu"] == "triton interpreter"


def test_detectors_score_with_the_kernel_as_without():
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(600, 48, generator=rng) + 2
    y = torch.arange(600) % 2
    probe = torch.randn(9, 48, generator=rng) + 2
    probe[2, 5] = torch.nan
    probe[3] = 0
    noise = torch.randn(600, 48, generator=rng) * 2
    for kind in (MahalanobisDetector, NormalisedMahalanobis, ContrastedMahalanobis):
        single, double = (kind(shrinkage=0.1, dtype=dtype).fit(x, y) for dtype in (torch.float32, torch.float64))
        if kind is ContrastedMahalanobis:
            single.fit_noise(noise)
            double.fit_noise(noise)
        metric.fallbacks.clear()
        got = single.sq_distances(probe)
        assert not metric.fallbacks
        torch.testing.assert_close(got.double(), double.sq_distances(probe), rtol=1e-5, atol=0)
        assert ops.backend_info()["fallbacks"] == "a float64 detector"
        # A second fit is packed anew.
        single.fit(x * 2 + 1, y)
        double.fit(x * 2 + 1, y)
        torch.testing.assert_close(single.score(probe).double(), double.score(probe), rtol=1e-5, atol=0)


def test_what_the_kernel_cannot_take_goes_to_pytorch_and_says_why():
    rng = torch.Generator().manual_seed(6)
    x = torch.randn(200, 5, generator=rng)
    many = MahalanobisDetector(shrinkage=0.1).fit(x, torch.arange(200) % 17)
    metric.fallbacks.clear()
    assert many.score(x).isfinite().all()
    many.score(x.double())
    assert ops.backend_info()["fallbacks"] == "17 classes, more than 16; vectors of torch.float64"


@pytest.mark.parametrize("mode", ["fp16x2", "bf16x3", "fp32"])
def test_tuning_keeps_the_fastest_blocks_that_are_right(mode, monkeypatch):
    factor, means, whitening = gaussian(33, 2)
    packed = pack([(whitening, means)], mode=mode)
    x = draws(3, factor, means).to(BF16)
    errors = pytest.importorskip("triton.runtime.errors")
    candidates = distance_launch.CANDIDATES[packed.tiles.dtype]
    own = distance_launch.blocks_for(Device(90, 4), packed.tiles.dtype, 3, 1)
    wrong, large, wanted = [blocks for blocks in candidates if blocks != own][:3]
    timed, original = [], distance_launch.launch

    def broken(*arguments):
        if arguments[-1] == large:
            raise errors.OutOfResources(300, 200, "shared memory")
        sq, *others = original(*arguments)
        # As far as TF32 is off.
        return (sq * (1 - 1e-3) if arguments[-1] == wrong else sq, *others)

    def measure(call):
        timed.append(call.args[-1])
        call()
        return {wrong: 0.0, wanted: 0.5}.get(call.args[-1], 1.0)

    monkeypatch.setattr(distance_launch, "_tuned", {})
    with monkeypatch.context() as patched:
        patched.setattr(distance_launch, "launch", broken)
        assert distance_launch.tune(x, packed, measure=measure) == wanted
    assert set(timed) == {own, *candidates} - {wrong, large}
    used = []
    monkeypatch.setattr(distance_launch, "split_for", lambda device, blocks, *_: used.append(blocks) or 1)
    launched(x, packed)
    launched(x.float(), packed)
    assert used == [wanted, own]


def test_tickets_are_shared_by_nobody():
    counters = Tickets(torch.device("cpu"))
    first, second = counters.take(7), counters.take(8)
    assert counters.take(7).data_ptr() == first.data_ptr()
    graphs = [counters.take(None) for _ in range(Tickets.ALL - 2)]
    assert len({t.data_ptr() for t in (first, second, *graphs)}) == Tickets.ALL
    spare = counters.take(None)
    assert spare.data_ptr() not in {t.data_ptr() for t in (first, second, *graphs)}
    assert not spare.any()
    assert counters.take(8).data_ptr() == second.data_ptr()
