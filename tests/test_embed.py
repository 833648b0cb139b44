from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows

from rm_ood.capture import Capture, Captured
from rm_ood.config import GuardConfig
from rm_ood.embed import Embedded, Embedder, embedded, merge, needed_channels
from rm_ood.errors import InputError, MismatchError
from rm_ood.text import Encoded, TextEncoder

CHANNELS = ("final", "prompt/mean@0.5", "response/mean@0.5", "prompt/mean@0.67")


def make(model: Any, tokenizer: Any, **settings: Any) -> Embedder:
    config = GuardConfig(**{"channels": CHANNELS, "batch_size": 4, **settings})
    return Embedder(model, tokenizer, config, Capture(model, needed_channels(config), read_out=config.read_out))


def items_of(text: TextEncoder, n: int) -> list[Encoded]:
    return [text.encode(row["prompt"], " " + row["chosen"]) for row in preference_rows(n)]


def collect(embedder: Embedder, items: list[Encoded], text: TextEncoder) -> Embedded:
    """All batches as one, in the order of the items."""
    order, parts = zip(*embedder.batches(items, text), strict=True)
    back = np.argsort(np.concatenate(order))
    vectors = {name: torch.cat([p.vectors[name] for p in parts])[back] for name in parts[0].vectors}
    return replace(merge(parts, back), vectors=vectors)


class Calls:
    """Counts the forward passes of a model."""

    def __init__(self, model: Any) -> None:
        self.n = 0
        self.modes: list[bool] = []
        self._handle = model.register_forward_pre_hook(self._count)

    def _count(self, module: Any, args: Any) -> None:
        self.n += 1
        self.modes.append(module.training)


def test_one_forward_per_batch_shortest_items_first(tiny_decoder: tuple[Any, Any]) -> None:
    embedder = make(*tiny_decoder)
    text = embedder.text("plain")
    items = items_of(text, 10)
    calls = Calls(tiny_decoder[0])
    order = np.concatenate([index for index, _ in embedder.batches(items, text)])
    assert calls.n == 3
    assert sorted(order.tolist()) == list(range(10))
    lengths = [len(items[i].input_ids) for i in order]
    assert lengths == sorted(lengths)
    assert list(embedder.batches([], text)) == []


def test_row56_the_batch_size_does_not_move_vectors_or_rewards(tiny_decoder: tuple[Any, Any]) -> None:
    text = make(*tiny_decoder).text("plain")
    items = items_of(text, 9)
    ones = collect(make(*tiny_decoder, batch_size=1), items, text)
    many = collect(make(*tiny_decoder, batch_size=9), items, text)
    np.testing.assert_allclose(ones.rewards, many.rewards, rtol=1e-4, atol=1e-4)
    for name in CHANNELS:
        torch.testing.assert_close(ones.vectors[name], many.vectors[name], rtol=1e-4, atol=1e-4)
    assert ones.lengths is not None
    assert ones.lengths.tolist() == [[sum(i.prompt_mask), sum(i.response_mask)] for i in items]
    assert ones.failed == [None] * 9
    assert ones.reasons == [()] * 9
    assert ones.rewards.dtype == np.float64


