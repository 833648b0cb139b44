"""Every row of table 2.3: reward models outside transformers, read through the registry or by the user's own options."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import published
import pytest
import torch
from conftest import preference_rows
from test_capture import left
from torch import Tensor, nn

from rm_ood import CaptureError, InputError, OODGuard, RewardReader, register_reader
from rm_ood.capture import Capture, Captured
from rm_ood.readers import _READERS, reader_of
from rm_ood.spans import Spans
from rm_ood.text import Batch, TextEncoder

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")

PAD = 0
PAIRS = [
    ("What should we cook tonight?", "Soup with bread."),
    ("Name a river.", "The Danube, which is long, and passes through ten countries on its way to the sea."),
    ("Write a haiku about the sea at night, please, and make it sad.", "No."),
]


@dataclass(frozen=True)
class Row:
    """A published reward model, the options that a guard on it needs, and what its head is called."""

    name: str
    build: Callable[[Any], nn.Module]
    head: str
    options: dict[str, Any] = field(default_factory=dict)
    suffix: tuple[int, ...] = ()


ROWS = (
    Row("OpenAssistant-pythia", published.GPTNeoXRewardModel, "out_proj"),
    Row("ArmoRM", published.LlamaForRewardModelWithGating, "regression_layer"),
    Row("QRM", published.LlamaForRewardModelWithGating31, "regression_layer"),
    Row("LDL-Reward", published.LDLRewardModel27B, "regression_layer"),
    Row("URM", published.LlamaForSequenceClassificationWithNormal_Weights, "score"),
    Row("GRM", published.GRewardModel, "v_head.summary"),
    Row("INF-ORM", published.INFORMForSequenceClassification, "score.2"),
    Row("INF-ORM-backbone-output", published.INFORMForSequenceClassification, "score", {"head": "score"}),
    Row("Qwen2.5-Math-RM", published.Qwen2ForRewardModel, "score.2"),
    Row("InternLM2-reward", published.InternLM2ForRewardModel, "v_head", suffix=(49_151,)),
    Row("UltraRM", published.LlamaRewardModel, "regression_head"),
    Row("Starling", published.GPTRewardModel, "v_head"),
    Row("Beaver", published.LlamaForScore, "score_head"),
    Row("Nemotron-HF", published.causal, "lm_head", {"head": "lm_head", "reward": "logits:0", "read_out": "last_token"}),
    Row("OpenRLHF", published.RewardModel, "value_head"),
)  # fmt: skip
# Rewards that are more than one column of the head's output: several objectives, or standardised afterwards.
DERIVED = {"ArmoRM", "QRM", "LDL-Reward", "URM", "Beaver", "OpenRLHF"}
every = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"2.3-{row.name}")


def model_of(row: Row) -> nn.Module:
    torch.manual_seed(0)
    return row.build(published.config(PAD)).eval()


@pytest.fixture(scope="module")
def tokenizer(decoder_tokenizer: Any) -> Any:
    """SmolLM2's, with a pad that is not the end of a turn: rules that stop at the first pad need one."""
    apart = copy.deepcopy(decoder_tokenizer)
    apart.pad_token = "<|endoftext|>"
    return apart


def batch(tokenizer: Any, row: Row) -> Batch:
    text = TextEncoder(tokenizer, "chat", pad_id=PAD, suffix=row.suffix)
    return text.pad([text.encode(*pair) for pair in PAIRS])


def run(capture: Capture, given: Batch) -> tuple[Any, Captured]:
    with torch.inference_mode():
        return capture.forward(given.inputs, given.spans)


