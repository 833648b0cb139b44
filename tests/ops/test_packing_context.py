"""What surrounds a call must not change what is packed: autocast, gradients, devices, graphs."""

from __future__ import annotations

import threading

import pytest
import torch
from whitenings import gaussian

from rm_ood.ops import distance_launch, scatter_launch
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


@pytest.mark.parametrize("d", [1, 40])
def test_mirror_takes_no_more_than_one_copy(d):
    whole = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lower = whole.tril()
    got = scatter_launch.mirror_(whole)
    assert got.data_ptr() == whole.data_ptr()
    assert torch.equal(got, lower + lower.tril(-1).T)
