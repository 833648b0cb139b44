from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from rm_ood.errors import InputError, MismatchError
from rm_ood.reward_model import (
    check_padding,
    eval_mode,
    find_blocks,
    find_head,
    load_reward_model,
    read_out_positions,
    read_reward,
    reward_column,
    text_config,
)

# Read-out columns of the three items below.
AT = torch.tensor([0, 1, 0])


def outputs(logits: Any) -> Any:
    return SimpleNamespace(logits=logits)


# -- loading


def save(model: Any, tokenizer: Any, path: Path) -> str:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_saved_model_loads_in_eval_mode_with_its_weights(tmp_path: Path, tiny_decoder: tuple[Any, Any]) -> None:
    folder = save(*tiny_decoder, tmp_path)
    model, tokenizer = load_reward_model(folder, device="cpu")
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model.score.weight, tiny_decoder[0].score.weight, rtol=0, atol=0)
    assert tokenizer.is_fast
    half, _ = load_reward_model(folder, dtype="bfloat16", device="cpu")
    assert half.dtype == torch.bfloat16


def test_a_checkpoint_without_a_reward_head_is_refused(tmp_path: Path, tiny_decoder: tuple[Any, Any]) -> None:
    folder = save(tiny_decoder[0].model, tiny_decoder[1], tmp_path)
    with pytest.raises(
        InputError, match=r"lacks 1 weights of LlamaForSequenceClassification \(first: \['score.weight'\]\)"
    ):
        load_reward_model(folder)


REMOTE = """
import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel


class ShippedRewardModel(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        value = self.v_head(self.model(input_ids, attention_mask=attention_mask)[0])[:, :, 0]
        last = attention_mask.cumsum(1).argmax(1)
        return value[torch.arange(len(value)), last]
"""