@every
def test_the_head_gives_the_reward_from_the_captured_vector(row: Row, tokenizer: Any) -> None:
    model, given = model_of(row), batch(tokenizer, row)
    capture = Capture(model, ("response/mean@0.5",), **row.options)
    assert capture.head_path == row.head
    _, captured = run(capture, given)
    assert captured.rewards.shape == (3,)
    assert captured.rewards.std() > 1e-4
    assert not captured.mismatch.any()
    if row.name in DERIVED:
        return
    with torch.inference_mode():
        again = model.get_submodule(row.head)(captured.vectors["final"])[:, 0]
    torch.testing.assert_close(again, captured.rewards)


@every
def test_the_models_own_output_is_bit_identical(row: Row, tokenizer: Any) -> None:
    model, given = model_of(row), batch(tokenizer, row)
    extra = reader_of(model).inputs
    with torch.inference_mode():
        bare = model(**given.inputs, **extra)
    output, _ = run(Capture(model, ("response/mean@0.5",), **row.options), given)
    assert type(output) is type(bare)
    for one, other in zip(tensors(output), tensors(bare), strict=True):
        assert torch.equal(one, other)


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor)]


@every
def test_a_wrong_reading_is_seen_by_the_self_check(row: Row, tokenizer: Any) -> None:
    given = batch(tokenizer, row)
    wrong = _other_head(model_of(row), row)
    _, captured = run(wrong, given)
    assert captured.mismatch.all()


TOKENS = [row for row in ROWS if row.name not in ("OpenAssistant-pythia", "ArmoRM", "QRM", "LDL-Reward", "Nemotron-HF")]


@pytest.mark.parametrize("row", TOKENS, ids=lambda row: f"2.3-{row.name}")
def test_a_wrong_position_is_seen_by_the_self_check(row: Row, tokenizer: Any) -> None:
    capture = Capture(model_of(row), (), **{**row.options, "read_out": "first"})
    assert run(capture, batch(tokenizer, row))[1].mismatch.all()


