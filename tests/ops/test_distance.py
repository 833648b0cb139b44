import pytest
import torch

from rm_ood import ops
from rm_ood.ops import reference


def problem(n, k, d, seed=0):
    """Vectors, a well-conditioned whitening, a centre and offsets, in float64."""
    rng = torch.Generator().manual_seed(seed)
    x, center = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((n, d), (d,)))
    lower = torch.randn(d, d, generator=rng, dtype=torch.float64).tril(-1) / d
    whitening = lower + torch.diag(torch.rand(d, generator=rng, dtype=torch.float64) + 0.5)
    return x + center, whitening, center, torch.randn(k, d, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize(
    ("n", "k", "d"),
    [
        (0, 2, 5),
        (1, 1, 1),
        (1, 2, 600),
        (16, 3, 63),
        (17, 3, 63),
        (257, 1, 129),
        (600, 2, 200),
        (30, 700, 5),
        (2, 9000, 3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_distance_is_as_accurate_as_the_plain_form(n, k, d, dtype):
    x, *state = problem(n, k, d)
    x = x.to(dtype)
    exact = reference.whitened_sq_distance(x.double(), *state)
    single = [t.float() for t in state]
    plain = reference.whitened_sq_distance(x.float(), *single)
    got = ops.whitened_sq_distance(x, *single)
    assert [t.shape for t in got] == [(n, k), (n,), (n,)]
    assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.int64]
    if n == 0:
        return
    # Twice the error of plain float32 PyTorch, plus four ulp of the largest value.
    atol = 2 * (plain[0] - exact[0]).abs().max() + 4 * torch.finfo(torch.float32).eps * exact[0].max()
    torch.testing.assert_close(got[0].double(), exact[0], rtol=0, atol=atol.item())
    assert torch.equal(got[1], got[0].min(1).values)
    assert torch.equal(got[2], exact[2])


def test_float64_whitening_computes_in_float64():
    x, *state = problem(300, 2, 150)
    got = ops.whitened_sq_distance(x, *state)
    exact = reference.whitened_sq_distance(x, *state)
    torch.testing.assert_close(got[0], exact[0], rtol=1e-13, atol=0)
    # A float32 input far from 0 loses nothing more than its own rounding.
    far = (x + 1e5).float()
    state[1] = state[1] + 1e5
    got = ops.whitened_sq_distance(far, *state)
    torch.testing.assert_close(got[0], reference.whitened_sq_distance(far.double(), *state)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [3, 40])
def test_float64_rows_are_centred_before_they_are_rounded(n):
    x, whitening, center, offsets = problem(n, 2, 40)
    shifted = center.float().double() + 2.0**20
    got = ops.whitened_sq_distance(x - center + shifted, whitening.float(), shifted, offsets.float())
    exact = reference.whitened_sq_distance(x - center + shifted, whitening, shifted, offsets)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [5, 40])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 70, 149])
def test_rows_with_nan_or_infinity_score_infinity_and_others_do_not_notice(n, bad, column):
    x, *state = problem(n, 2, 150)
    x, state = x.float(), [t.float() for t in state]
    clean = ops.whitened_sq_distance(x, *state)
    x[3, column] = bad
    sq, lowest, nearest = ops.whitened_sq_distance(x, *state)
    assert torch.isposinf(sq[3]).all()
    assert torch.isposinf(lowest[3])
    assert nearest[3] == 0
    others = torch.arange(n) != 3
    assert torch.equal(sq[others], clean[0][others])


@pytest.mark.parametrize("n", [2, 40])
def test_overflow_is_infinity_and_large_half_precision_is_not(n):
    x, *state = problem(n, 2, 30)
    x[1] = 1e200
    assert torch.isposinf(ops.whitened_sq_distance(x, *[t.float() for t in state])[1][1])
    half = torch.full((n, 30), 60_000.0, dtype=torch.float16)
    got = ops.whitened_sq_distance(half, *[t.float() for t in state])[1]
    exact = reference.whitened_sq_distance(half.double(), *state)[1]
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [4, 100])
def test_distance_is_never_negative_and_zero_at_the_mean(n):
    _, whitening, center, _ = problem(1, 1, 64)
    means = center + 1e3 * torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    offsets = (means - center) @ whitening.T
    x = means[torch.arange(n) % 2]
    sq, lowest, nearest = ops.whitened_sq_distance(x, whitening.float(), center.float(), offsets.float())
    assert (sq >= 0).all()
    assert (lowest < 1e-4 * sq.max()).all()
    assert torch.equal(nearest, torch.arange(n) % 2)


def test_ties_go_to_the_lowest_class():
    x, whitening, center, offsets = problem(20, 1, 8)
    assert (ops.whitened_sq_distance(x, whitening, center, offsets.expand(3, 8))[2] == 0).all()


@pytest.mark.parametrize("n", [3, 40])
def test_strides_and_gradients_do_not_matter(n):
    x, *state = problem(n, 2, 33)
    expected = ops.whitened_sq_distance(x, *state)
    wide = torch.zeros(n, 66, dtype=torch.float64)
    wide[:, ::2] = x
    variants = [wide[:, ::2], x.T.contiguous().T, x.clone().requires_grad_()]
    for variant in variants:
        got = ops.whitened_sq_distance(variant, *state)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-13, atol=0)
        assert not got[0].requires_grad
    repeated = x[:1].expand(n, 33)
    torch.testing.assert_close(ops.whitened_sq_distance(repeated, *state)[1], expected[1][:1].expand(n))


def test_autocast_does_not_lower_the_precision():
    x, *state = problem(40, 2, 64)
    x, state = x.float(), [t.float() for t in state]
    expected = ops.whitened_sq_distance(x, *state)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.whitened_sq_distance(x, *state)[0], expected)


@pytest.mark.parametrize("n", [0, 40])
@pytest.mark.parametrize("grad", [False, True])
def test_operator_is_registered_correctly(n, grad):
    x, *state = problem(n, 2, 30)
    if not grad:  # there is no gradient formula, and the public function detaches
        torch.library.opcheck(torch.ops.rm_ood.whitened_sq_distance.default, (x, *state))
    got = torch.ops.rm_ood.whitened_sq_distance(x.requires_grad_(grad), *state)
    torch.testing.assert_close(got[0].detach(), ops.whitened_sq_distance(x, *state)[0], rtol=0, atol=0)


def test_compiles_without_graph_break():
    def scored(x, *state):
        return ops.whitened_sq_distance(x * 2, *state)[1] + 1

    compiled = torch.compile(scored, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 40):
        x, *state = problem(n, 2, 30)
        got = compiled(x.requires_grad_(), *state)
        assert not got.requires_grad
        torch.testing.assert_close(got, scored(x, *state), rtol=0, atol=0)


def test_meta_tensors_give_shapes_through_the_dispatcher():
    x, *state = (t.to("meta") for t in problem(7, 2, 30))
    assert [tuple(t.shape) for t in ops.whitened_sq_distance(x, *state)] == [(7, 2), (7,), (7,)]