def test_row40_training_mode_is_refused_or_switched_and_restored(tiny_decoder: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_decoder
    text = make(model, tokenizer).text("plain")
    items = items_of(text, 3)
    model.config.attention_dropout = 0.5
    expected = collect(make(model, tokenizer), items, text)
    model.train()
    with pytest.raises(MismatchError, match="in training mode"):
        collect(make(model, tokenizer), items, text)
    calls = Calls(model)
    switched = collect(make(model, tokenizer, eval_mode="switch"), items, text)
    assert calls.modes == [False]
    assert model.training
    np.testing.assert_array_equal(switched.rewards, expected.rewards)


def test_row55_a_missing_pad_token_is_refused_before_the_forward(tiny_decoder: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_decoder
    text = make(model, tokenizer).text("plain")
    items = items_of(text, 5)
    model.config.pad_token_id = None
    calls = Calls(model)
    with pytest.raises(InputError, match=r"no pad_token_id, so a batch of 4 .*batch_size=1"):
        collect(make(model, tokenizer), items, text)
    assert calls.n == 0
    assert collect(make(model, tokenizer, batch_size=1), items, text).rewards.shape == (5,)
    # One item needs no padding, whatever the batch size.
    assert collect(make(model, tokenizer), items[:1], text).failed == [None]


def test_batches_are_padded_with_the_models_pad_id_and_not_the_tokenizers(tiny_decoder: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_decoder
    items = items_of(make(model, tokenizer).text("plain"), 5)
    expected = collect(make(model, tokenizer), items, make(model, tokenizer).text("plain"))
    # The model tells where an item ends by its own pad id; padded with another one it would read a pad.
    model.config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert model.config.pad_token_id != tokenizer.pad_token_id
    embedder = make(model, tokenizer)
    found = collect(embedder, items, embedder.text("plain"))
    np.testing.assert_allclose(found.rewards, expected.rewards, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny_decoder", "minilm"])
def test_a_strict_prompt_pass_is_a_second_forward_over_the_prompt_alone(
    name: str, request: pytest.FixtureRequest
) -> None:
    model, tokenizer = request.getfixturevalue(name)
    embedder, strict = make(model, tokenizer), make(model, tokenizer, prompt_pass=True)
    text = embedder.text("pair" if name == "minilm" else "plain")
    items = [text.encode("Name a river.", r) for r in ("\nThe Danube.", "\nThe Rhine, or the Elbe, I think.")]
    calls = Calls(model)
    once = collect(embedder, items, text)
    assert calls.n == 1
    twice = collect(strict, items, text)
    assert calls.n == 3
    for channel in ("prompt/mean@0.5", "prompt/mean@0.67"):
        first, second = twice.vectors[channel]
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
        agrees = torch.allclose(*once.vectors[channel], rtol=1e-4, atol=1e-4)
        assert agrees == (name == "tiny_decoder")
    for channel in ("final", "response/mean@0.5"):
        assert torch.equal(once.vectors[channel], twice.vectors[channel])
    np.testing.assert_array_equal(once.rewards, twice.rewards)


def test_a_strict_prompt_pass_without_prompt_channels_costs_nothing(tiny_decoder: tuple[Any, Any]) -> None:
    embedder = make(*tiny_decoder, prompt_pass=True, channels="final")
    text = embedder.text("plain")
    calls = Calls(tiny_decoder[0])
    collect(embedder, items_of(text, 3), text)
    assert calls.n == 1


def test_empty_spans_and_cuts_have_their_reasons(minilm: tuple[Any, Any]) -> None:
    embedder = make(*minilm, max_length=24)
    text = embedder.text("pair")
    items = [
        text.encode("hello", ""),
        text.encode("hello", "[PAD]"),
        text.encode("hello", "\u0301"),
        text.encode("", "fine"),
        text.encode("hello " * 10, "fine " * 30),
        text.encode("hello", "fine"),
    ]
    found = collect(embedder, items, text)
    assert found.reasons == [
        ("empty_response",),
        ("special_tokens_in_text", "empty_response_span"),
        ("empty_response_span",),
        ("empty_prompt_span",),
        ("truncated", "empty_prompt_span"),
        (),
    ]
    assert found.truncated.tolist() == [False, False, False, False, True, False]
    assert found.failed == [None] * 6


def test_row54_a_planted_read_out_is_named_a_mismatch(tiny_decoder: tuple[Any, Any]) -> None:
    embedder = make(*tiny_decoder, read_out="first")
    text = embedder.text("plain")
    assert collect(embedder, items_of(text, 3), text).failed == ["read_out_mismatch"] * 3


def test_what_cannot_be_trusted_is_named_row_by_row() -> None:
    vectors = torch.zeros(5, 3)
    deep = torch.zeros(5, 2)
    vectors[1, 2], deep[2, 0] = float("inf"), float("nan")
    rewards = torch.tensor([1.0, 1.0, 1.0, float("nan"), 1.0], dtype=torch.bfloat16)
    mismatch = torch.tensor([False, True, False, False, True])
    part = embedded(
        Captured({"final": vectors, "prompt/mean@0.5": deep}, rewards, mismatch), None, [()] * 5, np.zeros(5, bool)
    )
    assert part.failed == [None, "non_finite", "non_finite", "non_finite", "read_out_mismatch"]
    assert part.rewards.dtype == np.float64
    assert part.lengths is None


def test_merged_batches_come_out_in_the_order_asked_for() -> None:
    def part(*rewards: float) -> Embedded:
        n = len(rewards)
        lengths = np.array([[int(r), 1] for r in rewards])
        names: list[str | None] = [f"f{r:.0f}" for r in rewards]
        return Embedded({"final": torch.ones(n, 2)}, np.array(rewards), lengths, names, [(f"r{r:.0f}",) for r in rewards],
                        np.array([r == 2 for r in rewards]))  # fmt: skip

    whole = merge([part(3.0, 1.0), part(2.0)], np.array([1, 2, 0]))
    assert whole.vectors == {}
    assert whole.rewards.tolist() == [1, 2, 3]
    assert whole.lengths is not None
    assert whole.lengths.tolist() == [[1, 1], [2, 1], [3, 1]]
    assert whole.failed == ["f1", "f2", "f3"]
    assert whole.reasons == [("r1",), ("r2",), ("r3",)]
    assert whole.truncated.tolist() == [False, True, False]


def test_the_length_limit_is_the_smallest_that_holds(tiny_decoder: tuple[Any, Any], minilm: tuple[Any, Any]) -> None:
    assert make(*tiny_decoder).text("plain").max_length == 512
    assert make(*tiny_decoder, max_length=100).text("plain").max_length == 100
    assert make(*minilm).text("pair").max_length == 512
    model, tokenizer = tiny_decoder
    model.config.max_position_embeddings = -1
    assert make(model, tokenizer).text("plain").max_length == 1_000_000


def test_the_text_settings_reach_the_encoder(tiny_decoder: tuple[Any, Any]) -> None:
    embedder = make(*tiny_decoder, on_too_long="error", split_special_tokens=True, append_eos=True, max_length=9)
    assert embedder.text("plain").contract() == {
        "format": "plain", "max_length": 9, "on_too_long": "error", "split_special_tokens": True, "append_eos": True,
        "special_tokens": True, "suffix": [],
    }  # fmt: skip
    assert embedder.device == torch.device("cpu")


def test_final_is_captured_in_every_guard() -> None:
    assert needed_channels(GuardConfig(channels=("prompt/mean@0.5", "reward"))) == (
        "final",
        "prompt/mean@0.5",
        "reward",
    )
    assert needed_channels(GuardConfig(channels="final")) == ("final",)
