from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rm_ood.errors import MismatchError
from rm_ood.fingerprint import check_fingerprint, fingerprint
from rm_ood.text import TextEncoder


def take(model: Any, tokenizer: Any, **changed: Any) -> dict[str, str]:
    text = TextEncoder(tokenizer, "plain", max_length=changed.pop("max_length", None)).contract()
    return fingerprint(model, tokenizer, **{"head": None, "read_out": "auto", "text": text, **changed})


@pytest.fixture
def model_and_tokenizer(tiny_decoder: tuple[Any, Any], minilm: tuple[Any, Any]) -> tuple[Any, Any]:
    """The decoder beside the encoder's tokenizer, which is quicker to hash than its own."""
    return tiny_decoder[0], minilm[1]


def test_the_same_model_has_the_same_fingerprint_after_use(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    before = take(model, tokenizer)
    # Calls leave padding and truncation switched on in the tokenizer's own state.
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    again = take(copy.deepcopy(model), tokenizer)
    tokenizer("a", padding=False, truncation=False)
    assert again == before
    assert check_fingerprint(before, again, allow=()) == []
    assert json.loads(json.dumps(before)) == before
    assert all(isinstance(value, str) for value in before.values())


def change_head(model: Any) -> None:
    with torch.no_grad():
        model.score.weight[0, 3] += 1e-3


def replace_config(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model.config, name, value)


def change_rope(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500_000.0}


def add_adapter(model: Any) -> None:
    model.model.layers[0].adapter = nn.Linear(32, 2)


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        (change_head, {"head_weights"}),
        (change_rope, {"config"}),
        (add_adapter, {"parameters", "training_mode"}),
        (replace_config("pad_token_id", 7), {"config"}),
        (replace_config("rms_norm_eps", 1e-3), {"config"}),
        (lambda model: model.to(torch.bfloat16), {"dtype", "head_weights"}),
    ],
    ids=["head", "rope", "adapter", "pad", "norm", "dtype"],
)
def test_row37_another_model_is_named_by_tier_and_field(
    model_and_tokenizer: tuple[Any, Any], change: Callable[[Any], Any], fields: set[str]
) -> None:
    model, tokenizer = model_and_tokenizer
    saved = take(model, tokenizer)
    change(model)
    found = take(model, tokenizer)
    # The sketch tells other heads from rounded ones, so it moves a little with every change of the weights; the pad id is
    # recorded in plain sight beside the config that holds it.
    assert {name for name in saved if saved[name] != found[name]} - {"head_sketch", "pad_token_id"} == fields
    with pytest.raises(MismatchError, match=r"fingerprint tier 0") as error:
        check_fingerprint(saved, found, allow=())
    assert all(f"{name}: guard has " in str(error.value) for name in fields)
    assert "fit a new guard" in str(error.value)
    assert ("allow_dtype_change=True" in str(error.value)) == ("dtype" in fields)


def test_row37_another_head_of_the_same_model_differs(model_and_tokenizer: tuple[Any, Any]) -> None:
    saved, found = take(*model_and_tokenizer), take(*model_and_tokenizer, head="model.layers.5.mlp.down_proj")
    assert (saved["head_path"], found["head_path"]) == ("score", "model.layers.5.mlp.down_proj")
    with pytest.raises(MismatchError, match=r"head_path: guard has score, model has model.layers.5"):
        check_fingerprint(saved, found, allow=("dtype",))


def test_row37_tokenizer_template_and_text_settings_are_compared(
    tiny_decoder: tuple[Any, Any], minilm: tuple[Any, Any]
) -> None:
    model, tokenizer = tiny_decoder
    saved = take(model, tokenizer)
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("helpful", "helpless")
    added = copy.deepcopy(tokenizer)
    added.add_special_tokens({"additional_special_tokens": ["<new>"]})
    for found, fields in [
        (take(model, other), {"chat_template"}),
        (take(model, added), {"tokenizer", "special_tokens"}),
        (take(model, tokenizer, max_length=100), {"text"}),
        (take(model, tokenizer, read_out="last_token"), {"read_out"}),
    ]:
        differing = {name for name in saved if saved[name] != found[name]}
        assert differing
        assert differing <= fields
        with pytest.raises(MismatchError, match=f"{min(differing)}: guard has"):
            check_fingerprint(saved, found, allow=())
    text = {"format": "pair"}
    encoder = fingerprint(*minilm, head=None, read_out="auto", text=text)
    with pytest.raises(MismatchError, match="architecture: guard has LlamaForSequenceClassification, model has Bert"):
        check_fingerprint(saved, encoder, allow=("dtype",))


def test_row38_another_dtype_may_be_allowed_and_is_told(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    saved = take(model, tokenizer)
    found = take(model.to(torch.bfloat16), tokenizer)
    assert (saved["dtype"], found["dtype"]) == ("float32", "bfloat16")
    assert check_fingerprint(saved, found, allow=("dtype",)) == ["dtype", "head_weights"]
    # The permission is for another dtype, not for another head in the same one.
    with pytest.raises(MismatchError, match="head_weights"):
        check_fingerprint(saved, {**saved, "head_weights": "0" * 64}, allow=("dtype",))


def test_padding_side_and_commit_are_recorded_and_never_compared(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    saved = take(model, tokenizer)
    side = tokenizer.padding_side
    tokenizer.padding_side = "left" if side == "right" else "right"
    model.config._commit_hash = "abc"
    found = take(model, tokenizer)
    tokenizer.padding_side = side
    assert found["padding_side"] != saved["padding_side"]
    assert found["commit"] == "abc"
    assert check_fingerprint(saved, found, allow=()) == []


def test_a_field_that_the_model_lacks_differs(model_and_tokenizer: tuple[Any, Any]) -> None:
    saved = take(*model_and_tokenizer)
    found = {name: value for name, value in saved.items() if name != "text"}
    with pytest.raises(MismatchError, match=r"text: guard has .*, model has -"):
        check_fingerprint(saved, found, allow=())


def test_an_offloaded_head_is_not_read(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    model.score.to("meta")
    assert take(model, tokenizer)["head_weights"] == "offloaded"


def test_head_weights_are_hashed_in_every_dtype(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    hashes = {
        take(model.to(dtype), tokenizer)["head_weights"] for dtype in (torch.float64, torch.float16, torch.bfloat16)
    }
    assert len(hashes) == 3


def test_row38_a_change_of_dtype_does_not_excuse_another_head(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    saved = take(model, tokenizer)
    torch.nn.init.normal_(model.score.weight)
    found = take(model.to(torch.bfloat16), tokenizer)
    with pytest.raises(MismatchError, match="head_sketch"):
        check_fingerprint(saved, found, allow=("dtype",))
