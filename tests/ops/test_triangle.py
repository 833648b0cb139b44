"""Triangles in blocks, against the whole matrix in float64."""

import pickle
import threading

import pytest
import torch

from rm_ood import ClassMoments, InputError, MahalanobisDetector
from rm_ood.detectors import ContrastedMahalanobis
from rm_ood.ops import distance, reference, triangle, whitened_sq_distance
from rm_ood.ops.triangle import KEPT_ROWS, Triangle, block_rows


def lower(d, *, dtype=torch.float32):
    rng = torch.Generator().manual_seed(d)
    return torch.randn(d, d, generator=rng, dtype=torch.float64).div(d**0.5).tril().to(dtype)


def test_blocks_grow_with_the_width():
    assert [block_rows(d) for d in (1, 512, 513, 8192)] == [128, 128, 256, 256]
    assert [block_rows(d, packed=True) for d in (1, 512, 513, 2048, 2049, 8192)] == [96, 96, 128, 128, 256, 256]


@pytest.mark.parametrize(("d", "pack", "few", "many"), [(384, True, 4, 8), (384, False, 3, 3), (600, True, 5, 5)])
def test_many_rows_take_smaller_blocks_of_a_packed_triangle_that_is_whole(d, pack, few, many):
    triangle = Triangle(lower(d), pack=pack)
    for n, expected in ((KEPT_ROWS, few), (KEPT_ROWS + 1, many), (KEPT_ROWS, few)):
        blocks = [block for part in triangle.workspace(n).parts for _, block, _ in part.products]
        assert len(blocks) == expected
        assert all(block.is_contiguous() for block in blocks) == (d == 600)