def _other_head(model: nn.Module, row: Row) -> Capture:
    """The same capture, with the head's output on its way to the reward changed behind the hook."""
    capture = Capture(model, (), **row.options)

    def shift(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + 1

    # A later forward hook changes what the model goes on with, not what the guard saw.
    model.get_submodule(row.head).register_forward_hook(shift)
    return capture


@every
def test_a_guard_fits_checks_and_loads(row: Row, tokenizer: Any, tmp_path: Any) -> None:
    model = model_of(row)
    options = {"channels": "final", "alpha": 0.2, "text_format": "chat", "on_bad": "error", **row.options}
    with OODGuard(model, tokenizer, **options) as guard:
        guard.fit(preference_rows(140), calibration=0.6, progress=False)
        prompts, responses = zip(*PAIRS, strict=True)
        before = guard.check(prompts, responses)
        assert not any("read_out_mismatch" in reasons for reasons in before.reasons)
        guard.save_pretrained(tmp_path / "guard")
    with OODGuard.from_pretrained(tmp_path / "guard", model, tokenizer) as loaded:
        after = loaded.check(prompts, responses)
    assert after.p_values.tolist() == before.p_values.tolist()
    assert after.rewards.tolist() == before.rewards.tolist()


def test_gated_models_give_the_prompts_vector_at_the_gate(tokenizer: Any) -> None:
    row = next(r for r in ROWS if r.name == "ArmoRM")
    output, captured = run(Capture(model_of(row), ("prompt/prompt_end",)), batch(tokenizer, row))
    assert torch.equal(captured.vectors["prompt/prompt_end"], output.prompt_embedding)
    assert torch.equal(captured.vectors["final"], output.hidden_state)


def test_an_mlp_head_offers_the_backbones_output_and_the_last_layers_input(tokenizer: Any) -> None:
    row = next(r for r in ROWS if r.name == "INF-ORM")
    model, given = model_of(row), batch(tokenizer, row)
    _, last = run(Capture(model, ()), given)
    _, backbone = run(Capture(model, (), head="score"), given)
    with torch.inference_mode():
        made = torch.relu(model.score[0](backbone.vectors["final"]))
    torch.testing.assert_close(made, last.vectors["final"])


def test_a_new_kind_is_a_few_lines(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class MyRewardModel(published.LlamaRewardModel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            value = self.regression_head(self.hidden(input_ids, attention_mask))
            return {"quality": value[:, -1, 0], "loss": torch.tensor(0.0)}

    monkeypatch.setattr("rm_ood.readers._READERS", dict(_READERS))
    torch.manual_seed(0)
    model, row = MyRewardModel(published.config(PAD)).eval(), ROWS[0]
    text = TextEncoder(tokenizer, "chat", pad_id=PAD)
    given = text.pad([text.encode(*PAIRS[0])])
    register_reader("MyRewardModel", RewardReader(head="regression_head", reward="quality", read_out="last_token"))
    assert not run(Capture(model, ()), given)[1].mismatch.any()
    # The same without a registration, by options of the guard alone.
    monkeypatch.setattr("rm_ood.readers._READERS", {})
    options = {"head": "regression_head", "reward": "quality", "read_out": "last_token"}
    assert not run(Capture(model, (), **options), given)[1].mismatch.any()
    assert run(Capture(model, (), **{**options, "read_out": "first"}), batch(tokenizer, row))[1].mismatch.all()


@pytest.mark.parametrize("name", ["PairRM", "SteamSHP"])
def test_rankers_of_pairs_are_refused_by_name(name: str) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    if name == "PairRM":
        model: Any = published.DebertaV2PairRM(published.config(PAD))
    else:
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        )
    with pytest.raises(InputError, match=f"{type(model).__name__} compares two responses or writes its judgement"):
        Capture(model, ())


def test_a_language_model_says_how_a_logit_can_be_the_reward() -> None:
    with pytest.raises(
        InputError, match=r"LlamaForCausalLM.*It generates text; .*head='lm_head', reward='logits:<token id>'"
    ):
        Capture(published.causal(published.config(PAD)), ())


@pytest.mark.parametrize("name", ["v_head", "value_head", "score_head", "reward_head"])
def test_value_heads_of_unknown_classes_are_found_by_their_names(name: str, tokenizer: Any) -> None:
    class Unheard(published.RewardModel):
        def build(self, config: Any) -> None:
            setattr(self, name, nn.Linear(published.WIDTH, 1))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            value = getattr(self, name)(self.hidden(input_ids, attention_mask))[:, :, 0]
            return value[torch.arange(len(value)), published.last_attended(attention_mask)]

    model = Unheard(published.config(PAD)).eval()
    capture = Capture(model, ())
    assert capture.head_path == name
    assert not run(capture, batch(tokenizer, ROWS[0]))[1].mismatch.any()


def test_a_dictionary_and_a_tuple_carry_their_verdicts(tokenizer: Any) -> None:
    for name in ("Beaver", "Qwen2.5-Math-RM", "UltraRM"):
        row = next(r for r in ROWS if r.name == name)
        model = model_of(row)
        guard = OODGuard(model, tokenizer, channels="final", alpha=0.2, text_format="chat")
        guard.fit(preference_rows(140), calibration=0.6, progress=False)
        inputs = guard.encode(*(list(side) for side in zip(*PAIRS, strict=True)))
        with torch.inference_mode():
            bare = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        output = guard(**inputs)
        assert isinstance(output, type(bare))
        assert len(output.ood) == 3
        if isinstance(bare, dict):
            assert set(output) == set(bare)
            assert all(torch.equal(output[key], bare[key]) for key in bare)
        else:
            assert all(torch.equal(a, b) for a, b in zip(output, bare, strict=True))


def test_an_output_without_the_reward_is_an_error(tokenizer: Any) -> None:
    row = next(r for r in ROWS if r.name == "Beaver")
    with pytest.raises(InputError, match="reward='quality': not among the model's outputs"):
        run(Capture(model_of(row), (), reward="quality"), batch(tokenizer, row))


def test_a_head_that_is_not_called_is_an_error(tokenizer: Any) -> None:
    row = next(r for r in ROWS if r.name == "LDL-Reward")
    model = model_of(row)
    model.unused = nn.Linear(published.WIDTH, 1)
    with pytest.raises(CaptureError, match=r"no activation captured for \['final'\].*'unused'"):
        Capture(model, (), head="unused", reward="score").forward(batch(tokenizer, row).inputs, Spans(None, None, None))


def test_a_value_for_every_token_needs_a_named_token_and_is_told_unchecked(tokenizer: Any) -> None:
    row = next(r for r in ROWS if r.name == "Nemotron-HF")
    given = batch(tokenizer, row)
    with pytest.raises(InputError, match=r"a value for every token.*read_out='last_token'"):
        run(Capture(model_of(row), (), head="lm_head", reward="logits:0"), given)
    assert run(Capture(model_of(row), (), **row.options), given)[1].unchecked
    others = [r for r in ROWS if r is not row]
    assert not any(run(Capture(model_of(r), (), **r.options), batch(tokenizer, r))[1].unchecked for r in others)


def test_a_plain_classifier_with_openrlhfs_setting_stays_one(tiny_decoder: Any) -> None:
    model, _ = tiny_decoder
    model.config.value_head_prefix = "score"
    assert reader_of(model) == RewardReader()


def test_a_reader_names_its_own_column(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Five(published.LlamaRewardModel):
        def build(self, config: Any) -> None:
            self.regression_head = nn.Linear(published.WIDTH, 5)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            value = self.regression_head(self.hidden(input_ids, attention_mask))
            return {"logits": value[torch.arange(len(value)), published.last_attended(attention_mask)]}

    monkeypatch.setattr("rm_ood.readers._READERS", dict(_READERS))
    register_reader("Five", RewardReader(head="regression_head", reward="logits:3", read_out="last_token"))
    capture = Capture(Five(published.config(PAD)).eval(), ())
    output, captured = run(capture, batch(tokenizer, ROWS[0]))
    assert torch.equal(captured.rewards, output["logits"][:, 3])
    assert not captured.mismatch.any()


@pytest.mark.parametrize("name", ["OpenAssistant-pythia", "ArmoRM", "LDL-Reward"])
def test_decoders_that_pool_by_themselves_take_left_padding(name: str, tokenizer: Any) -> None:
    row = next(r for r in ROWS if r.name == name)
    capture, given = Capture(model_of(row), ()), batch(tokenizer, row)
    reference = run(capture, given)[1]
    padded = run(capture, left(given))[1]
    torch.testing.assert_close(padded.rewards, reference.rewards, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded.vectors["final"], reference.vectors["final"], rtol=1e-3, atol=1e-3)


def test_a_head_below_a_module_of_that_name_is_found(tiny_decoder: Any) -> None:
    class Around(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module
            self.config = module.config

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    model, own = tiny_decoder
    text = TextEncoder(own, "plain")
    given = text.pad([text.encode(*pair) for pair in PAIRS])
    capture = Capture(Around(model).eval(), ("response/mean@0.5",))
    assert capture.head_path == "module.score"
    assert capture.hook_points()["final"] == "score"
    assert not run(capture, given)[1].mismatch.any()


def test_outputs_that_take_no_attribute(tokenizer: Any) -> None:
    from collections import namedtuple

    from rm_ood.outputs import with_verdicts

    pair = namedtuple("pair", "logits loss")
    carried = with_verdicts(pair(1, 2), "verdicts")  # type: ignore[arg-type]
    assert (carried.logits, carried.loss, carried.ood) == (1, 2, "verdicts")
    assert isinstance(carried, pair)
    with pytest.raises(InputError, match=r"takes no attribute to carry the verdicts.*guard\.observe"):
        with_verdicts(7, "verdicts")  # type: ignore[arg-type]
