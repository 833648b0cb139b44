import copy
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from rm_ood.errors import CalibrationError, FormatError, InputError, MismatchError, NonFiniteError
from rm_ood.moments import ClassMoments
from rm_ood.ops import class_scatter


def data(n, d, k, seed=0, mean=0.0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64) * torch.logspace(0, 1, d, dtype=torch.float64) + mean
    return x.to(dtype), torch.randint(k, (n,), generator=rng)


def exact(x, y, k):
    """Counts, means and within scatter in extended precision, two passes."""
    x, y = x.double().numpy().astype(np.longdouble), y.numpy()
    means = np.full((k, x.shape[1]), np.nan)
    within = np.zeros((x.shape[1], x.shape[1]), dtype=np.longdouble)
    for c in np.unique(y):
        mean = x[y == c].mean(0)
        means[c] = mean
        within += (x[y == c] - mean).T @ (x[y == c] - mean)
    return torch.from_numpy(np.bincount(y, minlength=k)), torch.from_numpy(means), torch.from_numpy(within.astype("f8"))


def assert_same(moments, expected, tolerance=1e-10):
    counts, means, within = expected
    assert torch.equal(moments.counts, counts)
    assert moments.n_samples == int(counts.sum())
    scale = within.diagonal().sqrt()
    sd = scale / max(len(scale), int(counts.sum())) ** 0.5
    known = counts > 0
    assert moments.means[~known].isnan().all()
    assert ((moments.means - means)[known].abs() <= tolerance * (sd + means[known].abs())).all()
    assert ((moments.within_scatter() - within).abs() <= tolerance * torch.outer(scale, scale)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_pass_equals_two_passes(dtype):
    x, y = data(300, 6, 3, mean=5.0, dtype=dtype)
    assert_same(ClassMoments(6, 3).update(x, y), exact(x, y, 3))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.lists(st.integers(0, 40), max_size=6), st.randoms())
def test_shards_of_any_size_merge_in_any_order(n, d, k, cuts, random):
    x, y = data(n, d, k, seed=n, mean=100.0)
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]
    shards = [ClassMoments(d, k).update(x[a:b], y[a:b]) for a, b in itertools.pairwise(edges)]
    random.shuffle(shards)
    total = ClassMoments(d, k)
    for shard in shards:
        total.merge(shard)
    whole = ClassMoments(d, k).update(x, y)
    assert_same(total, (whole.counts, whole.means, whole.within_scatter()))
    assert_same(total, exact(x, y, k))


