"""The twelve perturbations of a reward model, each refused with tier and field; and what is no perturbation."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from families import FAMILIES
from test_ways import fitted, lora, verdicts
from torch import Tensor, nn

from rm_ood import CalibrationWarning, InputError, MismatchError, OODGuard
from rm_ood.canaries import CANARIES
from rm_ood.channels import Channel
from rm_ood.embed import Embedder
from rm_ood.fingerprint import WeightSamples, check_weights
from rm_ood.identity import Canaries, Identity
from rm_ood.recalibration import DRIFT, UNEXPLAINED, _turned, geometry
from rm_ood.text import Batch, TextEncoder

pytestmark = [
    pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
]


@pytest.fixture(scope="module")
def written(shared_decoder: Any, decoder_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved guard, fitted once for all tests."""
    folder = tmp_path_factory.mktemp("identity") / "guard"
    with fitted(copy.deepcopy(shared_decoder), decoder_tokenizer, text_format="chat") as guard:
        guard.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(written: Path, tiny_decoder: Any, tmp_path: Path) -> tuple[Path, Any, Any]:
    """A saved guard of the test's own, with the model and tokenizer that it was fitted on."""
    shutil.copytree(written, tmp_path / "guard")
    return tmp_path / "guard", *tiny_decoder


def other_head(model: Any, tokenizer: Any) -> Any:
    torch.manual_seed(7)
    nn.init.normal_(model.score.weight)
    return model, tokenizer


def merged_lora(model: Any, tokenizer: Any) -> Any:
    return lora(model, task_type=None, target_modules=["q_proj"], spread=0.01).merge_and_unload(), tokenizer


def active_adapter(model: Any, tokenizer: Any) -> Any:
    return lora(model), tokenizer


def bfloat16(model: Any, tokenizer: Any) -> Any:
    return model.to(torch.bfloat16), tokenizer


def int8(model: Any, tokenizer: Any) -> Any:
    from bitsandbytes.nn import Linear8bitLt

    for block in model.model.layers:
        old = block.mlp.up_proj
        block.mlp.up_proj = Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
        block.mlp.up_proj.load_state_dict(old.state_dict())
        block.mlp.up_proj.to("cpu")
    return model, tokenizer


def other_tokenizer(model: Any, tokenizer: Any) -> Any:
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    return model, other


def edited_template(model: Any, tokenizer: Any) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("helpful", "helpless")
    return model, other


def train_mode(model: Any, tokenizer: Any) -> Any:
    return model.train(), tokenizer


def moved_revision(model: Any, tokenizer: Any) -> Any:
    model.config._commit_hash = "b" * 40
    return model, tokenizer


