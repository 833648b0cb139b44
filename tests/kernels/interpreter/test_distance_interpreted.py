"""The distance kernel in Triton's interpreter, on CPU: `TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreter`."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import *  # noqa: F403 - the matrix of both devices
from kernel_cases import BF16, check, launched
from whitenings import draws, gaussian

from rm_ood import ops
from rm_ood.detectors import ContrastedMahalanobis, MahalanobisDetector, NormalisedMahalanobis
from rm_ood.ops import distance_launch, metric
from rm_ood.ops.distance_launch import Blocks, Device, Tickets
from rm_ood.ops.packing import pack

# The interpreter is NumPy, which warns of the NaN and infinities that are put in on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")


@pytest.fixture
def device():
    return "cpu"


def test_shared_work_adds_up_in_a_fixed_order(monkeypatch):
    factor, means, whitening = gaussian(260, 2)
    packed = pack([(whitening, means)])
    x = draws(37, factor, means).to(BF16)
    counters = Tickets(torch.device("cpu"))
    monkeypatch.setattr(distance_launch, "tickets", lambda device: counters.take(0))
    results = []
    for processors in (1, 6, 100):
        monkeypatch.setattr(distance_launch, "device_of", lambda _, p=processors: Device(90, p, interpreted=True))
        results.append(launched("cpu", x, packed, blocks=Blocks(16, 32, 4, 3)))
        again = launched("cpu", x, packed, blocks=Blocks(16, 32, 4, 3))
        assert torch.equal(results[-1][0], again[0])
        check("cpu", x, packed, results[-1])
        assert not counters.take(0).any()
    assert not torch.equal(results[0][0], results[2][0]), "the work was not split"


def test_operator_runs_the_kernel(monkeypatch):
    factor, means, whitening = gaussian(40, 2)
    packed = pack([(whitening, means)])
    x = draws(3, factor, means).to(BF16).requires_grad_()
    expected = launched("cpu", x.detach(), packed)
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
    launched("cpu", x, packed)
    launched("cpu", x.float(), packed)
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