@pytest.mark.parametrize("batch", [1, 7, 400])
def test_mean_of_3e5_standard_deviations_keeps_the_spread(batch):
    x, y = data(400, 4, 2, mean=3e5)
    moments, halves = ClassMoments(4, 2), [ClassMoments(4, 2), ClassMoments(4, 2)]
    for i in range(0, 400, batch):
        moments.update(x[i : i + batch], y[i : i + batch])
        halves[(i // batch) % 2].update(x[i : i + batch], y[i : i + batch])
    assert_same(moments, exact(x, y, 2))
    assert_same(halves[0].merge(halves[1]), exact(x, y, 2))


def test_a_first_row_far_away_costs_no_digits_later():
    x, y = data(20_000, 3, 1)
    outlier = torch.full((1, 3), 1e6, dtype=torch.float64)
    moments = ClassMoments(3).update(outlier)
    assert moments.n_samples == 1  # flushed: the outlier is the pivot now
    for i in range(0, 20_000, 2500):
        moments.update(x[i : i + 2500])
    x, y = torch.cat([outlier, x]), torch.cat([y[:1], y])
    assert_same(moments, exact(x, y, 1), tolerance=1e-13)


def test_row_order_and_duplicates():
    x, y = data(200, 5, 2)
    moments = ClassMoments(5, 2).update(x, y)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    expected = moments.counts, moments.means, moments.within_scatter()
    assert_same(ClassMoments(5, 2).update(x[order], y[order]), expected, tolerance=1e-12)
    twice = ClassMoments(5, 2).update(x, y).update(x, y)
    assert_same(twice, (2 * expected[0], expected[1], 2 * expected[2]), tolerance=1e-12)


def test_small_batches_are_held_back_and_copied():
    moments = ClassMoments(2)
    buffer = torch.ones(4, 2)
    moments.update(buffer)
    buffer.fill_(3.0)
    moments.update(buffer)
    buffer.fill_(100.0)
    assert moments.means.tolist() == [[2.0, 2.0]]
    assert moments.within_scatter().tolist() == [[8.0, 8.0], [8.0, 8.0]]


def test_held_back_rows_are_bounded():
    x, y = data(5000, 2, 2, dtype=torch.float32)
    moments = ClassMoments(2, 2)
    for i in range(0, 5000, 1000):
        moments.update(x[i : i + 1000], y[i : i + 1000])
        assert moments._n_pending <= 2000
    assert_same(moments, exact(x, y, 2))


def test_results_are_copies():
    moments = ClassMoments(2, 2).update(*data(10, 2, 2))
    before = copy.deepcopy(moments)
    moments.counts.zero_()
    moments.means.zero_()
    moments.within_scatter().zero_()
    assert_same(moments, (before.counts, before.means, before.within_scatter()), tolerance=0)


def test_copy_is_equal_to_the_bit_and_independent():
    x, y = data(50, 3, 2)
    moments = ClassMoments(3, 2).update(x[:20], y[:20]).update(x[20:30], y[20:30])
    twin = moments.copy()
    assert torch.equal(twin.within_scatter(), moments.within_scatter())
    twin.update(x[30:], y[30:])
    assert (moments.n_samples, twin.n_samples) == (30, 50)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(1, 4), st.integers(0, 60), st.integers(0, 2**16))
def test_pooled_moments_are_those_of_one_class(k, n, seed):
    x, y = data(n, 3, k, seed)
    moments = ClassMoments(3, k).update(x, y)
    pooled = moments.pooled()
    alone = ClassMoments(3).update(x)
    assert (pooled.n_classes, pooled.n_samples) == (1, n)
    torch.testing.assert_close(pooled.means, alone.means, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(pooled.within_scatter(), alone.within_scatter(), rtol=1e-9, atol=1e-9)
    pooled.update(x + 5)
    torch.testing.assert_close(pooled.within_scatter(), alone.update(x + 5).within_scatter(), rtol=1e-9, atol=1e-9)
    # Neither follows the other, a row that moves no pivot included, and the pooled ones add up like any.
    if n:
        assert moments.pooled().update(x[:1] + 1).n_samples == n + 1
        torch.testing.assert_close(moments.within_scatter(), exact(x, y, k)[2], rtol=1e-9, atol=1e-9)
        joined = ClassMoments(3).merge(moments.pooled())
        torch.testing.assert_close(joined.means, x.mean(0)[None], rtol=1e-9, atol=1e-9)
    assert moments.n_samples == n


def test_arrays_integers_and_empty_batches_are_accepted():
    moments = ClassMoments(2, 2).update(np.array([[1, 2], [3, 4]]), np.array([1, 0]))
    moments.update(np.zeros((0, 2)), np.zeros(0, dtype=int))
    assert moments.means.tolist() == [[3, 4], [1, 2]]


def test_features_without_variance_are_exactly_zero():
    x, _ = data(500, 4, 1, mean=0.1)
    x[:, 1] = 0.1
    y = torch.arange(500) % 2
    x[:, 2] = torch.where(y == 0, 0.1, 1.7)  # constant within each class only
    moments = ClassMoments(4, 2)
    for i in range(0, 500, 7):
        moments.merge(ClassMoments(4, 2).update(x[i : i + 7], y[i : i + 7]))
    within = moments.within_scatter()
    assert (within[1] == 0).all()
    assert (within[2] == 0).all()
    assert (within[:, 2] == 0).all()
    assert within[0, 3] != 0


def test_subtract_takes_away_what_was_added():
    x, y = data(60, 3, 2, mean=50.0)
    moments = ClassMoments(3, 2).update(x, y).subtract(ClassMoments(3, 2).update(x[40:], y[40:]))
    assert_same(moments, exact(x[:40], y[:40], 2))
    moments.subtract(ClassMoments(3, 2).update(x[:40], y[:40]))
    assert moments.n_samples == 0
    assert moments.means.isnan().all()
    assert not moments.within_scatter().any()
    assert_same(moments.update(x, y), exact(x, y, 2))


def test_equal_rows_leave_exactly_nothing_however_many():
    row = torch.tensor([[0.1, 1 / 3, 1e5 / 7]], dtype=torch.float64)
    moments = ClassMoments(3, 2)
    for n in (1, 999, 3001, 7000):
        moments.merge(ClassMoments(3, 2).update(row.expand(n, 3), torch.arange(n) % 2))
    assert not moments.within_scatter().any()


def test_data_after_everything_was_taken_away_choose_their_own_pivot():
    far, near = data(5000, 3, 1, mean=1e8), data(500, 3, 1)
    moments = ClassMoments(3).update(*far).subtract(ClassMoments(3).update(*far)).update(*near)
    assert_same(moments, exact(*near, 1))


def test_subtract_refuses_what_was_never_added():
    x, y = data(10, 3, 2)
    moments = ClassMoments(3, 2).update(x, y)
    with pytest.raises(InputError, match="more than"):
        ClassMoments(3, 2).subtract(moments)
    assert moments.subtract(ClassMoments(3, 2)).n_samples == 10


@pytest.mark.parametrize("action", ["merge", "subtract"])
def test_other_shapes_are_refused(action):
    with pytest.raises(MismatchError, match=r"4 features and 2 classes .* 3 features and 2 classes"):
        getattr(ClassMoments(3, 2), action)(ClassMoments(4, 2))


def test_bad_rows_are_named_and_nothing_is_added():
    x, y = data(30, 3, 2)
    x[4, 1], x[7, 0] = torch.nan, -torch.inf
    moments = ClassMoments(3, 2)
    with pytest.raises(NonFiniteError, match=r"2 of 30 rows hold NaN or infinity \(rows 4, 7\)"):
        moments.update(x, y)
    x[:12] = torch.inf
    with pytest.raises(NonFiniteError, match=r"12 of 30 .*\(rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\)"):
        moments.update(x, y)
    assert moments.n_samples == 0


def test_a_bad_row_late_in_a_long_update_leaves_nothing_of_it(monkeypatch):
    monkeypatch.setattr("rm_ood.moments._MOST_ROWS", 1000)
    (x, y), (bad, labels) = data(50, 3, 2, mean=7.0), data(3000, 3, 2, seed=1, mean=1e6)
    bad[2999, 1] = torch.nan
    for before in (ClassMoments(3, 2), ClassMoments(3, 2).update(x, y)):
        state = {name: tensor.clone() for name, tensor in before.state_tensors().items()}
        with pytest.raises(NonFiniteError, match=r"1 of 3000 rows hold NaN or infinity \(rows 2999\)"):
            before.update(bad, labels)
        assert all(torch.equal(tensor, state[name]) for name, tensor in before.state_tensors().items())
    # What was refused has no say in the pivot of what comes next.
    more = data(60, 3, 2, seed=2, mean=7.0)
    assert_same(before.update(*more), exact(torch.cat([x, more[0]]), torch.cat([y, more[1]]), 2))


def test_a_class_that_comes_first_and_lies_far_away_does_not_choose_the_pivot():
    x, _ = data(20_000, 3, 1)
    x[:256] += 3e3
    y = (torch.arange(20_000) >= 256).long()
    assert_same(ClassMoments(3, 2).update(x, y), exact(x, y, 2), tolerance=1e-9)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.zeros(3), None, InputError, r"got \(3,\)"),
        (torch.zeros(2, 4), [0, 1], MismatchError, "expected 3 features, got 4"),
        (torch.zeros(2, 3), None, InputError, "y: labels are needed for 2 classes"),
        (torch.zeros(2, 3), torch.tensor([0]), InputError, r"y: expected shape \(2,\), got \(1,\)"),
        (torch.zeros(2, 3), [0, 2], InputError, "y: classes 0 to 2 are outside 0 to 1"),
        (torch.zeros(2, 3), [-1, 0], InputError, "y: classes -1 to 0 are outside 0 to 1"),
        (torch.zeros(2, 3), [0.0, np.nan], InputError, "y: expected integer classes"),
        (torch.zeros(2, 3), [0.0, 0.5], InputError, "y: expected integer classes"),
    ],
)
def test_bad_updates_are_refused(x, y, error, message):
    with pytest.raises(error, match=message):
        ClassMoments(3, 2).update(x, y)