PERTURBATIONS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "other head": (other_head, r"tier 0\): head_sketch.*head_weights"),
    "one LoRA merged": (merged_lora, r"tier 1\): weights: 6 of \d+ parameters differ"),
    "adapter left active": (active_adapter, r"tier 0\).*adapters: guard has none, model has default"),
    "bfloat16 for float32": (bfloat16, r"tier 0\): dtype: guard has float32, model has bfloat16"),
    "int8": (int8, r"tier 0\): dtype: guard has float32, model has float32\+int8"),
    "other tokenizer": (other_tokenizer, r"tier 0\): tokenizer"),
    "edited chat template": (edited_template, r"tier 0\): chat_template"),
    "train mode": (train_mode, r"tier 0\): training_mode: guard has eval, model has train.*model\.eval\(\)"),
    "revision moved": (moved_revision, r"tier 0\): commit: guard has a{12}\.\.\., model has b{12}"),
}


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_another_model_is_refused_by_tier_and_field(name: str, saved: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, model, tokenizer = saved
    change, expected = PERTURBATIONS[name]
    if name == "revision moved":
        model.config._commit_hash = "a" * 40
        fitted(model, tokenizer).save_pretrained(folder, overwrite=True)
    model, tokenizer = change(model, tokenizer)
    with pytest.raises(MismatchError, match=f"fingerprint {expected}"):
        OODGuard.from_pretrained(folder, model, tokenizer)
    # Nothing is left behind on the model that was refused.
    assert not any(module._forward_hooks for module in model.modules())


def test_another_maximum_length_is_refused(saved: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = saved
    guard = fitted(model, tokenizer, max_length=None)
    guard.save_pretrained(folder, overwrite=True)
    # Without a setting of its own the guard takes the model's limit, which another configuration may change.
    model.config.max_position_embeddings = 256
    with pytest.raises(MismatchError, match=r"fingerprint tier 0\): .*text: guard has max_length 512, not 256"):
        OODGuard.from_pretrained(folder, model, tokenizer)


def test_a_hook_one_layer_earlier_is_refused(saved: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model, tokenizer = saved
    block = Channel.block
    monkeypatch.setattr(Channel, "block", lambda self, n: block(self, n) - 1)
    with pytest.raises(
        MismatchError, match=r"tier 0\): hook of prompt/mean@0.67: guard has model.layers.3, model has .*2"
    ):
        OODGuard.from_pretrained(folder, model, tokenizer)
    # And if the place were told wrongly too, the canaries see it.
    monkeypatch.setattr("rm_ood.capture.Capture.hook_points", lambda self: {})
    with pytest.raises(MismatchError, match=r"tier 2\): canaries: they differ in (prompt|response)/mean@0.(67|83) by"):
        OODGuard.from_pretrained(folder, model, tokenizer)


def test_left_padding_without_position_ids_is_refused(
    decoder_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = next(f for f in FAMILIES if f.name == "GPT2").build()
    guard = fitted(model, decoder_tokenizer)
    guard.save_pretrained(tmp_path / "guard")
    pad = TextEncoder.pad

    def pad_left(self: TextEncoder, items: Any, device: Any = "cpu", *, beside: int = 0) -> Batch:
        from test_capture import left

        return left(pad(self, items, device, beside=beside))

    monkeypatch.setattr(TextEncoder, "pad", pad_left)
    with pytest.raises(InputError, match=r"left padding changes what GPT2.*absolute"):
        OODGuard.from_pretrained(tmp_path / "guard", model, decoder_tokenizer)
    # Were it not refused, the canaries would see it.
    monkeypatch.setattr("rm_ood.capture.check_left_padding", lambda *_: None)
    with pytest.raises(MismatchError, match=r"tier 2\): canaries: they differ in"):
        OODGuard.from_pretrained(tmp_path / "guard", model, decoder_tokenizer)


def test_another_computation_on_the_same_weights_is_refused(saved: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = saved
    # No configuration field and no weight tells: a block that computes something else.
    model.model.layers[2].mlp.act_fn = nn.GELU().eval()
    with pytest.raises(MismatchError, match=r"tier 2\): canaries: they differ in .* by .*tolerance 0.01 %"):
        OODGuard.from_pretrained(folder, model, tokenizer)
    OODGuard.from_pretrained(folder, model, tokenizer, verify="weights").detach()


# -- what is no mismatch


@pytest.mark.parametrize(
    "change", ["batch size", "padding side", "copy", "compiled", "attention kernel", "fewer channels"]
)
def test_the_same_model_in_another_layout_is_accepted(change: str, saved: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = saved
    options: dict[str, Any] = {}
    if change == "padding side":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "left" if tokenizer.padding_side == "right" else "right"
    elif change == "copy":
        model = copy.deepcopy(model)
    elif change == "compiled":
        model = torch.compile(model, backend="eager", dynamic=True)
    elif change == "attention kernel":
        model.set_attn_implementation("eager")
    else:
        options["channels"] = "final"
    guard = OODGuard.from_pretrained(folder, model, tokenizer, **options)
    assert not any(reason.startswith("model_mismatch") for reasons in verdicts(guard).reasons for reason in reasons)
    guard.save_pretrained(folder.with_name("again"))
    torch._dynamo.reset()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_canaries_do_not_depend_on_the_batch(
    size: int, saved: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model, tokenizer = saved
    batches = Embedder.batches

    def smaller(self: Embedder, items: Any, text: Any) -> Any:
        object.__setattr__(self.config, "batch_size", size)
        return batches(self, items, text)

    monkeypatch.setattr(Embedder, "batches", smaller)
    OODGuard.from_pretrained(folder, model, tokenizer)


def test_the_right_model_in_another_process_is_accepted(saved: tuple[Path, Any, Any], tmp_path: Path) -> None:
    folder, model, tokenizer = saved
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = f"""
from rm_ood import OODGuard
from rm_ood.reward_model import load_reward_model
model, tokenizer = load_reward_model({str(tmp_path / "model")!r}, device="cpu")
guard = OODGuard.from_pretrained({str(folder)!r}, model, tokenizer)
print(guard.check("A question here", "and an answer").reasons)
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=200)
    assert (run.returncode, run.stdout.strip()) == (0, "()"), run.stderr[-2000:]


def test_an_allowed_dtype_is_told_in_every_verdict(saved: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = saved
    with pytest.warns(CalibrationWarning, match=r"differs from the fitted one in \['dtype', 'head_weights'\]"):
        guard = OODGuard.from_pretrained(folder, model.to(torch.bfloat16), tokenizer, allow_dtype_change=True)
    assert all("model_mismatch:dtype" in reasons for reasons in verdicts(guard).reasons)
    # Another calibration on this model binds the guard to it.
    guard.calibrate([{"prompt": r["prompt"], "response": r["chosen"]} for r in preference_rows(140, seed=3)])
    assert not any("model_mismatch:dtype" in reasons for reasons in verdicts(guard).reasons)
    guard.save_pretrained(folder, overwrite=True)
    OODGuard.from_pretrained(folder, model, tokenizer).detach()


def test_an_allowed_dtype_does_not_excuse_other_weights(saved: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = saved
    model, tokenizer = merged_lora(model, tokenizer)
    with pytest.raises(MismatchError, match=r"tier 1\): weights: 6 of"):
        OODGuard.from_pretrained(folder, model.to(torch.bfloat16), tokenizer, allow_dtype_change=True)


def test_what_was_allowed_by_name_is_told(saved: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = saved
    model, tokenizer = merged_lora(model, tokenizer)
    with pytest.warns(CalibrationWarning, match=r"\['weights', 'canaries'\]"):
        guard = OODGuard.from_pretrained(folder, model, tokenizer, allow=("weights", "canaries"))
    assert guard.check("A question here", "and an answer").reasons[-2:] == (
        "model_mismatch:weights",
        "model_mismatch:canaries",
    )


def test_an_unknown_tier_is_refused(saved: tuple[Path, Any, Any]) -> None:
    with pytest.raises(InputError, match="verify='all': expected one of"):
        OODGuard.from_pretrained(saved[0], verify="all")


# -- tiers by themselves


def test_one_changed_element_among_the_samples_is_seen(tiny_decoder: Any) -> None:
    model, _ = tiny_decoder
    before = WeightSamples.of(model)
    assert check_weights(before, WeightSamples.of(copy.deepcopy(model)), ("float32", "float32")) == []
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight.view(-1)[-1] += 1e-4
    with pytest.raises(MismatchError, match=r"weights: 1 of \d+ parameters differ"):
        check_weights(before, WeightSamples.of(model), ("float32", "float32"))
    del model.model.layers[4]
    with pytest.raises(MismatchError, match="under other names"):
        check_weights(before, WeightSamples.of(model), ("float32", "float32"))


def test_a_model_without_room_for_a_canary_is_bound_without_them(tiny_decoder: Any, tmp_path: Path) -> None:
    guard = OODGuard(*tiny_decoder, alpha=0.2, text_format="plain", max_length=5, channels="final")
    rows = [{"prompt": f"q {i}", "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(200)]
    guard.fit(rows, calibration=0.6, progress=False)
    guard.save_pretrained(tmp_path / "guard")
    assert OODGuard.from_pretrained(tmp_path / "guard", *tiny_decoder).config.max_length == 5


# -- recalibration


class Moved(nn.Module):
    """A final norm whose output is scaled or turned."""

    def __init__(self, norm: nn.Module, matrix: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.matrix = nn.Parameter(matrix)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.matrix.T


def moved(model: Any, matrix: Tensor) -> Any:
    model.model.norm = Moved(model.model.norm, matrix)
    return model.eval()


def sample(n: int = 140, seed: int = 11) -> list[dict[str, Any]]:
    """Trusted rows like those of the fit: chosen and rejected responses."""
    return [
        {**row, "prompt": row["prompt"].replace(f"question {seed}", "question 0")} for row in preference_rows(n, seed)
    ]


def load_on(saved: tuple[Path, Any, Any], model: Any) -> OODGuard:
    everything = ("parameters", "weights", "canaries")
    return OODGuard.from_pretrained(saved[0], model, saved[2], allow=everything)


def test_the_same_model_passes(saved: tuple[Path, Any, Any]) -> None:
    guard = OODGuard.from_pretrained(*saved)
    before = guard._fitted()
    report = guard.recalibrate(sample(), progress=False)
    assert report.status == "pass"
    assert guard._fitted() is before
    assert max(report.unexplained.values()) < 1e-5
    assert json.loads(json.dumps(report.to_dict()))["status"] == "pass"
    assert str(report).startswith("pass: the sample scores like the calibration data (140 prompts")


def test_a_change_of_scale_is_recalibrated(saved: tuple[Path, Any, Any]) -> None:
    reference = verdicts(OODGuard.from_pretrained(*saved))
    model = moved(copy.deepcopy(saved[1]), 3 * torch.eye(32))
    guard = load_on(saved, model)
    assert verdicts(guard).is_ood.mean() > 0.5
    report = guard.recalibrate(sample(), progress=False)
    assert report.status == "recalibrated"
    assert report.scale["final"] == pytest.approx(3, rel=1e-4)
    after = verdicts(guard)
    np.testing.assert_allclose(
        after.axis("response").channel("final").scores, reference.axis("response").channel("final").scores, rtol=1e-3
    )
    assert not any(reason.startswith("model_mismatch") for reasons in after.reasons for reason in reasons)
    assert guard.recalibrate(sample(seed=12), progress=False).status == "pass"
    guard.save_pretrained(saved[0], overwrite=True)
    OODGuard.from_pretrained(saved[0], model, saved[2]).detach()


def test_a_rotation_needs_a_new_fit(saved: tuple[Path, Any, Any]) -> None:
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(32, 32)).Q
    guard = load_on(saved, moved(copy.deepcopy(saved[1]), turn))
    before = guard._fitted()
    report = guard.recalibrate(sample(), progress=False)
    assert report.status == "refit needed"
    assert "['final'] are turned, not scaled" in report.reason
    assert report.unexplained["final"] > 0.5
    assert guard._fitted() is before


def test_other_traffic_on_the_same_model_takes_new_thresholds(saved: tuple[Path, Any, Any]) -> None:
    guard = OODGuard.from_pretrained(*saved)
    longer = [{"prompt": r["prompt"], "response": "你好，世界。" * 3 + r["chosen"]} for r in sample()]
    report = guard.recalibrate(longer, progress=False)
    assert report.status == "recalibrated"
    assert "otherwise on the same vectors" in report.reason
    assert guard.check([r["prompt"] for r in longer], [r["response"] for r in longer]).is_ood.mean() < 0.3


def test_geometry_tells_a_factor_from_a_turn(saved: tuple[Path, Any, Any]) -> None:
    state = OODGuard.from_pretrained(*saved).state
    known = state.identity.canaries
    assert known is not None
    thrice = Canaries({name: 3 * v for name, v in known.vectors.items()}, known.rewards)
    scale, left, drift = geometry(state, thrice)
    assert scale["final"] == pytest.approx(3)
    assert left["final"] == pytest.approx(0, abs=1e-6)
    assert drift["final"] == pytest.approx(1, rel=1e-3)
    assert geometry(state, None) == ({}, {}, {})


def test_a_turn_that_is_small_beside_a_large_mean_is_seen(saved: tuple[Path, Any, Any]) -> None:
    guard = OODGuard.from_pretrained(*saved)
    state = guard.state
    known = state.identity.canaries
    assert known is not None
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(32, 32)).Q
    far = 40 * known.vectors["final"].norm(dim=1).mean() * torch.ones(32) / 32**0.5
    old = {**known.vectors, "final": known.vectors["final"] + far}
    new = {**known.vectors, "final": known.vectors["final"] @ turn.T + far}
    moved = replace(state, identity=replace(state.identity, canaries=replace(known, vectors=old)))
    # The detector stands at the same far place.
    detector = moved.detectors["final"]
    tensors = detector.state_tensors()
    shifted = {**tensors, "center": tensors["center"] + far, "means": tensors["means"] + far.double()}
    moved = replace(moved, detectors={**moved.detectors, "final": type(detector).from_state(shifted)})
    scale, left, drift = geometry(moved, replace(known, vectors=new))
    assert left["final"] < UNEXPLAINED
    assert drift["final"] > DRIFT
    assert _turned(scale, left, drift) == ["final"]


# -- what a review found


@pytest.mark.parametrize("how", ["calibrate", "recalibrate"])
def test_new_thresholds_bind_the_guard_to_the_model_they_hold_for(how: str, saved: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = saved
    other = moved(copy.deepcopy(model), 3 * torch.eye(32))
    # Nothing was compared at load, so nothing was allowed either.
    guard = OODGuard.from_pretrained(folder, other, tokenizer, verify="config", allow=("parameters",))
    guard._swap(replace(guard.state, overrides=()))
    getattr(guard, how)(sample(), progress=False)
    guard.save_pretrained(folder, overwrite=True)
    OODGuard.from_pretrained(folder, other, tokenizer).detach()
    with pytest.raises(MismatchError, match="parameters"):
        OODGuard.from_pretrained(folder, model, tokenizer)


def test_calibrating_on_turned_vectors_warns(saved: tuple[Path, Any, Any]) -> None:
    torch.manual_seed(0)
    guard = load_on(saved, moved(copy.deepcopy(saved[1]), torch.linalg.qr(torch.randn(32, 32)).Q))
    with pytest.warns(CalibrationWarning, match=r"vectors of \['final'\] are not those that the guard was fitted on"):
        guard.calibrate(sample(), progress=False)


@pytest.mark.parametrize("dtypes", [("float16", "bfloat16"), ("float32", "bfloat16")])
def test_two_roundings_of_one_checkpoint_are_the_same_weights(dtypes: tuple[str, str], tiny_decoder: Any) -> None:
    model, _ = tiny_decoder
    one, other = (WeightSamples.of(copy.deepcopy(model).to(getattr(torch, name))) for name in dtypes)
    assert check_weights(one, other, dtypes) == []
    with pytest.raises(MismatchError, match="parameters differ"):
        check_weights(one, other, ("float32", "float32"))
    with torch.no_grad():
        model.score.weight.mul_(1.1)
    with pytest.raises(MismatchError, match="weights: 1 of"):
        check_weights(one, WeightSamples.of(model), (dtypes[0], "float32"))


def test_persistent_buffers_are_sampled(tiny_decoder: Any) -> None:
    model, _ = tiny_decoder
    model.register_buffer("running_mean", torch.zeros(3))
    before = WeightSamples.of(model)
    model.running_mean.add_(1)
    with pytest.raises(MismatchError, match="weights: 1 of"):
        check_weights(before, WeightSamples.of(model), ("float32", "float32"))


@pytest.mark.filterwarnings("default::rm_ood.CalibrationWarning")
def test_a_model_whose_canaries_are_not_finite_is_bound_without_them(
    tiny_decoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rm_ood.identity.CANARIES", (*CANARIES[:7], ("boom", "boom")))
    model, tokenizer = tiny_decoder
    boom = tokenizer("boomboom").input_ids[-1]

    def overflow(module: Any, args: Any, output: Tensor) -> Tensor:
        return torch.where((args[0] == boom)[:, :, None], torch.inf, output)

    handle = model.model.embed_tokens.register_forward_hook(overflow)
    with pytest.warns(CalibrationWarning, match="without canaries .*the model's answers are non_finite"):
        fitted(model, tokenizer).save_pretrained(tmp_path / "guard")
    handle.remove()
    assert OODGuard.from_pretrained(tmp_path / "guard", model, tokenizer).state.identity.canaries is None


def test_a_fingerprint_that_says_nothing_is_refused(saved: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = saved
    guard = OODGuard.from_pretrained(folder)
    guard._swap(replace(guard.state, identity=Identity({})))
    guard.save_pretrained(folder, overwrite=True)
    for allowed in (False, True):
        with pytest.raises(MismatchError, match="does not say which reward model it was fitted on"):
            OODGuard.from_pretrained(folder, model, tokenizer, allow_dtype_change=allowed)


def test_a_setting_that_differs_is_named(saved: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = saved
    model.config.rms_norm_eps = 1e-3
    with pytest.raises(MismatchError, match=r"config: guard has rms_norm_eps 1e-06, not 0\.001"):
        OODGuard.from_pretrained(folder, model, tokenizer)


@pytest.mark.parametrize("allow", ["weights", ("weight",)])
def test_what_cannot_be_allowed_is_told(allow: Any, saved: tuple[Path, Any, Any]) -> None:
    with pytest.raises(InputError, match=r"allow=.*expected a list of fields: 'weights', 'canaries'"):
        OODGuard.from_pretrained(*saved, allow=allow)


def test_an_adapter_that_is_switched_later_is_told(saved: tuple[Path, Any, Any]) -> None:
    _, model, tokenizer = saved
    guard = fitted(model, tokenizer)
    assert not any(verdicts(guard).reasons)
    lora(model)
    assert all("model_mismatch:adapters" in reasons for reasons in verdicts(guard).reasons)