@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForSequenceClassification"])
def test_code_of_a_repository_runs_only_on_the_callers_word(
    auto_class: str, tmp_path: Path, decoder_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    scope: dict[str, Any] = {}
    exec(REMOTE, scope)
    torch.manual_seed(0)
    model = scope["ShippedRewardModel"](LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                                    num_attention_heads=2, vocab_size=49152, pad_token_id=0))  # fmt: skip
    folder = tmp_path / "shipped"
    model.save_pretrained(folder)
    decoder_tokenizer.save_pretrained(folder)
    (folder / "modeling_shipped.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {auto_class: "modeling_shipped.ShippedRewardModel"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"ships code of its own, .* trust_remote_code=True"):
        load_reward_model(str(folder), device="cpu")
    loaded, _ = load_reward_model(str(folder), device="cpu", trust_remote_code=True)
    assert type(loaded).__name__ == "ShippedRewardModel"
    torch.testing.assert_close(loaded.v_head.weight, model.v_head.weight, rtol=0, atol=0)
    assert find_head(loaded)[0] == "v_head"


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "~/none"])
def test_row23_a_missing_folder_is_named(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no reward model folder at {path}"):
        load_reward_model(path)


# -- head and blocks


def test_the_head_is_the_last_linear_with_num_labels_outputs(
    tiny_decoder: tuple[Any, Any], minilm: tuple[Any, Any]
) -> None:
    decoder, _ = tiny_decoder
    assert find_head(decoder) == ("score", decoder.score)
    assert find_head(minilm[0]) == ("classifier", minilm[0].classifier)
    assert find_head(decoder, "model.layers.0.mlp") == ("model.layers.0.mlp", decoder.model.layers[0].mlp)


def test_row39_a_model_without_a_head_lists_its_linears(tiny_decoder: tuple[Any, Any]) -> None:
    body = tiny_decoder[0].model
    with pytest.raises(InputError) as error:
        find_head(body)
    message = str(error.value)
    assert "LlamaModel has no Linear with num_labels=1 outputs" in message
    assert "Pass head='dotted.path'. Candidates: [" in message
    assert "'layers.5.mlp.down_proj (64 -> 32)'" in message
    # The last six, not all of them.
    assert message.count("->") == 6


def test_row39_a_model_without_a_config_lists_its_linears() -> None:
    with pytest.raises(InputError, match=r"Sequential has no Linear with num_labels=None.*'0 \(3 -> 1\)'"):
        find_head(nn.Sequential(nn.Linear(3, 1)))


def test_row39_an_unknown_head_lists_the_linears(tiny_decoder: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match=r"head='value': no such module. Candidates: .*score \(32 -> 1\)"):
        find_head(tiny_decoder[0], "value")


def test_blocks_are_the_list_as_long_as_the_model_is_deep(
    tiny_decoder: tuple[Any, Any], minilm: tuple[Any, Any]
) -> None:
    assert find_blocks(tiny_decoder[0]) is tiny_decoder[0].model.layers
    assert find_blocks(minilm[0]) is minilm[0].bert.encoder.layer
    assert find_blocks(tiny_decoder[0], "model.layers") is tiny_decoder[0].model.layers


def test_a_model_without_such_a_list_names_those_it_has(tiny_decoder: tuple[Any, Any]) -> None:
    model, _ = tiny_decoder
    with pytest.raises(InputError, match=r"layers='blocks': no such ModuleList. There are: \['model.layers'\]"):
        find_blocks(model, "blocks")
    model.config.num_hidden_layers = 4
    with pytest.raises(InputError, match=r"num_hidden_layers=4 blocks; lists: \{'model.layers': 6\}.*channels='final'"):
        find_blocks(model)


def test_the_text_config_is_the_inner_one_of_a_multimodal_model(tiny_decoder: tuple[Any, Any]) -> None:
    assert text_config(tiny_decoder[0]).pad_token_id is not None
    plain = SimpleNamespace(config=SimpleNamespace(pad_token_id=3))
    assert text_config(plain).pad_token_id == 3


# -- reward


def test_the_reward_is_the_logit_that_was_named() -> None:
    logits = torch.arange(6.0).reshape(3, 2)
    assert read_reward(outputs(logits[:, :1]), "logits", AT).tolist() == [0, 2, 4]
    assert read_reward(outputs(logits), "logits:1", AT).tolist() == [1, 3, 5]
    # One value per item, and one per token.
    assert read_reward(outputs(logits[:, 0]), "logits", AT).tolist() == [0, 2, 4]
    assert read_reward(outputs(logits[:, :, None]), "logits", AT).tolist() == [0, 3, 4]


@pytest.mark.parametrize(
    ("output", "reward"),
    [
        (torch.tensor([1.0, 2.0, 3.0]), "auto"),
        (torch.tensor([[1.0], [2.0], [3.0]]), "output"),
        ((torch.tensor([1.0, 2.0, 3.0]), "cache"), "auto"),
        ({"end_scores": torch.tensor([[1.0], [2.0], [3.0]]), "scores": torch.zeros(3, 4, 1)}, "auto"),
        ({"scores": [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)]}, "scores"),
        (SimpleNamespace(logits=None, score=torch.tensor([1.0, 2.0, 3.0])), "auto"),
        (SimpleNamespace(logits=torch.zeros(3, 2), score=torch.tensor([1.0, 2.0, 3.0])), "score"),
    ],
    ids=["tensor", "column", "tuple", "dict", "list", "field", "named field"],
)
def test_the_reward_is_found_in_outputs_of_every_shape(output: Any, reward: str) -> None:
    assert read_reward(output, reward, AT).tolist() == [1, 2, 3]
    assert (reward_column("logits"), reward_column("logits:1")) == (0, 1)