@pytest.mark.parametrize(("d", "k"), [(0, 1), (3, 0)])
def test_sizes_below_one_are_refused(d, k):
    with pytest.raises(InputError, match="at least 1"):
        ClassMoments(d, k)


def test_squares_that_overflow_are_refused():
    moments = ClassMoments(2).update(torch.tensor([[1e200, 0.0], [-1e200, 1.0]], dtype=torch.float64))
    with pytest.raises(CalibrationError, match="overflow; rescale"):
        moments.within_scatter()


def test_float64_products_are_asked_for_wherever_rows_are_added(monkeypatch):
    asked = []

    def recorded(*args):
        asked.append(args[-1])
        return class_scatter(*args)

    monkeypatch.setattr("rm_ood.moments.class_scatter", recorded)
    x, y = data(9000, 5, 2, dtype=torch.float32)
    for exact in (False, True):
        moments = ClassMoments(5, 2, exact=exact).update(x, y)
        for same in (moments.copy(), moments.pooled()):
            same.update(x[:10], torch.zeros_like(y[:10])).state_tensors()
    assert asked == 3 * [False] + 3 * [True]


def test_rows_are_held_back_until_they_are_added(monkeypatch):
    def no_memory(*args):
        raise MemoryError

    x, y = data(100, 3, 2)
    moments = ClassMoments(3, 2).update(x, y)
    with monkeypatch.context() as patch:
        patch.setattr("rm_ood.moments.class_scatter", no_memory)
        with pytest.raises(MemoryError):
            moments.means  # noqa: B018
    assert_same(moments, exact(x, y, 2))


