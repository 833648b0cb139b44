"""What surrounds a call must not change what is packed: autocast, gradients, devices, graphs."""

from __future__ import annotations

import threading

import pytest
import torch
from whitenings import draws, gaussian

from rm_ood import ops
from rm_ood.errors import InputError, MismatchError
from rm_ood.ops import distance_launch, reference
from rm_ood.ops.arithmetic import exact_dtype
from rm_ood.ops.packing import pack
from rm_ood.ops.streams import capturing, settle

CPU = torch.device("cpu")


def test_autocast_and_gradients_do_not_change_the_packed_form():
    _, means, whitening = gaussian(60, 2)
    expected = pack([(whitening, means)])
    with torch.autocast("cpu", torch.bfloat16):
        inside = pack([(whitening.clone().requires_grad_(), means)])
    assert inside.certificate == expected.certificate
    assert torch.equal(inside.shifts, expected.shifts)
    assert not inside.shifts.requires_grad


def test_counters_are_zeroed_before_any_stream_takes_them(monkeypatch):
    monkeypatch.setattr(distance_launch, "_tickets", {})
    settled, taken = [], []

    def waits(device):
        assert device not in distance_launch._tickets, "given out before they are zero"
        settled.append(device)

    monkeypatch.setattr(distance_launch, "settle", waits)
    start = threading.Barrier(8)

    def launches():
        start.wait()
        taken.append(distance_launch.tickets(CPU).data_ptr())

    threads = [threading.Thread(target=launches) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert settled == [CPU]
    assert len(set(taken)) == 1
    # Where there are no streams there is nothing to wait for.
    settle(CPU)
    assert not capturing(CPU)


@pytest.fixture
def _reduced(request):
    """Float32 products in bfloat16, as a training script may ask for; put back as it was."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("_reduced", ["high", "medium"], indirect=True)
@pytest.mark.usefixtures("_reduced")
def test_precision_of_the_process_does_not_reach_a_distance():
    factor, means, whitening = gaussian(384, 2)
    x = draws(40, factor, means).float()
    center = means.mean(0)
    offsets = (means - center) @ whitening.double().T
    truth = reference.whitened_sq_distance(x.double(), whitening.double(), center, offsets)
    center, offsets = center.float(), offsets.float()
    for got in (
        ops.whitened_sq_distance(x, whitening, center, offsets),
        torch.ops.rm_ood.whitened_sq_distance(x, whitening, center, offsets),
    ):
        assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.int64]
        torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-4, atol=0)
        assert torch.equal(got[1], got[0].amin(1))
        assert torch.equal(got[2], got[0].argmin(1))
    x[3] = 1e36
    assert torch.isposinf(ops.whitened_sq_distance(x, whitening, center, offsets)[1][3])
    packed = pack([(whitening, means)])
    torch.testing.assert_close(ops.packed_sq_distance(x[:3], packed)[0][0].double(), truth[0][:3], rtol=1e-4, atol=0)


@pytest.mark.parametrize("_reduced", ["medium"], indirect=True)
@pytest.mark.usefixtures("_reduced")
def test_dtype_that_keeps_a_product_exact():
    assert exact_dtype("cpu", torch.float32) == exact_dtype("cuda", torch.float32) == torch.float64
    assert exact_dtype("cpu", torch.float64) == torch.float64
    torch.set_float32_matmul_precision("highest")
    assert exact_dtype("cpu", torch.float32) == exact_dtype("cuda", torch.float32) == torch.float32


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 90), MismatchError, "x: expected 70 features, got 90"),
        (torch.zeros(3, 70).double(), InputError, "no vectors of torch.float64"),
        (torch.zeros(3, 2, 70), InputError, r"\(n, T, d\) with rows"),
    ],
)
def test_operator_refuses_what_the_kernel_would_misread_without_it_too(x, error, message):
    _, means, whitening = gaussian(70, 2)
    p = pack([(whitening, means)])
    for device in ("cpu", "meta"):
        moved = p.to(device)
        with pytest.raises(error, match=message):
            ops.packed_sq_distance(x.to(device), moved)
