from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rm_ood.capture import Capture, Captured
from rm_ood.errors import CaptureError, InputError
from rm_ood.spans import Spans
from rm_ood.text import Batch, Encoded, TextEncoder

CHANNELS = (
    "response/mean@0.67", "prompt/mean@0.67", "prompt/mean@-5", "response/readout@0.5", "prompt/prompt_end@0.5", "reward",
)  # fmt: skip
AT_HEAD = ("response/mean", "prompt/mean", "prompt/prompt_end", "response/readout@final")
NOWHERE = Spans(None, None, None)
PAIRS = [
    ("What should we cook tonight?", " Soup with bread."),
    ("Name a river.", " The Danube, which is long, and passes through ten countries on its way to the sea."),
    ("Write a haiku about the sea at night, please, and make it sad.", " No."),
    ("你好，今天怎么样？", " 很好 👩‍👩‍👧 thanks."),
]


def encoded(text: TextEncoder, n: int = 4) -> list[Encoded]:
    return [text.encode(*PAIRS[i % 4]) for i in range(n)]


def left(batch: Batch) -> Batch:
    """The same batch with its padding on the left."""
    mask = batch.inputs["attention_mask"]
    shifts = [int(n) for n in mask.shape[1] - mask.sum(1)]

    def roll(x: Tensor) -> Tensor:
        return torch.stack([row.roll(shift) for row, shift in zip(x, shifts, strict=True)])

    spans = batch.spans
    assert spans.prompt_end is not None
    assert spans.prompt_mask is not None
    assert spans.response_mask is not None
    inputs = {name: roll(x) for name, x in batch.inputs.items()}
    return Batch(
        inputs, Spans(spans.prompt_end + torch.tensor(shifts), roll(spans.prompt_mask), roll(spans.response_mask))
    )


def run(capture: Capture, batch: Batch) -> Captured:
    with torch.inference_mode():
        return capture.forward(batch.inputs, batch.spans)[1]


@pytest.fixture
def decoder(tiny_decoder: tuple[Any, Any]) -> tuple[Any, TextEncoder]:
    return tiny_decoder[0], TextEncoder(tiny_decoder[1], "plain")


@pytest.fixture
def encoder(minilm: tuple[Any, Any]) -> tuple[Any, TextEncoder]:
    return minilm[0], TextEncoder(minilm[1], "pair")


# -- the reward is untouched


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("name", ["decoder", "encoder"])
def test_outputs_are_bit_identical_with_and_without_hooks(
    name: str, size: int, side: str, request: pytest.FixtureRequest
) -> None:
    model, text = request.getfixturevalue(name)
    if (name, side, size) == ("encoder", "left", 16):
        # Its own reward moves with the padding, so there is nothing to keep: refused, with the reason.
        batch = left(text.pad(encoded(text, size)))
        with pytest.raises(InputError, match=r"left padding changes what BertFor.* read at position 0"):
            Capture(model, CHANNELS).forward(batch.inputs, batch.spans)
        return
    batch = text.pad(encoded(text, size))
    batch = left(batch) if side == "left" else batch
    before = {key: value.clone() for key, value in batch.inputs.items()}
    with torch.inference_mode():
        bare = model(**batch.inputs).logits
        capture = Capture(model, CHANNELS)
        outputs, captured = capture.forward(batch.inputs, batch.spans)
        hooked = model(**batch.inputs).logits
        capture.detach()
        after = model(**batch.inputs).logits
    for logits in (outputs.logits, hooked, after):
        assert torch.equal(logits, bare)
    assert torch.equal(captured.rewards, bare[:, 0])
    assert not captured.mismatch.any()
    assert all(torch.equal(batch.inputs[key], value) for key, value in before.items())


