"""Every row of 2.4: the ways reward models are run, each supported or refused by name."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from families import FAMILIES
from torch import nn

from rm_ood import CaptureError, Decisions, InputError, OODGuard

pytestmark = [
    pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning"),
    # What torch's compiler and PEFT say of their own affairs.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
]
ROWS = preference_rows(140)
PROMPTS = [row["prompt"] for row in preference_rows(8, seed=5)]
RESPONSES = [row["chosen"] for row in preference_rows(8, seed=5)]
OPTIONS: dict[str, Any] = {"alpha": 0.2, "text_format": "plain", "max_length": 64, "batch_size": 8}
# Compiled code may fuse and reorder float32 sums.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def row(name: str) -> Any:
    """A row of the support table: the id that `pytest -v` shows."""
    return pytest.mark.parametrize("way", [f"2.4-{name}"])


def fitted(model: Any, tokenizer: Any, **options: Any) -> OODGuard:
    return OODGuard(model, tokenizer, **{**OPTIONS, **options}).fit(ROWS, calibration=0.6, progress=False)


def verdicts(guard: OODGuard) -> Decisions:
    return guard.check(PROMPTS, RESPONSES)


def assert_same(one: Decisions, other: Decisions, *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """The same verdicts: rewards and distances within tolerance, flags equal, and no item that could not be scored."""
    np.testing.assert_allclose(one.rewards, other.rewards, rtol=rtol, atol=atol)
    for axis in one.axes:
        for name, channel in one.axis(axis).channels.items():
            np.testing.assert_allclose(channel.scores, other.axis(axis).channel(name).scores, rtol=10 * rtol, atol=atol)
    assert one.is_ood.tolist() == other.is_ood.tolist()
    for decisions in (one, other):
        assert not any({"read_out_mismatch", "non_finite"} & set(reasons) for reasons in decisions.reasons)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def shallow(decoder_tokenizer: Any) -> tuple[Any, Any]:
    """Two layers: compiling takes seconds a layer."""
    family = next(f for f in FAMILIES if f.name == "Llama")
    return family.build(num_hidden_layers=2), decoder_tokenizer


@pytest.fixture(scope="module")
def eager(shared_decoder: Any, decoder_tokenizer: Any) -> Decisions:
    """The verdicts on the tiny decoder as it is."""
    return verdicts(fitted(copy.deepcopy(shared_decoder), decoder_tokenizer))


# -- compiled


@pytest.mark.parametrize(
    ("how", "backend"), [("torch.compile", "eager"), ("torch.compile", "inductor"), ("model.compile", "aot_eager")]
)
@row("compile-before-first-call")
def test_a_model_compiled_around_the_hooks_gives_the_same(way: str, how: str, backend: str, shallow: Any) -> None:
    model, tokenizer = shallow
    eager = verdicts(fitted(copy.deepcopy(model), tokenizer))
    if how == "model.compile":
        model.compile(backend=backend, fullgraph=True, dynamic=True)
        compiled = model
    else:
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    assert_same(verdicts(fitted(compiled, tokenizer)), eager)


@row("compile-after-attach")
def test_compiling_after_the_guard_was_made_keeps_its_hooks(way: str, shallow: Any) -> None:
    guard = fitted(*shallow)
    eager = verdicts(guard)
    shallow[0].compile(backend="eager", dynamic=True)
    assert_same(verdicts(guard), eager)


@row("compile-late-attach-detected")
def test_hooks_set_after_the_first_compiled_call_are_told(way: str, shallow: Any) -> None:
    model, tokenizer = shallow
    compiled = torch.compile(model, backend="eager", dynamic=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        compiled(input_ids=ids, attention_mask=torch.ones_like(ids))
        guard = OODGuard(compiled, tokenizer, **OPTIONS)
        with pytest.raises(CaptureError, match=r"no activation captured.*torch\._dynamo\.reset\(\)"):
            guard._model_column().capture.forward(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, _spans(ids)
            )
    torch._dynamo.reset()
    guard.fit(ROWS, calibration=0.6, progress=False)


def _spans(ids: torch.Tensor) -> Any:
    from rm_ood.spans import Spans

    half = torch.arange(ids.shape[1]).expand_as(ids) < 2
    return Spans(torch.full((len(ids),), 1), half, ~half)


@row("compile-threads")
def test_four_threads_through_one_compiled_model(way: str, shallow: Any) -> None:
    model, tokenizer = shallow
    eager = verdicts(fitted(copy.deepcopy(model), tokenizer))
    guard = fitted(torch.compile(model, backend="eager", dynamic=True), tokenizer)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: verdicts(guard), range(12)))
    for decisions in found:
        assert_same(decisions, eager)


@pytest.mark.filterwarnings("ignore::rm_ood.TokenisationWarning")
@row("compile-T5")
def test_t5_under_compile(way: str, decoder_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(decoder_tokenizer)
    tokenizer.pad_token = "<|endoftext|>"
    options = {"append_eos": True}
    model = next(f for f in FAMILIES if f.name == "T5").build(num_layers=1)
    bare = verdicts(fitted(copy.deepcopy(model), tokenizer, **options))
    compiled = torch.compile(model, backend="eager", dynamic=True)
    assert_same(verdicts(fitted(compiled, tokenizer, **options)), bare)


# -- adapters


def lora(model: Any, *, spread: float = 0.2, **options: Any) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    settings = {"r": 4, "target_modules": "all-linear", "task_type": TaskType.SEQ_CLS, **options}
    wrapped = get_peft_model(model, LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name or ("modules_to_save" in name and "score" in name):
                parameter.add_(spread * torch.randn_like(parameter))
    return wrapped


@row("peft-lora-modules_to_save")
def test_lora_with_a_saved_head_and_its_adapter_switched_off(way: str, tiny_decoder: Any, eager: Decisions) -> None:
    model, tokenizer = tiny_decoder
    wrapped = lora(model)
    guard = fitted(wrapped, tokenizer)
    assert guard._model_column().capture.head_path == "score"
    on = verdicts(guard)
    assert not np.allclose(on.rewards, eager.rewards, rtol=0.01)
    assert not any(on.reasons)
    with wrapped.disable_adapter():
        off = verdicts(guard)
    assert all("model_mismatch:adapters" in reasons for reasons in off.reasons)
    np.testing.assert_allclose(off.rewards, eager.rewards, **CLOSE)
    assert not any("read_out_mismatch" in reasons for reasons in off.reasons)
    assert_same(verdicts(guard), on)


@row("peft-of-transformers")
def test_adapters_of_transformers_own_support(way: str, tiny_decoder: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    model, tokenizer = tiny_decoder
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    model.eval()
    guard = fitted(model, tokenizer)
    assert guard.state.identity.fields["adapters"] == "mine"
    assert not any(verdicts(guard).reasons)
    model.disable_adapters()
    assert all("model_mismatch:adapters" in reasons for reasons in verdicts(guard).reasons)


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
@row("peft-all-linear")
def test_lora_on_every_linear_with_and_without_a_task(way: str, task: str | None, tiny_decoder: Any) -> None:
    model, tokenizer = tiny_decoder
    guard = fitted(lora(model, task_type=task), tokenizer)
    assert guard._model_column().capture.head_path == "score"
    verdicts(guard)


@row("peft-head-is-adapted")
def test_a_head_that_is_a_lora_layer_itself(way: str, tiny_decoder: Any) -> None:
    model, tokenizer = tiny_decoder
    wrapped = lora(model, target_modules=["score", "q_proj"], task_type=None, r=1)
    guard = fitted(wrapped, tokenizer)
    assert guard._model_column().capture.head_path == "score"
    assert not any("read_out_mismatch" in reasons for reasons in verdicts(guard).reasons)


@row("peft-after-attach")
def test_adapters_put_on_after_the_guard_was_made(way: str, tiny_decoder: Any) -> None:
    model, tokenizer = tiny_decoder
    guard = fitted(model, tokenizer)
    before = verdicts(guard)
    wrapped = lora(model)
    moved = verdicts(guard)
    assert not np.allclose(moved.rewards, before.rewards, rtol=0.01)
    assert_same(moved, verdicts_of(guard, wrapped, tokenizer))


def verdicts_of(guard: OODGuard, model: Any, tokenizer: Any) -> Decisions:
    """The verdicts of the same fitted guard on another model."""
    other = OODGuard(model, tokenizer, **OPTIONS)
    other._swap(guard._fitted())
    return verdicts(other)


@row("peft-merge_and_unload")
def test_merging_the_adapter_keeps_the_guard_on_the_model(way: str, tiny_decoder: Any) -> None:
    model, tokenizer = tiny_decoder
    wrapped = lora(model)
    guard = fitted(wrapped, tokenizer)
    before = verdicts(guard)
    merged = wrapped.merge_and_unload()
    assert_same(verdicts_of(guard, merged, tokenizer), before)


@row("peft-merge-in-place")
def test_merging_in_place_moves_the_hooks_along(way: str, tiny_decoder: Any) -> None:
    model, tokenizer = tiny_decoder
    wrapped = lora(model)
    # The guard is on the inner model, whose modules the merge replaces.
    guard = fitted(wrapped.get_base_model(), tokenizer)
    before = verdicts(guard)
    wrapped.merge_and_unload()
    assert isinstance(model.score, nn.Linear)
    assert_same(verdicts(guard), before)


@row("peft-prompt-learning-refused")
def test_prompt_learning_is_refused_by_name(way: str, tiny_decoder: Any) -> None:
    from peft import PromptTuningConfig, TaskType, get_peft_model

    model, tokenizer = tiny_decoder
    wrapped = get_peft_model(model, PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3))
    with pytest.raises(InputError, match=r"PromptTuningConfig.*virtual tokens before the text.*Guard a LoRA"):
        OODGuard(wrapped, tokenizer, **OPTIONS)


# -- where the weights are


@pytest.mark.parametrize("hooked", ["before", "after"])
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
@row("accelerate-offload")
def test_offloaded_weights(
    way: str, how: str, hooked: str, tiny_decoder: Any, eager: Decisions, tmp_path: Path
) -> None:
    import accelerate

    model, tokenizer = tiny_decoder
    bare = copy.deepcopy(model)
    guard = OODGuard(model, tokenizer, **OPTIONS) if hooked == "before" else None
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:
        accelerate.dispatch_model(
            model, {"model": "cpu", "score": "disk"}, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
        )
    assert any(p.is_meta for p in model.parameters())
    guard = guard or OODGuard(model, tokenizer, **OPTIONS)
    guard.fit(ROWS, calibration=0.6, progress=False)
    assert_same(verdicts(guard), eager)
    guard.save_pretrained(tmp_path / "guard")
    OODGuard.from_pretrained(tmp_path / "guard", model, tokenizer).detach()
    # The same weights at home.
    OODGuard.from_pretrained(tmp_path / "guard", bare, tokenizer).detach()


@row("accelerate-prepare_model-bf16")
def test_a_model_prepared_for_mixed_precision(way: str, tiny_decoder: Any, eager: Decisions) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    model, tokenizer = tiny_decoder
    try:
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model, evaluation_mode=True)
        decisions = verdicts(fitted(prepared, tokenizer))
    finally:
        AcceleratorState._reset_state()
        PartialState._reset_state()
    assert not any("read_out_mismatch" in reasons for reasons in decisions.reasons)
    np.testing.assert_allclose(decisions.rewards, eager.rewards, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@row("half-precision")
def test_half_precision(way: str, dtype: torch.dtype, tiny_decoder: Any, eager: Decisions) -> None:
    model, tokenizer = tiny_decoder
    decisions = verdicts(fitted(model.to(dtype), tokenizer))
    np.testing.assert_allclose(decisions.rewards, eager.rewards, rtol=0.1, atol=0.1)
    assert not any("read_out_mismatch" in reasons for reasons in decisions.reasons)


@row("autocast")
def test_autocast(way: str, tiny_decoder: Any, eager: Decisions) -> None:
    model, tokenizer = tiny_decoder
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decisions = verdicts(fitted(model, tokenizer))
    np.testing.assert_allclose(decisions.rewards, eager.rewards, rtol=0.1, atol=0.1)
    assert not any("read_out_mismatch" in reasons for reasons in decisions.reasons)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.filterwarnings("ignore:.*inputs will be cast.*")
@row("bitsandbytes")
def test_quantised_weights(way: str, bits: int, decoder_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    bare = next(f for f in FAMILIES if f.name == "Llama").build(hidden_size=64, intermediate_size=128, head_dim=32)
    bare.save_pretrained(tmp_path / "model")
    # Its kernels for CPUs with bfloat16 instructions take 4-bit weights by 32 rows: no projection is
    # narrower, and the reward head of one row stays as it is.
    how = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["score"] if bits == 4 else None,
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", quantization_config=how, device_map="cpu"
    ).eval()
    guard = fitted(model, decoder_tokenizer)
    assert not any("read_out_mismatch" in reasons for reasons in verdicts(guard).reasons)
    guard.save_pretrained(tmp_path / "guard")
    OODGuard.from_pretrained(tmp_path / "guard", model, decoder_tokenizer).detach()


# -- training, threads, copies


@pytest.mark.parametrize("reentrant", [False, True])
@row("gradient-checkpointing")
def test_gradient_checkpointing_in_training(way: str, reentrant: bool, tiny_decoder: Any) -> None:
    model, tokenizer = tiny_decoder
    guard = fitted(model, tokenizer)
    inputs = guard.encode(PROMPTS, RESPONSES)
    capture = guard._model_column().capture
    names = {"input_ids", "attention_mask"}
    from rm_ood.spans import Spans

    spans = Spans(**{k: v for k, v in inputs.items() if k not in names})
    ids = {k: v for k, v in inputs.items() if k in names}
    with torch.no_grad():
        reference = capture.forward(ids, spans)[1]
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    fired = []
    handle = model.score.register_forward_hook(lambda *_: fired.append(1))
    output, captured = capture.forward(ids, spans)
    output.logits.sum().backward()
    handle.remove()
    assert len(fired) == 1
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert not captured.mismatch.any()
    for name, vector in captured.vectors.items():
        assert not vector.requires_grad
        torch.testing.assert_close(vector, reference.vectors[name], **CLOSE)


@row("inference_mode")
def test_inside_inference_mode(way: str, tiny_decoder: Any, eager: Decisions) -> None:
    model, tokenizer = tiny_decoder
    with torch.inference_mode():
        guard = fitted(model, tokenizer)
        inside = verdicts(guard)
    assert_same(inside, eager)
    # Nothing that was made inside hinders work outside.
    guard.calibrate([{"prompt": r["prompt"], "response": r["chosen"]} for r in preference_rows(120, seed=7)])
    np.testing.assert_allclose(verdicts(guard).rewards, eager.rewards, **CLOSE)


@row("copy.deepcopy")
def test_a_copied_model_does_not_disturb_the_guard(way: str, tiny_decoder: Any, eager: Decisions) -> None:
    model, tokenizer = tiny_decoder
    guard = fitted(model, tokenizer)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.score.weight.mul_(3)
    other = fitted(twin, tokenizer)
    np.testing.assert_allclose(verdicts(other).rewards, 3 * eager.rewards, rtol=1e-4)
    assert_same(verdicts(guard), eager)


@row("pickle")
def test_a_hooked_model_and_its_guard_can_be_pickled(way: str, tiny_decoder: Any, eager: Decisions) -> None:
    model, tokenizer = tiny_decoder
    guard = fitted(model, tokenizer)
    again = pickle.loads(pickle.dumps(model))
    assert_same(verdicts_of(guard, again, tokenizer), eager)
    alone = pickle.loads(pickle.dumps(guard))
    with pytest.raises(Exception, match="has no reward model, only vectors"):
        verdicts(alone)
    stream = io.BytesIO()
    torch.save(model, stream)


@row("save_pretrained")
def test_a_hooked_model_is_saved_like_any_other(way: str, tiny_decoder: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny_decoder
    fitted(model, tokenizer)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert not any(module._forward_hooks for module in again.modules())
    assert torch.equal(again.score.weight, model.score.weight)


@row("direct-calls")
def test_backbone_and_head_called_by_hand(way: str, tiny_decoder: Any, eager: Decisions) -> None:
    model, tokenizer = tiny_decoder
    guard = fitted(model, tokenizer)
    inputs = guard.encode(PROMPTS, RESPONSES)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    last = mask.sum(1) - 1
    with torch.inference_mode(), guard.observe(**inputs) as seen:
        # As TRL's get_reward did: the backbone by its prefix, then the head.
        hidden = getattr(model, model.base_model_prefix)(input_ids=ids, attention_mask=mask)[0]
        rewards = model.score(hidden)[torch.arange(len(ids)), last, 0]
    assert_same(seen.decide(rewards), eager)
    assert all("unchecked_read_out" in reasons for reasons in seen.decide().reasons)
    wrong = seen.decide(rewards + 1)
    assert wrong.is_ood.all()
    assert all("read_out_mismatch" in reasons for reasons in wrong.reasons)
    with pytest.raises(CaptureError, match="no activation captured"), guard.observe(**inputs):
        pass


@row("eight-threads")
def test_eight_threads_through_one_guard(way: str, tiny_decoder: Any, eager: Decisions) -> None:
    guard = fitted(*tiny_decoder)
    with ThreadPoolExecutor(8) as pool:
        for decisions in pool.map(lambda _: verdicts(guard), range(24)):
            assert_same(decisions, eager)


@row("head-replaced-under-load")
def test_a_head_that_is_replaced_under_eight_threads(way: str, tiny_decoder: Any) -> None:
    model, tokenizer = tiny_decoder
    guard = fitted(model, tokenizer)
    before = verdicts(guard)
    model.score = copy.deepcopy(model.score)
    with ThreadPoolExecutor(8) as pool:
        for decisions in pool.map(lambda _: verdicts(guard), range(16)):
            assert_same(decisions, before)
    guard.detach()
    live = [h for m in model.modules() for h in m._forward_hooks.values() if getattr(h, "live", False)]
    assert live == []


# -- parallel


@row("DataParallel-refused")
def test_data_parallel_is_refused_by_name(way: str, tiny_decoder: Any) -> None:
    model, tokenizer = tiny_decoder
    with pytest.raises(InputError, match=r"DataParallel runs replicas.*model\.module"):
        OODGuard(nn.DataParallel(model), tokenizer, **OPTIONS)


@row("DeepSpeed-ZeRO-3-refused")
def test_zero_3_is_refused_by_name(way: str, tiny_decoder: Any) -> None:
    model, tokenizer = tiny_decoder
    # What deepspeed leaves of a parameter on each rank: an empty tensor with an id.
    for i, parameter in enumerate(model.parameters()):
        parameter.ds_id = i
        parameter.data = torch.empty(0)
    with pytest.raises(InputError, match="DeepSpeed ZeRO-3 partitions the parameters"):
        OODGuard(model, tokenizer, **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tensor-parallel"])
@row("two gloo processes: DDP, FSDP2, tensor parallel")
def test_two_processes(way: str, kind: str, decoder_tokenizer: Any, tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_processes.py")
    # Out of GGUF, each process would take seconds to make it.
    decoder_tokenizer.save_pretrained(tmp_path / "words")
    command = [sys.executable, str(script), kind, str(tmp_path / "store"), str(tmp_path / "words")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("same") == 2
