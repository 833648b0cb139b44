import pytest
import torch
from waits import NoHostSync
from whitenings import draws, exact, gaussian, in_float32

from rm_ood import ops
from rm_ood.detectors import ConditionalMahalanobis, ContrastedMahalanobis, MahalanobisDetector, NormalisedMahalanobis
from rm_ood.errors import InputError
from rm_ood.ops import distance_launch, metric, reference
from rm_ood.ops.distance_launch import TABLE, Blocks, Device
from rm_ood.ops.packing import MODES, certificate, pack, unpack


@pytest.mark.parametrize("d", [1, 63, 128, 129, 300])
@pytest.mark.parametrize(("mode", "bits"), [("fp16", 11), ("fp16x2", 21), ("bf16x3", 24), ("fp32", 24)])
def test_packed_form_holds_the_whitening(d, mode, bits):
    _, means, whitening = gaussian(d, 2)
    packed = pack([(whitening, means)], mode=mode)
    assert packed.tiles.dtype == MODES[mode].dtype
    assert packed.tiles.shape[1] == MODES[mode].parts
    stored = packed.whitenings()[0]
    assert torch.equal(stored, stored.tril())
    # Relative to the row's largest entry, which sets the exponent.
    error = (stored.double() - whitening.double()).abs() / whitening.double().abs().amax(1, keepdim=True)
    assert error.max() <= 2.0**-bits
    middle = 0 if packed.center is None else packed.center.double()
    torch.testing.assert_close(packed.shifts[0].double(), (means - middle) @ stored.double().T, rtol=1e-6, atol=1e-5)
    # The triangle alone: half of the square, and the blocks on the diagonal.
    blocks = -(-d // 128)
    assert packed.tiles[0, 0].numel() == blocks * (blocks + 1) * 128 * 64


@pytest.mark.parametrize("condition", [1e4, 1e6])
@pytest.mark.parametrize(("mode", "within"), [("fp16", 1e-2), ("fp16x2", 1e-5), ("bf16x3", 1e-5), ("fp32", 1e-5)])
def test_distances_are_those_of_the_fit_to_the_precision_of_the_mode(condition, mode, within):
    factor, means, whitening = gaussian(256, 2, condition=condition)
    x = draws(400, factor, means).to(torch.bfloat16)
    truth = reference.whitened_sq_distance(
        x.double(), whitening.double(), means[0], (means - means[0]) @ whitening.double().T
    )
    packed = pack([(whitening, means)], mode=mode)
    lowest = ops.packed_sq_distance(x, packed)[1][0].double()
    assert ((lowest - truth[1]) / truth[1]).abs().max() <= within
    torch.testing.assert_close(exact(x, packed)[0].amin(1), truth[1], rtol=packed.certificate + 1e-6, atol=0)


@pytest.mark.parametrize("mode", ["fp16", "fp16x2"])
@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_certificate_is_the_largest_relative_change(mode, condition):
    _, means, whitening = gaussian(120, 1, condition=condition)
    packed = pack([(whitening, means)], mode=mode)
    stored = unpack(packed.tiles, packed.scales, packed.x_scale, dtype=torch.float64)[0]
    turned = torch.linalg.solve_triangular(whitening.double(), stored, upper=False, left=False)
    change = torch.linalg.eigvalsh(turned.T @ turned - torch.eye(120, dtype=torch.float64)).abs().max().item()
    assert change <= packed.certificate <= 1.3 * change
    assert certificate(whitening, whitening) < 1e-12


def test_tolerance_chooses_the_cheapest_mode():
    _, means, whitening = gaussian(100, 2)
    coarse = pack([(whitening, means)], mode="fp16").certificate
    assert pack([(whitening, means)]).mode == "fp16x2"
    assert pack([(whitening, means)], tolerance=1.01 * coarse).mode == "fp16"
    assert pack([(whitening, means)], tolerance=1e-9).mode == "bf16x3"
    assert pack([(whitening, means)], tolerance=0).mode == "fp32"
    # A whitening that half precision holds exactly is certified for it.
    rounded = pack([(whitening, means)], mode="fp16").whitenings()[0]
    assert pack([(rounded, means)]).mode == "fp16"
    with pytest.raises(InputError, match=r"mode='int8'.*'fp16'"):
        pack([(whitening, means)], mode="int8")


def test_units_of_the_vectors_do_not_matter_within_range():
    factor, means, whitening = gaussian(60, 2)
    x = draws(30, factor, means).float()
    expected = ops.packed_sq_distance(x, pack([(whitening, means)]))[0]
    for power in (-40, 17):
        unit = 2.0**power
        packed = pack([(whitening / unit, means * unit)])
        assert packed.mode == "fp16x2"
        torch.testing.assert_close(ops.packed_sq_distance(x * unit, packed)[0], expected, rtol=1e-5, atol=0)
    with pytest.raises(InputError, match="fp16x2: out of range"):
        pack([(whitening * 2.0**115, means * 2.0**-115)], mode="fp16x2")
    assert pack([(whitening * 2.0**115, means * 2.0**-115)]).mode == "fp32"


def test_vectors_are_centred_where_their_means_are_far_from_0():
    factor, means, whitening = gaussian(60, 2, condition=100)
    near = pack([(whitening, 0.001 * means)])
    assert near.center is None
    far = pack([(whitening, means)])
    torch.testing.assert_close(far.center.double(), means.mean(0), rtol=1e-6, atol=0)
    moved = far.to("meta")
    assert {t.device.type for t in (moved.tiles, moved.scales, moved.shifts, moved.center)} == {"meta"}
    assert near.to("meta").center is None
    x = draws(50, factor, 1e4 * means[:1]).float()
    truth = (x.double() - 1e4 * means[0]) @ whitening.double().T
    got = ops.packed_sq_distance(x, pack([(whitening, 1e4 * means[:1])]))[0]
    torch.testing.assert_close(got[0, :, 0].double(), truth.square().sum(1), rtol=1e-5, atol=0)


def test_emulation_is_exact_and_fails_closed():
    one, other = gaussian(80, 3, seed=1), gaussian(80, 1, seed=2)
    packed = pack([(one[2], one[1]), (other[2], other[1])]).to("cpu")
    x = draws(20, one[0], one[1]).to(torch.bfloat16)
    sq, lowest, nearest = ops.packed_sq_distance(x, packed)
    truth, plain = exact(x, packed), in_float32(x, packed).double()
    budget = torch.maximum(2 * (plain - truth).abs().amax(), 2e-6 * truth)
    assert ((sq.double() - truth).abs() <= budget).all()
    assert torch.equal(lowest, sq.amin(2))
    assert torch.equal(nearest, sq.argmin(2))
    hidden = torch.full((20, 4, 80), torch.nan, dtype=torch.bfloat16)
    rows = torch.arange(20) % 4
    hidden[torch.arange(20), rows] = x
    torch.testing.assert_close(ops.packed_sq_distance(hidden, packed, rows=rows)[0], sq, rtol=0, atol=0)
    rows[0] = 4
    x = x.float()
    x[1] = 1e9
    assert torch.isposinf(ops.packed_sq_distance(hidden, packed, rows=rows)[1][:, 0]).all()
    assert torch.isposinf(ops.packed_sq_distance(x, packed)[1][:, 1]).all()
    halved = ops.packed_sq_distance(x / 2, packed, factors=torch.full((20,), 2.0))
    torch.testing.assert_close(halved[0][:, 2:], sq[:, 2:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("options", [False, True])
def test_operator_is_registered_correctly(n, options):
    factor, means, whitening = gaussian(30, 2)
    p = pack([(whitening, means)] * 2)
    x = draws(n, factor, means).float()
    rows = factors = None
    if options:
        x, rows, factors = x[:, None].repeat(1, 3, 1), torch.zeros(n, dtype=torch.int64), torch.ones(n)
    arguments = (x, p.tiles, p.scales, p.shifts, p.center if options else None, rows, factors, p.x_scale)
    torch.library.opcheck(torch.ops.rm_ood.packed_sq_distance.default, arguments)
    fake = torch.ops.rm_ood.packed_sq_distance(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments])
    got = torch.ops.rm_ood.packed_sq_distance(*arguments)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in got]


def test_compiles_and_exports_without_graph_break():
    factor, means, whitening = gaussian(30, 2)
    packed = pack([(whitening, means)])

    class Scored(torch.nn.Module):
        def forward(self, x):
            return ops.packed_sq_distance(x * 2, packed)[1] + 1

    compiled = torch.compile(Scored(), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 40):
        x = draws(n, factor, means).float() / 2
        torch.testing.assert_close(compiled(x.requires_grad_()), Scored()(x), rtol=0, atol=0)
    x = x.detach()
    exported = torch.export.export(Scored(), (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    torch.testing.assert_close(exported.module()(x[:7]), Scored()(x[:7]), rtol=0, atol=0)


@pytest.fixture
def _kernel_path(monkeypatch):
    """Detectors take the packed operator, whose implementation here is the emulation."""
    monkeypatch.setattr(metric, "INTERPRETED", True)
    monkeypatch.setattr(metric, "unavailable", lambda device: None)
    metric.fallbacks.clear()


@pytest.mark.parametrize("packed_path", [False, True])
def test_scoring_does_not_wait_for_the_device(packed_path, request):
    if packed_path:
        request.getfixturevalue("_kernel_path")
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 20, generator=rng) + 1
    detectors = [
        MahalanobisDetector(shrinkage=0.1).fit(x, torch.arange(400) % 2),
        ContrastedMahalanobis(shrinkage=0.1).fit(x, torch.arange(400) % 2).fit_noise(x * 2),
    ]
    for detector in detectors:
        expected = detector.sq_distances(x)
        with NoHostSync():
            got = detector.sq_distances(x), detector.score(x)
        assert torch.equal(got[0], expected)
    with pytest.raises(AssertionError, match="waits"), NoHostSync():
        x.sum().item()


@pytest.mark.usefixtures("_kernel_path")
def test_detectors_take_the_packed_operator_where_a_kernel_runs():
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(600, 30, generator=rng) + 2
    y = torch.arange(600) % 2
    probe = torch.randn(7, 30, generator=rng) + 2
    probe[3] = 0
    for kind in (MahalanobisDetector, NormalisedMahalanobis, ContrastedMahalanobis):
        single, double = (kind(shrinkage=0.1, dtype=dtype).fit(x, y) for dtype in (torch.float32, torch.float64))
        for detector in (single, double):
            if isinstance(detector, ContrastedMahalanobis):
                detector.fit_noise(x * 2)
        got = single.sq_distances(probe)
        assert not metric.fallbacks
        torch.testing.assert_close(got.double(), double.sq_distances(probe), rtol=1e-5, atol=0)
        assert metric.fallbacks == {"a float64 detector"}
        metric.fallbacks.clear()
    # What was packed is packed once, and anew for another fit.
    packed = single._metric.packed()
    single.score(probe)
    assert single._metric.packed() is packed
    single.fit(2 * x, y).score(probe)
    assert single._metric.packed() is not packed
    single.score(probe.double())
    assert ops.backend_info()["fallbacks"] == "vectors of torch.float64"


def test_why_there_is_no_kernel():
    assert distance_launch.unavailable(torch.device("cpu")) in ("triton is not installed", "no kernel for cpu")
    assert distance_launch.unsupported(torch.zeros(1, 2), 16) is None
    assert distance_launch.unsupported(torch.zeros(1, 2), 17) == "17 classes, more than 16"
    assert distance_launch.unsupported(torch.zeros(1, 2, dtype=torch.int8), 1) == "vectors of torch.int8"
    info = ops.backend_info()
    assert info["cpu"] == "pytorch"
    assert info["triton"]


def test_table_has_blocks_for_every_size_and_gpu():
    half = torch.float16
    assert distance_launch.blocks_for(Device(90, 132), half, 1, 1) == TABLE[90].few
    assert distance_launch.blocks_for(Device(89, 100), half, 64, 2) == TABLE[86].some
    assert distance_launch.blocks_for(Device(103, 100), half, 65, 2) == TABLE[100].many[1]
    assert distance_launch.blocks_for(Device(75, 100), half, 65, 1) == TABLE[80].many[0]
    assert distance_launch.blocks_for(Device(90, 100), torch.float32, 65, 1) == Blocks(32, 32, 4, 3)
    # One wave of programs, each with a short and a long tile row of W.
    split = distance_launch.split_for
    assert split(Device(90, 132), TABLE[90].few, 1, 4096, 1) == 128
    assert split(Device(90, 132), TABLE[90].some, 64, 4096, 2) == 64
    assert split(Device(90, 132), TABLE[90].many[0], 4096, 4096, 1) == 4
    assert split(Device(90, 132), TABLE[90].many[0], 65536, 4096, 1) == 1
    assert split(Device(90, 132), TABLE[90].few, 1, 1, 1) == 1


def test_parts_of_a_vector():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    parts = distance_launch.x_parts
    assert [parts(fp16, x, changed=False) for x in (bf16, fp16, fp32)] == [1, 1, 2]
    assert [parts(bf16, x, changed=False) for x in (bf16, fp16, fp32)] == [1, 2, 3]
    assert [parts(fp32, x, changed=True) for x in (bf16, fp16, fp32)] == [1, 1, 1]
    assert [parts(fp16, bf16, changed=True), parts(bf16, fp16, changed=True)] == [2, 3]


@pytest.mark.usefixtures("_kernel_path")
def test_precision_is_recorded_and_kept():
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(300, 20, generator=rng) + 2
    noisy = ContrastedMahalanobis(shrinkage=0.1)
    assert noisy.precision is None
    for detector in (MahalanobisDetector(shrinkage=0.1).fit(x), noisy.fit(x).fit_noise(2 * x)):
        assert detector.precision is None
        # Moving a detector packs it: the first call need not.
        assert detector.to("cpu").precision["mode"] == "fp16x2"
        assert 0 < detector.precision["certificate"] < 1e-5
        other = {"mode": "bf16x3", "certificate": 0.5}
        again = type(detector).from_state(detector.state_tensors(), precision=other)
        # Kept where nothing is packed, and with the scale.
        assert again.precision == again.scaled(3.0).precision == other
        assert again.to("cpu").precision["mode"] == "bf16x3"
        assert again.precision["certificate"] < 1e-5
        torch.testing.assert_close(again.score(x), detector.score(x), rtol=1e-4, atol=0)
        # Another fit is another whitening.
        assert again.fit(2 * x).precision is None
    assert noisy.to("cpu").fit_noise(3 * x).precision is None


@pytest.mark.parametrize(
    ("power", "mode", "instead"), [(0, "fp16", "fp16x2"), (115, "fp16x2", "fp32"), (0, "fp32", "fp32")]
)
@pytest.mark.usefixtures("_kernel_path")
def test_a_recorded_mode_that_does_not_hold_is_not_obeyed(power, mode, instead):
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(300, 20, generator=rng, dtype=torch.float64) + 2
    state = MahalanobisDetector(shrinkage=0.1).fit(x * 2.0**-power).state_tensors()
    again = MahalanobisDetector.from_state(state, precision={"mode": mode, "certificate": 1e-7}).to("cpu")
    assert again.precision["mode"] == instead
    noted = [note for note in metric.fallbacks if f"{mode!r} does not hold" in note and f"{instead!r} instead" in note]
    assert len(noted) == (mode != instead)


@pytest.mark.usefixtures("_kernel_path")
def test_what_is_not_packed_is_not_captured(monkeypatch):
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(5))
    detector = MahalanobisDetector(shrinkage=0.1).fit(x)
    monkeypatch.setattr(metric, "capturing", lambda device: True)
    assert detector.score(x).isfinite().all()
    assert detector.precision is None
    assert any("not packed before a graph was captured" in note for note in metric.fallbacks)


@pytest.mark.usefixtures("_kernel_path")
def test_packed_memory_is_settled_before_it_is_given_out(monkeypatch):
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(5))
    detector = MahalanobisDetector(shrinkage=0.1).fit(x)
    settled = []
    monkeypatch.setattr(metric, "settle", lambda device: settled.append((device, detector._metric._packed)))
    detector.score(x)
    detector.score(x)
    assert settled == [(torch.device("cpu"), None)]


def test_uneven_features_are_not_left_to_half_precision():
    means = torch.zeros(1, 64, dtype=torch.float64)
    whitening = torch.eye(64)
    assert pack([(whitening, means)]).mode == "fp16"
    whitening[0, 0] = 1e-6
    asked = pack([(whitening, means)], mode="fp16x2")
    assert asked.certificate < 1e-6
    assert 1e-4 < asked.x_rounding < 1e-2
    assert asked.error == asked.certificate + asked.x_rounding
    chosen = pack([(whitening, means)])
    assert (chosen.mode, chosen.x_rounding) == ("bf16x3", 0.0)


@pytest.mark.usefixtures("_kernel_path")
def test_a_distance_that_no_kernel_measures_says_so():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(5))
    detector = ConditionalMahalanobis(shrinkage=0.1).fit(x)
    detector.score(x)
    assert ops.backend_info()["fallbacks"] == "a distance given another vector, which is no triangle"