def test_a_default_device_has_no_say():
    x, y = data(3000, 3, 2)
    with torch.device("meta"):
        moments = ClassMoments(3, 2, device="cpu")
        moments.update(x, y)
    assert_same(moments, exact(x, y, 2))


# Row ranges of the two processes: one empty, unequal, one class only on each side.
SPLITS = [(0, 0, 60), (0, 45, 60), (0, 60, 60)]


def _rank_main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, y = data(60, 4, 2, mean=1e3)
    results = []
    for split in SPLITS:
        rows = slice(split[rank], split[rank + 1])
        moments = ClassMoments(4, 2).update(x[rows], y[rows]).all_reduce()
        results.append((moments.counts, moments.means, moments.within_scatter()))
    nothing = ClassMoments(4, 2).all_reduce()
    results.append(nothing.n_samples)
    try:
        ClassMoments(4 + rank, 2).all_reduce()
    except MismatchError as error:
        results.append(str(error))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_all_reduce_over_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(_rank_main, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    x, y = data(60, 4, 2, mean=1e3)
    whole = ClassMoments(4, 2).update(x, y)
    for mine, other in zip(first[:3], second[:3], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
        assert torch.equal(mine[0], whole.counts)
        torch.testing.assert_close(mine[1], whole.means, rtol=1e-12, atol=0)
        torch.testing.assert_close(mine[2], whole.within_scatter(), rtol=1e-10, atol=1e-10)
    assert first[3] == second[3] == 0
    assert first[4] == second[4] == "all_reduce: processes hold 4 to 5 features and 2 to 2 classes"


@pytest.fixture
def lone_process(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_all_reduce_of_one_process_changes_nothing(lone_process):
    x, y = data(60, 4, 2, mean=1e3)
    moments = ClassMoments(4, 2).update(x[:30], y[:30]).all_reduce().update(x[30:], y[30:])
    assert_same(moments, exact(x, y, 2))


def test_all_reduce_refuses_processes_that_differ(lone_process, monkeypatch):
    def other_rank_has_two_classes(tensor, *_, **__):
        tensor[2] = max(int(tensor[2]), 2)

    monkeypatch.setattr(dist, "all_reduce", other_rank_has_two_classes)
    with pytest.raises(MismatchError, match="3 to 3 features and 1 to 2 classes"):
        ClassMoments(3).all_reduce()


def test_state_is_kept_and_added_to():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(3000, 5, generator=rng), torch.arange(3000) % 2
    moments = ClassMoments(5, 2).update(x[:1000], y[:1000])
    kept = {name: tensor.clone() for name, tensor in moments.state_tensors().items()}
    loaded = ClassMoments.from_state(kept)
    assert torch.equal(loaded.within_scatter(), moments.within_scatter())
    loaded.update(x[1000:], y[1000:])
    whole = ClassMoments(5, 2).update(x, y)
    torch.testing.assert_close(loaded.within_scatter(), whole.within_scatter(), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(loaded.means, whole.means, rtol=1e-12, atol=1e-12)
    assert torch.equal(ClassMoments.from_state(kept).within_scatter(), moments.within_scatter()), "its own copy"


@pytest.mark.parametrize(
    "change",
    [
        {"counts": torch.zeros(2)},
        {"pivot": torch.zeros(4, dtype=torch.float64)},
        {"sums": torch.zeros(5, dtype=torch.float64)},
        {"extra": torch.zeros(1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_state_of_another_form_is_refused(change):
    with pytest.raises(FormatError, match="moments: expected"):
        ClassMoments.from_state({**ClassMoments(5, 2).state_tensors(), **change})
    with pytest.raises(FormatError, match="moments: expected"):
        ClassMoments.from_state({})


@pytest.mark.parametrize("flush", [1, 8])
def test_updates_longer_than_one_piece(monkeypatch, flush):
    monkeypatch.setattr("rm_ood.moments._MOST_ROWS", 8)
    monkeypatch.setattr("rm_ood.moments._FLUSH_ROWS", flush)
    x = 3 + torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(200) % 3
    moments = ClassMoments(5, 3).update(x[:100], y[:100]).update(x[100:103], y[100:103]).update(x[103:], y[103:])
    means = torch.stack([x[y == c].mean(0) for c in range(3)])
    centred = x - means[y]
    assert torch.equal(moments.counts, torch.bincount(y))
    torch.testing.assert_close(moments.means, means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.within_scatter(), centred.T @ centred, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("k", [1, 3])
def test_constant_features_of_a_long_stream(k):
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(0, k, (40_000,), generator=rng)
    x = (100 * torch.randn(k, 16, generator=rng))[y]
    x[:, 5] += 1e-4 * torch.randn(40_000, generator=rng)
    moments = ClassMoments(16, k)
    for rows, labels in zip(torch.split(x, 700), torch.split(y, 700), strict=True):
        moments.update(rows, labels)
    assert (moments.within_scatter().diagonal() != 0).nonzero().flatten().tolist() == [5]