@pytest.mark.parametrize(
    ("logits", "reward", "message"),
    [
        (torch.ones(3, 1), "score", r"reward='score': not among the model's outputs, \['logits'\]"),
        (torch.ones(3, 1), "logits:first", "expected an output's name"),
        (torch.ones(3, 1), "logits:²", "expected an output's name"),
        (None, "logits", r"not among the model's outputs.*reward='end_scores', or 'output'"),
        (None, "auto", "reward='auto': not among"),
        (torch.ones(3, 4, 1, 1), "logits", r"in the model's output, got \(3, 1, 1\)|got \(3, 4, 1, 1\)"),
        (torch.ones(3), "logits:1", r"got \(3,\)"),
        (torch.ones(3, 2), "logits", "returns 2 values per item; name the one that is the reward: reward='logits:0'"),
        (torch.ones(3, 2), "logits:2", "reward='logits:2': the model returns 2 values per item"),
    ],
)
def test_row39_rewards_that_cannot_be_told_are_refused(logits: Any, reward: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_reward(outputs(logits), reward, AT)


# -- read-out


def model_with_pad(pad: int | None) -> Any:
    return SimpleNamespace(config=SimpleNamespace(pad_token_id=pad))


IDS = torch.tensor([[5, 6, 7, 0, 0], [0, 5, 6, 7, 8], [5, 0, 6, 0, 0], [0, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("rule", "mask", "expected"),
    [
        ("auto", MASK, [2, 4, 2, 0]),
        ("non_pad", MASK, [2, 4, 2, 0]),
        ("last_token", MASK, [2, 4, 3, 1]),
        ("last_token", MASK.bool(), [2, 4, 3, 1]),
        ("last_token", None, [4, 4, 4, 4]),
        ("first", MASK, [0, 0, 0, 0]),
    ],
)
def test_read_out_positions(rule: str, mask: Any, expected: list[int]) -> None:
    inputs = {"input_ids": IDS} if mask is None else {"input_ids": IDS, "attention_mask": mask}
    assert read_out_positions(model_with_pad(0), inputs, rule).tolist() == expected


def test_row53_row54_the_position_comes_from_the_ids_as_in_transformers(tiny_decoder: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_decoder
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id
    eos = tokenizer.eos_token_id
    ids = torch.tensor([[10, 11, 12, eos, eos, eos], [10, 11, 12, 13, 14, eos], [eos, eos, 10, 11, 12, 13]])
    inputs = {"input_ids": ids, "attention_mask": (ids != eos).long()}
    # The token before the final eos, wherever the padding is.
    assert read_out_positions(model, inputs, "auto").tolist() == [2, 4, 5]
    with torch.inference_mode():
        every = model.score(model.model(**inputs).last_hidden_state)
        rewards = model(**inputs).logits
    torch.testing.assert_close(every[torch.arange(3), torch.tensor([2, 4, 5])], rewards, rtol=0, atol=0)


def test_row55_a_batch_without_a_pad_token_is_refused_before_its_forward() -> None:
    model = model_with_pad(None)
    with pytest.raises(
        InputError, match=r"no pad_token_id, so a batch of 4 .* model.config.pad_token_id = .* batch_size=1"
    ):
        read_out_positions(model, {"input_ids": IDS}, "auto")
    with pytest.raises(InputError, match="a batch of 2"):
        check_padding(model, 2)
    check_padding(model, 1)
    check_padding(model_with_pad(0), 64)
    assert read_out_positions(model, {"input_ids": IDS[:1]}, "auto").tolist() == [4]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(InputError, match="read_out='middle': expected 'auto' or one of"):
        read_out_positions(model_with_pad(0), {"input_ids": IDS}, "middle")


# -- training mode


def test_row40_training_mode_is_refused(tiny_decoder: tuple[Any, Any]) -> None:
    model, _ = tiny_decoder
    model.model.layers[3].train()
    with (
        pytest.raises(MismatchError, match=r"in training mode.*model.eval\(\) first, or pass eval_mode='switch'"),
        eval_mode(model, switch=False),
    ):
        pytest.fail("the pass ran")
    assert model.model.layers[3].training
    assert not model.training


def test_row40_switching_restores_every_modules_own_mode(tiny_decoder: tuple[Any, Any]) -> None:
    model, _ = tiny_decoder
    model.train()
    model.model.layers[3].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with eval_mode(model, switch=True):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(ZeroDivisionError), eval_mode(model, switch=True):
        _ = 1 / 0
    assert {name: module.training for name, module in model.named_modules()} == before


def test_eval_mode_leaves_a_model_in_eval_mode_alone(tiny_decoder: tuple[Any, Any]) -> None:
    with eval_mode(tiny_decoder[0], switch=False):
        pass
    assert not any(module.training for module in tiny_decoder[0].modules())