@pytest.mark.parametrize("d", [3, 384, 600])
@pytest.mark.parametrize("n", [0, 1, 16, 17, KEPT_ROWS, KEPT_ROWS + 1, 1500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pack", [False, True])
def test_whiten(d, n, dtype, pack):
    rng = torch.Generator().manual_seed(n)
    whitening, center = lower(d), torch.randn(d, generator=rng)
    # Every second row of a wider tensor: no row is where the last one ends.
    x = torch.randn(2 * n, d + 5, generator=rng).to(dtype)[::2, 2 : d + 2]
    expected = (x.double() - center.double()) @ whitening.double().T
    triangle = Triangle(whitening, pack=pack)
    for _ in range(2):
        if n <= KEPT_ROWS:
            found = triangle.whiten(x, center)
        else:
            parts = triangle.parts(x, center, triangle.workspace(n))
            found = torch.cat([z.clone() for _, z in parts], 1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_part_of_many_columns_starts_where_the_last_one_ends():
    triangle = Triangle(lower(700), pack=True)
    parts = list(triangle.parts(torch.ones(1500, 700), torch.zeros(700), triangle.workspace(1500)))
    assert [first for first, _ in parts] == [0, 256, 512]
    assert [z.shape[1] for _, z in parts] == [256, 256, 188]
    assert len({z.data_ptr() for _, z in parts}) == 1


@pytest.mark.parametrize("n", [0, 1, KEPT_ROWS, 3000])
def test_other_devices_keep_no_memory_between_calls(n, monkeypatch):
    """Several streams may be fed from one thread; on the meta device, which has no autocast, the same calls are made."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    x, whitening, center, offsets = (
        torch.empty(shape, device="meta") for shape in [(n, 700), (700, 700), 700, (2, 700)]
    )
    kept = set(triangle._memory.by_kind)
    sq = distance.triangle_sq_distance(x, Triangle(whitening), center, offsets[:, None])
    assert sq.is_meta
    assert sq.shape == (2, n)
    assert set(triangle._memory.by_kind) == kept


def test_wide_rows_far_from_the_centre_keep_their_digits():
    whitening = torch.eye(600)
    center = torch.full((600,), 3e7)
    x = center.double() + torch.linspace(-1, 1, 600, dtype=torch.float64)
    torch.testing.assert_close(Triangle(whitening).whiten(x[None], center)[0].double(), x - 3e7, rtol=1e-6, atol=0)


def test_results_outlive_the_next_call_and_other_threads():
    rng = torch.Generator().manual_seed(0)
    detector = MahalanobisDetector(shrinkage=0.5).fit(torch.randn(6000, 600, generator=rng))
    batches = [torch.randn(n, 600, generator=rng) for n in (1, 5, 64, 3, 5, 1)]
    expected = [detector.sq_distances(x).clone() for x in batches]
    kept = [detector.sq_distances(x) for x in batches]
    wrong = []

    def score():
        for _ in range(30):
            wrong.extend(not torch.equal(detector.sq_distances(x), sq) for x, sq in zip(batches, expected, strict=True))

    threads = [threading.Thread(target=score) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 4 * 30 * len(batches)
    assert not any(wrong)
    assert all(torch.equal(sq, then) for sq, then in zip(kept, expected, strict=True))
    # Its memory is not what another process gets.
    assert len(pickle.dumps(detector)) < 1.1 * 600 * 600 * 4
    assert torch.equal(pickle.loads(pickle.dumps(detector)).sq_distances(batches[2]), expected[2])


@pytest.mark.parametrize(("n", "k", "d"), [(1100, 2, 300), (600, 16, 300), (2, 300, 300), (3000, 3, 600)])
def test_many_distances_at_once(n, k, d, monkeypatch):
    rng = torch.Generator().manual_seed(k)
    whitening, offsets, center = lower(d), torch.randn(k, d, generator=rng) / 4, torch.randn(d, generator=rng)
    x = torch.randn(n, d, generator=rng)
    x[n // 2, 3] = torch.nan
    expanded = []
    sums = distance._expanded
    monkeypatch.setattr(distance, "_expanded", lambda *args: expanded.append(1) or sums(*args))
    sq, lowest, nearest = whitened_sq_distance(x, whitening, center, offsets)
    assert expanded
    good = torch.arange(n) != n // 2
    expected = reference.whitened_sq_distance(*(t.double() for t in (x[good], whitening, center, offsets)))
    torch.testing.assert_close(sq[good].double(), expected[0], rtol=2e-6, atol=0)
    assert sq[n // 2].isposinf().all()
    assert torch.equal(lowest, sq.amin(1))
    assert torch.equal(nearest, sq.argmin(1))


@pytest.mark.parametrize("apart", [1.0, 1e18])
def test_classes_far_apart(apart):
    """Each row has one small distance among large ones: that pair alone is done by differences."""
    rng = torch.Generator().manual_seed(3)
    offsets = apart * torch.randn(16, 300, generator=rng)
    x = offsets.repeat(40, 1) + apart / 1e6 * torch.randn(640, 300, generator=rng)
    sq = whitened_sq_distance(x, torch.eye(300), torch.zeros(300), offsets)[0]
    truth = (x.double()[:, None] - offsets.double()).square().sum(2)
    finite = truth < torch.finfo(torch.float32).max
    torch.testing.assert_close(sq.double()[finite], truth[finite], rtol=1e-5, atol=0)
    assert sq[~finite].isposinf().all()
    assert finite[torch.arange(640), torch.arange(640) % 16].all()


@pytest.mark.parametrize("apart", [0.6, 1.0, 1.2, 1.4, 2.2])
@pytest.mark.parametrize("d", [64, 384, 1024])
def test_the_expansion_costs_at_most_a_few_bits(apart, d):
    """Own distances are 1 / (1 + 2 a^2) of the squares: a little more than a quarter at 1.2, where the most cancels."""
    rng = torch.Generator().manual_seed(d)
    offsets = apart * torch.randn(16, d, generator=rng)
    z = offsets.repeat(32, 1) + torch.randn(512, d, generator=rng)
    sq = whitened_sq_distance(z, torch.eye(d), torch.zeros(d), offsets)[0]
    truth = (z.double()[:, None] - offsets.double()).square().sum(2)
    torch.testing.assert_close(sq.double(), truth, rtol=5e-6, atol=0)


def test_pairs_that_cancel_are_found_in_every_class():
    d, rng = 600, torch.Generator().manual_seed(0)
    offsets = 1e3 * torch.randn(16, d, generator=rng)
    x = offsets[9] + torch.randn(200, d, generator=rng)
    sq = whitened_sq_distance(x, torch.eye(d), torch.zeros(d), offsets)[0]
    truth = (x.double()[:, None] - offsets.double()).square().sum(2)
    torch.testing.assert_close(sq.double(), truth, rtol=1e-5, atol=0)


def test_columns_of_zeros_cancel_nothing(monkeypatch):
    """Half of the whitened columns are 0 in a conditional distance."""
    d, rng = 1500, torch.Generator().manual_seed(0)
    whitening = torch.eye(d)
    whitening[:700] = 0
    offsets = 0.1 * torch.randn(2, d, generator=rng) @ whitening
    asked = []
    whole = torch.Tensor.index_copy_
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda *args: asked.append(args) or whole(*args))
    whitened_sq_distance(torch.randn(1100, d, generator=rng), whitening, torch.zeros(d), offsets)
    assert not asked


def test_rows_at_a_class_mean_are_not_left_to_cancellation():
    d, k = 400, 200
    rng = torch.Generator().manual_seed(1)
    whitening, center = torch.eye(d), torch.zeros(d)
    offsets = 100 * torch.randn(k, d, generator=rng)
    x = offsets[:3] + 1e-3 * torch.randn(3, d, generator=rng)
    sq, _, nearest = whitened_sq_distance(x, whitening, center, offsets)
    assert nearest.tolist() == [0, 1, 2]
    expected = (x - offsets[:3]).double().square().sum(1)
    torch.testing.assert_close(sq[[0, 1, 2], [0, 1, 2]].double(), expected, rtol=1e-5, atol=0)


def test_sums_beyond_float32_still_find_a_pivot():
    x = torch.tensor([[3e38], [2.9e38], [3.1e38]])
    moments = ClassMoments(1).update(x)
    torch.testing.assert_close(moments.means, x.double().mean(0, keepdim=True))
    expected = ((x.double() - x.double().mean(0)) ** 2).sum(0, keepdim=True)
    torch.testing.assert_close(moments.within_scatter(), expected, rtol=1e-9, atol=0)


def test_moments_are_added_to_in_and_out_of_inference_mode():
    x = torch.randn(5000, 7, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        moments = ClassMoments(7).update(x[:10])
        moments.update(x[10:3000])
        copied = moments.copy()
    moments.update(x[3000:])
    with torch.inference_mode():
        copied.update(x[3000:4000].clone()).merge(ClassMoments(7).update(x[4000:]))
    for found in (moments, copied.subtract(ClassMoments(7)), copied.pooled().merge(ClassMoments(7))):
        torch.testing.assert_close(
            found.within_scatter(), ClassMoments(7).update(x).within_scatter(), rtol=1e-12, atol=1e-9
        )


@pytest.fixture
def wide():
    rng = torch.Generator().manual_seed(0)
    detector = ContrastedMahalanobis(shrinkage=0.5).fit(torch.randn(6000, 600, generator=rng))
    return detector.fit_noise(2 * torch.randn(6000, 600, generator=rng)), torch.randn(20, 600, generator=rng)


def test_inference_mode_leaves_nothing_behind(wide):
    detector, x = wide
    scores = []

    def score():
        with torch.inference_mode():
            scores.append(detector.score(x))
        scores.append(detector.score(x))

    # A thread of its own has no memory yet.
    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert torch.equal(*scores)


def test_tracing_leaves_nothing_behind(wide):
    detector, x = wide

    class Model(torch.nn.Module):
        def forward(self, x):
            return detector.score(x)

    exported = torch.export.export(Model(), (x[:5],))
    called = {str(node.target) for node in exported.graph.nodes}
    assert "rm_ood.whitened_sq_distance.default" in called
    assert not any(name.endswith(".out") for name in called)
    score = detector.score(x[5:10])
    assert type(score) is torch.Tensor
    torch.testing.assert_close(exported.module()(x[5:10]), score, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [MahalanobisDetector, ContrastedMahalanobis])
def test_a_detector_does_not_break_a_graph(kind):
    rng = torch.Generator().manual_seed(0)
    detector, x = kind(shrinkage=0.5).fit(torch.randn(400, 30, generator=rng)), torch.randn(5, 30, generator=rng)
    if kind is ContrastedMahalanobis:
        detector.fit_noise(2 * torch.randn(400, 30, generator=rng))
    expected = detector.score(x)
    compiled = torch.compile(detector.score, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=0)


def test_state_that_is_replaced_is_what_scores(wide):
    detector, x = wide
    before = detector.score(x)
    detector.noise_.fit(torch.randn(6000, 600, generator=torch.Generator().manual_seed(9)))
    loaded = ContrastedMahalanobis.from_state(detector.state_tensors(), shrinkage=0.5)
    assert not torch.allclose(detector.score(x), before, rtol=0.01)
    assert torch.equal(detector.score(x), loaded.score(x))
    detector.whitening_ = 2 * detector.whitening_
    detector.offsets_ = 2 * detector.offsets_
    torch.testing.assert_close(detector.own_sq_distances(x), 4 * loaded.own_sq_distances(x), rtol=1e-5, atol=0)


def test_no_gradient_flows(wide):
    detector, x = wide
    detector.whitening_.requires_grad_()
    assert not detector.score(x.requires_grad_()).requires_grad


def test_vectors_of_eight_bits_are_refused(wide):
    with pytest.raises(InputError, match="float8_e5m2 has too few bits"):
        wide[0].score(wide[1].to(torch.float8_e5m2))


def test_classes_one_by_one_as_on_other_devices():
    rng = torch.Generator().manual_seed(0)
    z, offsets = torch.randn(30, 20, generator=rng), torch.randn(3, 20, generator=rng)
    expected = (z.double()[:, None] - offsets.double()).square().sum(2)
    found = distance._by_class(z, offsets[:, None]).T
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