def test_gradients_pass_through_a_hooked_model(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    batch = text.pad(encoded(text))
    capture = Capture(model, CHANNELS)
    outputs, captured = capture.forward(batch.inputs, batch.spans)
    outputs.logits.sum().backward()
    assert model.score.weight.grad.abs().sum() > 0
    assert not any(vector.requires_grad for vector in captured.vectors.values())
    assert not captured.rewards.requires_grad


# -- the vectors are the right ones


def span_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([row[m].double().mean(0) for row, m in zip(hidden, mask, strict=True)])


@pytest.mark.parametrize("side", ["right", "left"])
def test_decoder_channels_equal_the_hidden_states(decoder: tuple[Any, TextEncoder], side: str) -> None:
    model, text = decoder
    items = encoded(text)
    batch = left(text.pad(items)) if side == "left" else text.pad(items)
    captured = run(Capture(model, (*CHANNELS, *AT_HEAD)), batch)
    with torch.inference_mode():
        hidden = model(**batch.inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == 7
    rows = torch.arange(4)
    last = torch.tensor([len(i.input_ids) - 1 for i in items]) if side == "right" else torch.full((4,), -1)
    prompt_end, prompt, response = batch.spans.prompt_end, batch.spans.prompt_mask, batch.spans.response_mask
    assert prompt_end is not None
    assert prompt is not None
    assert response is not None
    # hidden_states[0] is the embedding, so block k is hidden_states[k + 1]; the last one is after the final norm.
    assert torch.equal(captured.vectors["final"], hidden[-1][rows, last])
    assert torch.equal(captured.vectors["response/readout@0.5"], hidden[3][rows, last])
    assert torch.equal(captured.vectors["prompt/prompt_end@0.5"], hidden[3][rows, prompt_end])
    assert torch.equal(captured.vectors["prompt/prompt_end"], hidden[-1][rows, prompt_end])
    for name, layer, mask in [
        ("response/mean@0.67", 4, response),
        ("prompt/mean@0.67", 4, prompt),
        ("prompt/mean@-5", 2, prompt),
        ("response/mean", 6, response),
        ("prompt/mean", 6, prompt),
    ]:
        expected = span_mean(hidden[layer], mask)
        torch.testing.assert_close(captured.vectors[name].double(), expected, rtol=1e-5, atol=1e-5)
    assert set(captured.vectors) == {"final", *CHANNELS, "response/mean", "prompt/mean", "prompt/prompt_end",
                                     "response/readout@final"} - {"reward"}  # fmt: skip


def test_encoder_channels_equal_the_hidden_states(encoder: tuple[Any, TextEncoder]) -> None:
    model, text = encoder
    batch = text.pad(encoded(text))
    captured = run(Capture(model, CHANNELS), batch)
    with torch.inference_mode():
        out = model.bert(**batch.inputs, output_hidden_states=True)
    assert batch.spans.prompt_mask is not None
    assert batch.spans.response_mask is not None
    assert torch.equal(captured.vectors["final"], out.pooler_output)
    for name, mask in [
        ("response/mean@0.67", batch.spans.response_mask),
        ("prompt/mean@0.67", batch.spans.prompt_mask),
    ]:
        expected = span_mean(out.hidden_states[4], mask)
        torch.testing.assert_close(captured.vectors[name].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_row52_row56_padding_and_batch_do_not_move_the_vectors(decoder: tuple[Any, TextEncoder], side: str) -> None:
    model, text = decoder
    capture = Capture(model, (*CHANNELS, *AT_HEAD))
    items = encoded(text)
    batch = text.pad(items)
    together = run(capture, left(batch) if side == "left" else batch)
    for i, item in enumerate(items):
        alone = run(capture, text.pad([item]))
        for name, vector in together.vectors.items():
            torch.testing.assert_close(vector[i], alone.vectors[name][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text_format", ["plain", "chat"])
def test_prompt_vectors_of_one_prompt_agree_whatever_the_response(
    tiny_decoder: tuple[Any, Any], text_format: str
) -> None:
    model, tokenizer = tiny_decoder
    text = TextEncoder(tokenizer, text_format)
    capture = Capture(model, ("prompt/mean@0.67", "prompt/mean", "prompt/prompt_end"))
    answers = ("\nNo.", "\nThe Danube, which is long and passes through ten countries.")
    captured = run(capture, text.pad([text.encode(PAIRS[0][0], answer) for answer in answers]))
    for name in ("prompt/mean@0.67", "prompt/mean", "prompt/prompt_end"):
        first, second = captured.vectors[name]
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*captured.vectors["final"], rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_final_keeps_the_models_dtype_and_the_check_holds_in_it(
    decoder: tuple[Any, TextEncoder], dtype: torch.dtype
) -> None:
    model, text = decoder
    captured = run(Capture(model.to(dtype), CHANNELS), text.pad(encoded(text)))
    assert captured.vectors["final"].dtype == dtype
    assert captured.vectors["prompt/mean@0.67"].dtype == torch.float32
    assert captured.rewards.dtype == dtype
    assert not captured.mismatch.any()


def test_an_empty_span_takes_the_read_out_vector(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    items = [text.encode(PAIRS[0][0], ""), text.encode(*PAIRS[1])]
    names = ("response/mean", "response/mean@0.5", "response/readout@0.5")
    vectors = run(Capture(model, names), text.pad(items)).vectors
    assert torch.equal(vectors["response/mean"][0], vectors["final"][0])
    assert torch.equal(vectors["response/mean@0.5"][0], vectors["response/readout@0.5"][0])
    assert not torch.equal(vectors["response/mean"][1], vectors["final"][1])


def test_infinite_columns_outside_the_span_do_not_poison_the_mean(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    batch = text.pad(encoded(text))
    assert batch.spans.response_mask is not None
    capture = Capture(model, ("response/mean@-1",))

    def poison(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[~batch.spans.response_mask] = float("inf")
        return hidden

    handle = model.model.layers[-1].register_forward_hook(poison, prepend=True)
    vectors = run(capture, batch).vectors
    handle.remove()
    assert vectors["response/mean@-1"].isfinite().all()


# -- the self-check


@pytest.mark.parametrize("rule", ["first", "last_token"])
def test_a_wrong_read_out_position_is_flagged_row_by_row(decoder: tuple[Any, TextEncoder], rule: str) -> None:
    model, text = decoder
    items = encoded(text)
    # Row 0 alone ends in the eos that is also the pad: there the last token is not the one that is read.
    items[0] = TextEncoder(text.tokenizer, "plain", append_eos=True).encode(*PAIRS[0])
    captured = run(Capture(model, (), read_out=rule), text.pad(items))
    expected = [True] * 4 if rule == "first" else [True, False, False, False]
    assert captured.mismatch.tolist() == expected


def test_row53_row54_pad_equal_to_eos_reads_the_token_before_the_final_eos(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    ended = TextEncoder(text.tokenizer, "plain", append_eos=True)
    assert model.config.pad_token_id == text.tokenizer.eos_token_id
    plain, closed = run_both = [run(Capture(model, ()), text.pad([e.encode(*p) for p in PAIRS])) for e in (text, ended)]
    assert not any(c.mismatch.any() for c in run_both)
    torch.testing.assert_close(plain.vectors["final"], closed.vectors["final"], rtol=1e-5, atol=1e-5)


def test_a_reward_that_the_head_did_not_give_is_flagged(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    capture = Capture(model, ())

    def shift(module: Any, args: Any, output: Any) -> Any:
        output.logits[1] += 1e-6 * output.logits[1].abs() + 1e-6
        return output

    handle = model.register_forward_hook(shift)
    captured = run(capture, text.pad(encoded(text)))
    handle.remove()
    assert captured.mismatch.tolist() == [False, True, False, False]


def test_rewards_that_are_nan_on_both_sides_agree(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    with torch.no_grad():
        model.score.weight[0, 0] = float("nan")
    captured = run(Capture(model, ()), text.pad(encoded(text)))
    assert captured.rewards.isnan().all()
    assert not captured.mismatch.any()


def test_one_of_several_labels_may_be_the_reward(tiny_decoder: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_decoder
    model.config.num_labels = 2
    model.num_labels = 2
    torch.manual_seed(1)
    model.score = nn.Linear(32, 2, bias=False)
    text = TextEncoder(tokenizer, "plain")
    batch = text.pad(encoded(text))
    with torch.inference_mode():
        logits = model(**batch.inputs).logits
    for column in (0, 1):
        captured = run(Capture(model, (), reward=f"logits:{column}"), batch)
        assert torch.equal(captured.rewards, logits[:, column])
        assert not captured.mismatch.any()


def test_row39_several_labels_without_a_choice_are_refused_when_the_guard_is_made(
    tiny_decoder: tuple[Any, Any],
) -> None:
    model, _ = tiny_decoder
    model.config.num_labels = 2
    model.score = nn.Linear(32, 2, bias=False)
    with pytest.raises(
        InputError, match=r"the head 'score' has 2 outputs.*reward='logits:0' to 'logits:1', or another head"
    ):
        Capture(model, ())
    with pytest.raises(InputError, match="reward='logits:2': the head 'score' has 2 outputs"):
        Capture(model, (), reward="logits:2")
    model.config.num_labels = 3
    with pytest.raises(InputError, match="no Linear with num_labels=3"):
        Capture(model, ())


def test_a_head_may_be_any_module(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    model.score = nn.Sequential(nn.Linear(32, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))
    captured = run(Capture(model, (), head="score"), text.pad(encoded(text)))
    assert captured.vectors["final"].shape == (4, 32)
    assert not captured.mismatch.any()


def test_a_module_that_is_not_the_head_is_flagged(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    captured = run(Capture(model, (), head="model.layers.5.mlp.down_proj", reward="logits:0"), text.pad(encoded(text)))
    assert captured.mismatch.all()


# -- what cannot be captured


def test_final_layer_spans_of_a_pooled_head_are_refused(encoder: tuple[Any, TextEncoder]) -> None:
    model, text = encoder
    capture = Capture(model, ("prompt/mean",))
    with pytest.raises(InputError, match=r"\['prompt/mean'\]: this head reads one pooled vector.*response/mean@1.0"):
        run(capture, text.pad(encoded(text)))
    capture.detach()


def test_span_channels_need_their_spans(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    batch = text.pad(encoded(text))
    for name, message in [
        ("prompt/prompt_end@0.5", "needs prompt_end"),
        ("prompt/mean@0.5", "needs the spans: pass prompt_end"),
        ("response/mean", "needs the spans"),
    ]:
        capture = Capture(model, (name,))
        with pytest.raises(InputError, match=message):
            capture.forward(batch.inputs, NOWHERE)
        capture.detach()
    assert set(Capture(model, ()).forward(batch.inputs, NOWHERE)[1].vectors) == {"final"}


def test_a_model_without_blocks_gives_final_only(decoder: tuple[Any, TextEncoder]) -> None:
    model, _ = decoder
    model.config.num_hidden_layers = 3
    Capture(model, ("final", "reward", "response/mean")).detach()
    with pytest.raises(InputError, match="no list of num_hidden_layers=3 blocks"):
        Capture(model, ("response/mean@0.5",))
    Capture(model, ("response/mean@0.5",), layers="model.layers").detach()
    with pytest.raises(InputError, match="no such layer in a model of 6 blocks"):
        Capture(model, ("response/mean@-9",), layers="model.layers")


class TupleBlock(nn.Module):
    """A block that returns a tuple, as many models' do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.inner(x), None


class TinyModel(nn.Module):
    """The least that a reward model is."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=1, num_hidden_layers=2, pad_token_id=0)
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(TupleBlock(nn.Linear(4, 4)) for _ in range(2))
        self.score = nn.Linear(4, 1)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)[0]
        scores = self.score(x)
        at = (torch.arange(x.shape[1]) * (input_ids != 0)).argmax(-1)
        return SimpleNamespace(logits=scores[torch.arange(len(x)), at])


def test_blocks_that_return_tuples_are_read() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    _, captured = Capture(model, ("response/readout@-1",)).forward({"input_ids": ids}, NOWHERE)
    assert torch.equal(captured.vectors["response/readout@-1"], captured.vectors["final"])
    assert not captured.mismatch.any()


# -- hooks come and go


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_row67_attach_and_detach_are_idempotent(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    batch = text.pad(encoded(text))
    capture = Capture(model, CHANNELS)
    # The head, and the blocks 1, 2 and 3.
    assert hooks(model) == 4
    capture.attach()
    assert hooks(model) == 4
    once = run(capture, batch)
    capture.detach()
    capture.detach()
    assert hooks(model) == 0
    with pytest.raises(CaptureError, match=r"hooks were removed .* call attach\(\)"):
        run(capture, batch)
    capture.attach()
    again = run(capture, batch)
    assert all(torch.equal(once.vectors[name], again.vectors[name]) for name in once.vectors)


def test_row67_two_guards_on_one_model_do_not_disturb_each_other(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    batch = text.pad(encoded(text))
    first, second = Capture(model, CHANNELS), Capture(model, ("response/mean@0.5",))
    before = run(first, batch)
    assert set(run(second, batch).vectors) == {"final", "response/mean@0.5"}
    second.detach()
    after = run(first, batch)
    assert set(after.vectors) == set(before.vectors)
    assert all(torch.equal(after.vectors[name], before.vectors[name]) for name in before.vectors)


def test_row67_a_guard_keeps_its_model_alive() -> None:
    model = TinyModel()
    capture = Capture(model, ())
    del model
    gc.collect()
    _, captured = capture.forward({"input_ids": torch.tensor([[1, 2]])}, NOWHERE)
    assert captured.rewards.shape == (1,)


def test_row66_an_exception_in_the_forward_leaves_nothing_behind(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    items = encoded(text)
    capture = Capture(model, CHANNELS)
    expected = run(capture, text.pad(items[:2]))

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("out of memory")

    # The blocks up to 3 have been captured when the last one fails.
    handle = model.model.layers[5].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(capture, text.pad(items[2:]))
    handle.remove()
    assert capture._slot.request is None
    again = run(capture, text.pad(items[:2]))
    assert all(torch.equal(again.vectors[name], expected.vectors[name]) for name in expected.vectors)


def test_row68_a_forward_that_skips_the_hooks_is_an_error_and_never_the_last_vector(
    decoder: tuple[Any, TextEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = decoder
    batch = text.pad(encoded(text))
    capture = Capture(model, CHANNELS)
    run(capture, batch)
    score = model.score
    with monkeypatch.context() as patch:
        # As a compiled or inlined head is: its forward without its __call__.
        patch.setattr(model, "forward", lambda **kw: SimpleNamespace(logits=score.forward(model.model(**kw)[0])[:, -1]))
        with pytest.raises(CaptureError, match=r"no activation captured for \['final'\].*'score'"):
            run(capture, batch)
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda **kw: SimpleNamespace(logits=torch.zeros(4, 1)))
        with pytest.raises(CaptureError, match=r"no activation captured for .*'response/mean@0.67'"):
            run(capture, batch)
    assert not run(capture, batch).mismatch.any()


def test_foreign_forwards_are_not_captured(decoder: tuple[Any, TextEncoder]) -> None:
    model, text = decoder
    batch = text.pad(encoded(text))
    capture = Capture(model, CHANNELS)
    with torch.inference_mode():
        model(**batch.inputs)
    assert capture._slot.request is None


def test_row65_eight_threads_through_one_hooked_model_get_their_own_vectors(
    decoder: tuple[Any, TextEncoder],
) -> None:
    model, text = decoder
    capture = Capture(model, CHANNELS)
    batches = [
        text.pad([text.encode(f"question number {i} about {'rivers ' * (i % 5)}", f" answer {i}")]) for i in range(8)
    ]
    alone = [run(capture, batch) for batch in batches]
    barrier = threading.Barrier(8)

    def work(i: int) -> list[Captured]:
        barrier.wait(timeout=30)
        return [run(capture, batches[(i + turn) % 8]) for turn in range(12)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for i, taken in enumerate(results):
        for turn, captured in enumerate(taken):
            expected = alone[(i + turn) % 8]
            assert torch.equal(captured.rewards, expected.rewards)
            assert all(torch.equal(captured.vectors[name], expected.vectors[name]) for name in expected.vectors)
