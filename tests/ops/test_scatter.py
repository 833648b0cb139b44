import importlib.metadata
import importlib.util
import types

import pytest
import torch

from rm_ood import ops
from rm_ood.ops import distance_launch, reference, scatter, scatter_launch


def problem(n, k, d, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64) + 3
    return x, torch.randint(k, (n,), generator=rng), x.sum(0) / max(n, 1) + 0.1


@pytest.mark.parametrize(("n", "k", "d"), [(0, 2, 3), (1, 1, 1), (5, 4, 7), (300, 3, 65), (70, 2, 600)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scatter_equals_the_reference(n, k, d, dtype):
    x, labels, pivot = problem(n, k, d)
    x = x.to(dtype)
    got = ops.class_scatter(x, labels, pivot, k)
    exact = reference.class_scatter(x.double(), labels, pivot, k)
    assert [t.dtype for t in got] == [torch.int64, torch.float64, torch.float64]
    assert torch.equal(got[0], exact[0])
    torch.testing.assert_close(got[1], exact[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[2], exact[2], rtol=1e-12, atol=1e-10)
    assert torch.equal(got[2], got[2].T)


def test_batches_longer_than_a_chunk(monkeypatch):
    x, labels, pivot = problem(50, 2, 6)
    whole = ops.class_scatter(x, labels, pivot, 2)
    monkeypatch.setattr(scatter, "_ROWS", 8)
    for part, expected in zip(ops.class_scatter(x, labels, pivot, 2), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)


def test_strides_gradients_and_autocast_do_not_matter():
    x, labels, pivot = problem(40, 2, 9)
    expected = ops.class_scatter(x, labels, pivot, 2)
    for variant in (x.T.contiguous().T, x.repeat(1, 2)[:, :9], x.clone().requires_grad_()):
        torch.testing.assert_close(ops.class_scatter(variant, labels, pivot, 2), expected, rtol=1e-13, atol=1e-13)
    traced = ops.class_scatter(x, labels, pivot.clone().requires_grad_(), 2)
    torch.testing.assert_close(traced, expected)
    assert not any(part.requires_grad for part in traced)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.class_scatter(x.float(), labels, pivot, 2)[2]
    assert torch.equal(got, ops.class_scatter(x.float(), labels, pivot, 2)[2])


@pytest.mark.parametrize("n", [0, 40])
def test_operator_is_registered_correctly(n):
    x, labels, pivot = problem(n, 2, 30)
    for exact in (False, True):
        torch.library.opcheck(torch.ops.rm_ood.class_scatter.default, (x.float(), labels, pivot, 2, exact))
    got = torch.ops.rm_ood.class_scatter(x, labels, pivot, 2)
    assert torch.equal(got[2], ops.class_scatter(x, labels, pivot, 2)[2])


def test_compiles_without_graph_break_and_has_a_fake():
    compiled = torch.compile(ops.class_scatter, fullgraph=True, dynamic=True, backend="aot_eager")
    x, labels, pivot = problem(40, 2, 30)
    torch.testing.assert_close(compiled(x, labels, pivot, 2), ops.class_scatter(x, labels, pivot, 2), rtol=0, atol=0)
    fake = ops.class_scatter(x.to("meta"), labels.to("meta"), pivot.to("meta"), 2)
    assert [tuple(t.shape) for t in fake] == [(2,), (2, 30), (30, 30)]
    assert [t.dtype for t in fake] == [torch.int64, torch.float64, torch.float64]


def test_backend_info_names_what_runs():
    info = ops.backend_info()
    assert info["torch"] == torch.__version__
    assert info["cpu"] == "pytorch"


def test_float64_stays_with_pytorch():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not scatter_launch.preferred(cpu, torch.float32, 2)
    assert not scatter_launch.preferred(gpu, torch.float64, 2)
    assert not scatter_launch.preferred(gpu, torch.float32, 17)


@pytest.mark.parametrize("capability", [80, 89])
def test_the_kernel_is_for_slow_float64_unless_float64_is_asked_for(capability, monkeypatch):
    monkeypatch.setattr(scatter_launch, "unavailable", lambda device: None)
    monkeypatch.setattr(scatter_launch, "device_of", lambda device: types.SimpleNamespace(capability=capability))
    assert scatter_launch.preferred(torch.device("cuda"), torch.float32, 2) == (capability == 89)
    asked = []
    monkeypatch.setattr(scatter_launch, "preferred", lambda *args: asked.append(args) or True)
    monkeypatch.setattr(scatter_launch, "launch", lambda *args: "launched")
    x, labels, pivot = problem(10, 2, 3)
    assert len(scatter._dispatched(x.float(), labels, pivot, 2, exact=True)) == 3
    assert not asked
    assert scatter._dispatched(x.float(), labels, pivot, 2) == "launched"


def test_float64_is_asked_of_the_operator(monkeypatch):
    monkeypatch.setattr(scatter, "_operator", lambda *args: args)
    x, labels, pivot = (part.to("meta") for part in problem(7, 2, 3))
    assert [ops.class_scatter(x, labels, pivot, 2, exact)[-1] for exact in (False, True)] == [False, True]


def test_backend_info_says_that_triton_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", lacking)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ops.backend_info()["triton"] == "not installed"
    # Past the cache, which holds what is true of this process.
    assert distance_launch.unavailable.__wrapped__(torch.device("cpu")) == "triton is not installed"
