"""Every family of table 2.1: head, vector, self-check, spans, padding, batches; each a test id of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from families import FAMILIES, Family, tiny
from test_capture import PAIRS, left, run
from torch import Tensor

from rm_ood import OODGuard, OODGuardWarning
from rm_ood.capture import Capture
from rm_ood.config import GuardConfig
from rm_ood.embed import Embedder
from rm_ood.errors import InputError
from rm_ood.reward_model import find_blocks, find_head, pad_id
from rm_ood.text import Batch, Encoded, TextEncoder

CHANNELS = ("response/mean@1.0", "prompt/mean@1.0", "prompt/prompt_end@1.0", "response/readout@1.0")


def some(which: Callable[[Family], bool]) -> Any:
    """A test of the families for which `which` holds, one id each."""
    return pytest.mark.parametrize("family", [f for f in FAMILIES if which(f)], ids=lambda f: f"2.1-{f.name}")


every = some(lambda f: True)


@pytest.fixture(scope="session")
def tokenizers(decoder_tokenizer: Any, minilm: tuple[Any, Any]) -> dict[str, Any]:
    """Real tokenizers: pad == eos for decoders, a text pair for encoders, an end token that is not the pad for the rest."""
    apart = copy.deepcopy(decoder_tokenizer)
    apart.pad_token = "<|endoftext|>"
    return {"decoder": decoder_tokenizer, "multimodal": apart, "encoder": minilm[1], "seq2seq": apart}


def guarded(family: Family, tokenizers: dict[str, Any]) -> tuple[Embedder, TextEncoder]:
    model = tiny(family.name)
    config = GuardConfig(channels=CHANNELS, append_eos=family.kind == "seq2seq")
    embedder = Embedder(model, tokenizers[family.kind], config, Capture(model, CHANNELS))
    return embedder, embedder.text("pair" if family.kind == "encoder" else "plain")


def items(text: TextEncoder) -> list[Encoded]:
    return [text.encode(*pair) for pair in PAIRS]


def batch_of(embedder: Embedder, text: TextEncoder, encoded: list[Encoded]) -> Batch:
    return text.pad(encoded, beside=embedder.capture.reader.pad_columns)


@every
def test_the_head_is_found_and_its_input_gives_the_reward(family: Family, tokenizers: dict[str, Any]) -> None:
    embedder, text = guarded(family, tokenizers)
    assert embedder.capture.head_path == family.head
    captured = run(embedder.capture, batch_of(embedder, text, items(text)))
    assert not captured.mismatch.any()
    assert captured.rewards.std() > 1e-3
    head = find_head(embedder.model)[1]
    with torch.inference_mode():
        again = head(captured.vectors["final"])[:, 0]
    torch.testing.assert_close(again, captured.rewards, rtol=1e-5, atol=1e-6)


@some(lambda f: not f.pooled)
def test_the_self_check_sees_a_wrong_position(family: Family, tokenizers: dict[str, Any]) -> None:
    model = tiny(family.name)
    embedder, text = guarded(family, tokenizers)
    batch = batch_of(embedder, text, items(text))
    wrong = Capture(model, (), read_out="first")
    assert run(wrong, batch).mismatch.all()


@every
def test_block_channels_stand_at_the_spans_and_the_prompt_end(family: Family, tokenizers: dict[str, Any]) -> None:
    embedder, text = guarded(family, tokenizers)
    batch = batch_of(embedder, text, items(text))
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = find_blocks(embedder.model)[-1].register_forward_hook(keep)
    captured = run(embedder.capture, batch)
    handle.remove()
    spans, hidden = batch.spans, seen[0]
    assert spans.prompt_end is not None
    assert spans.prompt_mask is not None
    assert spans.response_mask is not None
    rows = torch.arange(len(hidden))
    torch.testing.assert_close(captured.vectors["prompt/prompt_end@1.0"], hidden[rows, spans.prompt_end])
    for name, mask in (("prompt/mean@1.0", spans.prompt_mask), ("response/mean@1.0", spans.response_mask)):
        expected = torch.stack([row[m].mean(0) for row, m in zip(hidden, mask, strict=True)])
        torch.testing.assert_close(captured.vectors[name], expected, rtol=1e-4, atol=1e-4)


@every
def test_the_prompt_ends_where_the_response_begins(family: Family, tokenizers: dict[str, Any]) -> None:
    _, text = guarded(family, tokenizers)
    tokenizer = tokenizers[family.kind]
    for prompt, response in PAIRS:
        if family.kind == "encoder" and not (prompt + response).isascii():
            continue  # MiniLM's vocabulary lacks these characters
        item = text.encode(prompt, response)
        end = item.prompt_end + 1
        for ids, told in ((item.input_ids[:end], prompt), (item.input_ids[end:], response)):
            read = tokenizer.decode(ids, skip_special_tokens=True)
            assert "".join(read.lower().split()) == "".join(told.lower().split())


@every
def test_a_batch_of_mixed_lengths_gives_what_each_item_gives_alone(family: Family, tokenizers: dict[str, Any]) -> None:
    embedder, text = guarded(family, tokenizers)
    four = items(text)
    together = run(embedder.capture, batch_of(embedder, text, four))
    for i, item in enumerate(four):
        alone = run(embedder.capture, batch_of(embedder, text, [item]))
        assert not alone.mismatch.any()
        torch.testing.assert_close(alone.rewards[0], together.rewards[i], rtol=2e-4, atol=2e-4)
        for name, vector in together.vectors.items():
            torch.testing.assert_close(alone.vectors[name][0], vector[i], rtol=2e-3, atol=2e-3)


@every
def test_left_padding_gives_the_same_or_is_refused_by_name(family: Family, tokenizers: dict[str, Any]) -> None:
    embedder, text = guarded(family, tokenizers)
    batch = batch_of(embedder, text, items(text))
    padded = left(batch)
    reference = run(embedder.capture, batch)
    if family.left == "with position_ids":
        with pytest.raises(InputError, match=f"left padding changes what {family.class_name}.*absolute.*position_ids"):
            run(embedder.capture, padded)
        mask = padded.inputs["attention_mask"]
        padded.inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    elif family.left != "yes":
        why = "position 0" if family.kind == "encoder" else "shifted"
        with pytest.raises(InputError, match=f"left padding changes what {family.class_name}.*{why}.*Pad on the right"):
            run(embedder.capture, padded)
        return
    found = run(embedder.capture, padded)
    assert not found.mismatch.any()
    torch.testing.assert_close(found.rewards, reference.rewards, rtol=2e-4, atol=2e-4)
    for name, vector in found.vectors.items():
        torch.testing.assert_close(vector, reference.vectors[name], rtol=2e-3, atol=2e-3)


@some(lambda f: f.left != "yes")
def test_what_is_refused_under_left_padding_does_change(family: Family, tokenizers: dict[str, Any]) -> None:
    embedder, text = guarded(family, tokenizers)
    batch = batch_of(embedder, text, items(text))
    with torch.inference_mode():
        right, moved = (embedder.model(**b.inputs).logits[:, 0] for b in (batch, left(batch)))
    assert (right - moved).abs().max() > 0.01 * right.std()


@some(lambda f: f.kind == "decoder")
def test_pad_equal_to_eos_reads_the_token_before_the_final_eos(family: Family, tokenizers: dict[str, Any]) -> None:
    embedder, _ = guarded(family, tokenizers)
    tokenizer = tokenizers["decoder"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == pad_id(embedder.model)
    text = TextEncoder(tokenizer, "plain", append_eos=True)
    four = items(text)
    batch = text.pad(four)
    captured = run(embedder.capture, batch)
    assert not captured.mismatch.any()
    seen: list[Tensor] = []
    handle = find_head(embedder.model)[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    run(embedder.capture, batch)
    handle.remove()
    before = torch.tensor([len(item.input_ids) - 2 for item in four])
    assert torch.equal(captured.vectors["final"], seen[0][torch.arange(len(four)), before])


def test_encoded_batches_of_a_guard_are_those_of_check(decoder_tokenizer: Any, tokenizers: dict[str, Any]) -> None:
    family = next(f for f in FAMILIES if f.name == "T5Gemma")
    guard = OODGuard(
        tiny(family.name), tokenizers["seq2seq"], alpha=0.2, append_eos=True, text_format="plain", channels="final"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OODGuardWarning)
        guard.fit(preference_rows(140), calibration=0.6, progress=False)
    prompts, responses = zip(*PAIRS, strict=True)
    with torch.inference_mode():
        made = guard(**guard.encode(prompts, responses)).ood
    np.testing.assert_allclose(made.rewards, guard.check(prompts, responses).rewards, rtol=1e-4)
    guard.detach()
