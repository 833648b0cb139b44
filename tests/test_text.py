from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shared_rows
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from rm_ood.errors import InputError
from rm_ood.spans import Spans, spans_of_inputs
from rm_ood.text import Encoded, TextEncoder, resolve_format

BOS = "<|endoftext|>"
PROMPT = "What should we cook for the garden party tonight?"
# Emoji with joiners, CJK, combining marks, a bidi mark, NUL, code and right-to-left text.
TEXTS = [
    "A plain answer.",
    "two  spaces and\n\nlines\t.",
    "family 👩‍👩‍👧 and 🇩🇪 flag 🤷🏽‍♀️",
    "他们在花园里吃面条。日本語テキスト",
    "e\u0301a\u0300\u0323 zalgo " + "g\u0301" * 5,
    "naïve café — “quoted”",
    "\u202eright to left\u202c مرحبا بالعالم",
    "nul \x00 inside",
    "def f(x):\n    return x ** 2  # <tag> {json: [1]}",
]
WORDS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs", "Cn", "Co")), min_size=1, max_size=40)


class Setup:
    """A tokenizer with an encoder of each of its formats."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encoder(self, text_format: str, **options: Any) -> TextEncoder:
        return TextEncoder(self.tokenizer, text_format, **options)


@pytest.fixture(scope="module")
def decoder(decoder_tokenizer: Any) -> Setup:
    return Setup(decoder_tokenizer)


@pytest.fixture(scope="module")
def pair(minilm: tuple[Any, Any]) -> Setup:
    return Setup(minilm[1])


def words(tokenizer: Any, encoded: Encoded, mask: list[bool]) -> str:
    return str(tokenizer.decode([i for i, m in zip(encoded.input_ids, mask, strict=True) if m]))


def squeeze(text: str) -> str:
    return "".join(text.split())


class Tokenizer:
    """A real tokenizer with some of its answers replaced."""

    def __init__(self, inner: Any, **replaced: Any) -> None:
        self._inner = inner
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._inner(*args, **options)


def with_template(tokenizer: Any, template: str) -> Any:
    def apply(messages: Any, **options: Any) -> Any:
        return tokenizer.apply_chat_template(messages, chat_template=template, **options)

    return Tokenizer(tokenizer, apply_chat_template=apply)


# -- the response span


@pytest.mark.parametrize("response", TEXTS)
@pytest.mark.parametrize("text_format", ["chat", "plain"])
def test_the_response_span_is_exactly_the_responses_characters(decoder: Setup, text_format: str, response: str) -> None:
    encoded = decoder.encoder(text_format).encode(PROMPT, response)
    assert words(decoder.tokenizer, encoded, encoded.response_mask) == response
    assert squeeze(words(decoder.tokenizer, encoded, encoded.prompt_mask)) in squeeze(PROMPT)
    assert not any(p and r for p, r in zip(encoded.prompt_mask, encoded.response_mask, strict=True))
    first = encoded.response_mask.index(True)
    assert encoded.prompt_end == first - 1


@pytest.mark.parametrize("prompt", TEXTS)
def test_the_prompt_span_is_the_users_words(decoder: Setup, prompt: str) -> None:
    encoded = decoder.encoder("chat").encode(prompt, "An answer.")
    assert words(decoder.tokenizer, encoded, encoded.prompt_mask) == prompt
    encoded = decoder.encoder("plain").encode("Question. " + prompt, "\nAn answer.")
    # Position 0 is an attention sink and never counts.
    assert words(decoder.tokenizer, encoded, encoded.prompt_mask) == (". " + prompt)
    assert not encoded.prompt_mask[0]


@pytest.mark.parametrize("response", TEXTS)
def test_the_pair_spans_are_the_two_segments_words(pair: Setup, response: str) -> None:
    encoded = pair.encoder("pair").encode(PROMPT, response)
    tokenizer = pair.tokenizer
    alone = tokenizer(response, add_special_tokens=False)["input_ids"]
    inside = [i for i, m in zip(encoded.input_ids, encoded.response_mask, strict=True) if m]
    assert inside == [i for i in alone if i not in tokenizer.all_special_ids]
    assert words(tokenizer, encoded, encoded.prompt_mask) == "what should we cook for the garden party tonight?"
    assert encoded.input_ids == tokenizer(PROMPT, response)["input_ids"]
    assert encoded.token_type_ids == tokenizer(PROMPT, response)["token_type_ids"]
    # The separator stands between the segments.
    assert encoded.input_ids[encoded.prompt_end] == tokenizer.sep_token_id
    assert encoded.token_type_ids is not None
    assert encoded.token_type_ids[encoded.prompt_end : encoded.prompt_end + 2] == [0, 1]


@given(WORDS, st.sampled_from(["chat", "plain"]))
@example("\u0301combining first", "plain")
@example(" leading space", "plain")
@example("\n\n", "chat")
def test_the_response_span_decodes_to_the_response(decoder: Setup, response: str, text_format: str) -> None:
    # The tokenizer has no token for some control characters and drops them.
    assume(decoder.tokenizer.decode(decoder.tokenizer(response)["input_ids"]) == response)
    encoded = decoder.encoder(text_format).encode(PROMPT, response)
    assert squeeze(words(decoder.tokenizer, encoded, encoded.response_mask)).endswith(squeeze(response))
    # A token that straddles the border may hold the prompt's last character, never more than the token.
    assert len(squeeze(words(decoder.tokenizer, encoded, encoded.response_mask))) <= len(squeeze(response)) + 2
    assert encoded.prompt_end < len(encoded.input_ids)
    assert not any(encoded.response_mask[: encoded.prompt_end + 1])


@given(WORDS)
def test_pair_ids_are_the_tokenizers_own(pair: Setup, response: str) -> None:
    encoded = pair.encoder("pair").encode(PROMPT, response)
    assert encoded.input_ids == pair.tokenizer(PROMPT, response)["input_ids"]
    own = [i for i, m in zip(encoded.input_ids, encoded.response_mask, strict=True) if m]
    ids = pair.tokenizer(response, add_special_tokens=False)["input_ids"]
    assert own == [i for i in ids if i not in pair.tokenizer.all_special_ids]


@pytest.mark.shared
def test_spans_of_real_dialogues(decoder: Setup) -> None:
    chat = decoder.encoder("chat")
    for row in shared_rows("preference/hh_harmless_en", 15) + shared_rows("preference/llamafactory_dpo_zh", 15):
        encoded = chat.encode(row["prompt"], row["chosen"])
        assert words(decoder.tokenizer, encoded, encoded.response_mask) == row["chosen"]


def test_a_plain_item_is_the_concatenated_text(decoder: Setup) -> None:
    encoded = decoder.encoder("plain").encode(PROMPT, " Soup.")
    assert encoded.input_ids == decoder.tokenizer(PROMPT + " Soup.")["input_ids"]


def test_a_chat_item_is_the_rendered_template(decoder: Setup) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": PROMPT}]
    encoded = decoder.encoder("chat").encode(messages, "Soup.")
    text = decoder.tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "Soup."}], tokenize=False)
    assert encoded.input_ids == decoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert words(decoder.tokenizer, encoded, encoded.prompt_mask) == "Be kind." + PROMPT
    # The last token before the response ends the assistant's role marker.
    assert decoder.tokenizer.decode(encoded.input_ids[: encoded.prompt_end + 1]).endswith("<|im_start|>assistant\n")


def test_dialogues_in_one_string_are_rendered_as_messages(decoder: Setup) -> None:
    chat = decoder.encoder("chat")
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "more")]
    messages = [{"role": role, "content": text} for role, text in turns]
    for ending in ("", "\n\nAssistant:", "\n\nAssistant: "):
        dialogue = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more" + ending
        assert chat.encode(dialogue, "yes") == chat.encode(messages, "yes")


@pytest.mark.parametrize("prompt", ["user", "system", "AI", "a", "You are", "assistant", "Face<", "1", "response"])
def test_a_prompt_found_elsewhere_in_the_template_is_not_mistaken(decoder: Setup, prompt: str) -> None:
    encoded = decoder.encoder("chat").encode(prompt, "Yes.")
    assert words(decoder.tokenizer, encoded, encoded.prompt_mask) == prompt
    user = decoder.tokenizer.decode(encoded.input_ids[: encoded.prompt_mask.index(True)])
    assert user.endswith("<|im_start|>user\n")


def test_a_template_that_strips_the_texts_is_followed(decoder: Setup) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}<end>"
    tokenizer = with_template(decoder.tokenizer, template)
    encoded = TextEncoder(tokenizer, "chat").encode("  hello there ", " fine \n")
    assert words(decoder.tokenizer, encoded, encoded.response_mask).lstrip() == "fine"
    assert words(decoder.tokenizer, encoded, encoded.prompt_mask).strip() == "hello there"


def test_a_template_whose_words_depend_on_the_messages_is_searched(decoder: Setup) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }} ({{ messages[0]['content'] | length }}):"
        " {{ m['content'] | trim }}\n|\n{% endfor %}"
    )
    tokenizer = with_template(decoder.tokenizer, template)
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": " hello there "},
        {"role": "user", "content": "more"},
    ]
    for drop in (0, 1):
        encoded = TextEncoder(tokenizer, "chat").encode(messages[drop:], "It is fine.")
        assert words(decoder.tokenizer, encoded, encoded.response_mask).strip() == "It is fine."
        assert words(decoder.tokenizer, encoded, encoded.prompt_mask).split() == ["hello", "there", "more"]


def test_a_template_that_leaves_a_message_out_gives_it_no_span(decoder: Setup) -> None:
    template = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] }}: {{ m['content'] }}|{% endif %}{% endfor %}"
    tokenizer = with_template(decoder.tokenizer, template)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello there"}]
    encoded = TextEncoder(tokenizer, "chat").encode(messages, "It is fine.")
    assert words(decoder.tokenizer, encoded, encoded.prompt_mask).strip() == "hello there"


def test_a_prompt_that_the_template_rewrites_has_no_span(decoder: Setup) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | replace('x', 'y') }}\n{% endfor %}"
    tokenizer = with_template(decoder.tokenizer, template)
    encoded = TextEncoder(tokenizer, "chat").encode("one extra", "It is fixed.")
    assert not any(encoded.prompt_mask)
    assert words(decoder.tokenizer, encoded, encoded.response_mask).strip() == "It is fiyed."


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] | upper }}|{% endfor %}",
        "{% for m in messages %}{{ m['role'] }}|{% endfor %}",
        "{{ messages[-1]['content'] | length }}{% for m in messages %}{{ m['content'] }}|{% endfor %}",
    ],
)
def test_a_template_that_rewrites_the_response_is_refused(decoder: Setup, template: str) -> None:
    with pytest.raises(InputError, match="item 4: the chat template rewrites the response"):
        TextEncoder(with_template(decoder.tokenizer, template), "chat").encode("hello", "fine", "item 4")


def test_a_template_that_raises_is_an_input_error_without_the_text(decoder: Setup) -> None:
    template = "{{ raise_exception('no: ' + messages[0]['content']) }}"
    with pytest.raises(InputError, match=r"refused a dialogue of 1 turns .*TemplateError") as error:
        TextEncoder(with_template(decoder.tokenizer, template), "chat").encode("secret", "fine", "x")
    assert "secret" not in str(error.value)


# -- odd texts


@pytest.mark.parametrize("text_format", ["chat", "plain"])
def test_row41_an_empty_response_has_a_reason_and_an_empty_span(decoder: Setup, text_format: str) -> None:
    for response in ("", "  "):
        encoded = decoder.encoder(text_format).encode(PROMPT, response)
        assert encoded.reasons == ("empty_response",)
    encoded = decoder.encoder(text_format).encode(PROMPT, "")
    assert not any(encoded.response_mask)
    assert 0 < encoded.prompt_end < len(encoded.input_ids)


def test_row41_an_empty_response_of_a_pair_ends_with_the_prompts_separator(pair: Setup) -> None:
    encoded = pair.encoder("pair").encode(PROMPT, "")
    assert encoded.reasons == ("empty_response",)
    assert not any(encoded.response_mask)
    assert encoded.prompt_end == len(encoded.input_ids) - 2


def test_row42_an_allowed_empty_prompt_has_an_empty_span(decoder: Setup, pair: Setup) -> None:
    for encoder in (decoder.encoder("chat"), decoder.encoder("plain"), pair.encoder("pair")):
        encoded = encoder.encode("", "A long enough answer.")
        assert not any(encoded.prompt_mask)
        assert not encoded.response_mask[0]
        assert any(encoded.response_mask)
        assert 0 <= encoded.prompt_end < len(encoded.input_ids)


@pytest.mark.parametrize(
    ("prompt", "response"),
    [("[PAD]", "fine"), (PROMPT, "[PAD]"), (PROMPT, "so [SEP] [CLS] it is"), ("[UNK]", "[MASK][PAD]")],
)
def test_row43_special_tokens_in_text_have_a_reason_and_never_count(pair: Setup, prompt: str, response: str) -> None:
    encoded = pair.encoder("pair").encode(prompt, response)
    assert encoded.reasons == ("special_tokens_in_text",)
    special = set(pair.tokenizer.all_special_ids)
    for mask in (encoded.prompt_mask, encoded.response_mask):
        assert not special & {i for i, m in zip(encoded.input_ids, mask, strict=True) if m}


def test_row43_special_tokens_may_be_split_into_ordinary_text(decoder: Setup, pair: Setup) -> None:
    for setup, text_format, token in ((pair, "pair", "[PAD]"), (decoder, "plain", "<|im_end|>")):
        special = setup.tokenizer.convert_tokens_to_ids(token)
        joined = setup.encoder(text_format).encode(PROMPT, f"so {token} it is")
        split = setup.encoder(text_format, split_special_tokens=True).encode(PROMPT, f"so {token} it is")
        assert special in joined.input_ids
        assert special not in split.input_ids
        assert squeeze(words(setup.tokenizer, split, split.response_mask)) == squeeze(f"so {token} it is").lower()
        # The next encoder of the same tokenizer is not affected.
        assert special in setup.encoder(text_format).encode(PROMPT, token).input_ids


def test_row51_the_templates_own_markers_are_scored_with_a_reason(decoder: Setup) -> None:
    response = "fine<|im_end|>\n<|im_start|>assistant\nagain"
    encoded = decoder.encoder("chat").encode(PROMPT, response)
    assert encoded.reasons == ("special_tokens_in_text",)
    assert squeeze(words(decoder.tokenizer, encoded, encoded.response_mask)) == "fineassistantagain"
    in_prompt = decoder.encoder("chat").encode([{"role": "user", "content": response}], "fine")
    assert in_prompt.reasons == ("special_tokens_in_text",)
    both = decoder.encoder("chat").encode("<|im_end|>", "")
    assert both.reasons == ("empty_response", "special_tokens_in_text")


def test_row47_odd_characters_are_encoded(decoder: Setup, pair: Setup) -> None:
    odd = "nul \x00 bidi \u202e marks " + "\u0301" * 1_000 + " 👩‍👩‍👧"
    for encoder in (decoder.encoder("chat"), decoder.encoder("plain"), pair.encoder("pair")):
        encoded = encoder.encode(odd, odd)
        assert any(encoded.response_mask)
        assert encoded.reasons == ()
    # BERT's normaliser leaves nothing of these.
    nothing = pair.encoder("pair").encode(PROMPT, "\x00\u0301")
    assert not any(nothing.response_mask)


# -- length


@pytest.mark.parametrize(("name", "text_format"), [("decoder", "chat"), ("decoder", "plain"), ("pair", "pair")])
def test_row44_truncation_cuts_the_prompts_start_and_keeps_the_responses_end(
    name: str, text_format: str, request: pytest.FixtureRequest
) -> None:
    setup: Setup = request.getfixturevalue(name)
    prompt, response = "start " + "word " * 50 + "stop", "answer " * 10 + "end"
    whole = setup.encoder(text_format).encode(prompt, response)
    assert (whole.dropped, whole.reasons) == (0, ())
    total = len(whole.input_ids)
    for limit in (total, total - 1, total - 20, 40, 12, 6):
        cut = setup.encoder(text_format, max_length=limit).encode(prompt, response)
        assert len(cut.input_ids) == len(cut.prompt_mask) == len(cut.response_mask) == limit
        assert cut.dropped == total - limit
        assert cut.reasons == (("truncated",) if limit < total else ())
        assert words(setup.tokenizer, cut, cut.response_mask).rstrip().endswith("end")
        assert not cut.prompt_mask[0]
        assert not cut.response_mask[0]
        if limit >= 40:
            assert words(setup.tokenizer, cut, cut.response_mask).split() == response.split()
            assert cut.input_ids[cut.prompt_end] == whole.input_ids[whole.prompt_end]
            assert words(setup.tokenizer, cut, cut.prompt_mask).split()[-1] == "stop"
        else:
            assert cut.prompt_end < cut.response_mask.index(True)
        if text_format == "pair":
            assert cut.input_ids[0] == setup.tokenizer.cls_token_id
            assert cut.input_ids.count(setup.tokenizer.sep_token_id) == 2
            assert cut.token_type_ids is not None
            assert len(cut.token_type_ids) == limit


def test_row44_truncate_cuts_without_a_reason_and_error_refuses(decoder: Setup) -> None:
    quiet = decoder.encoder("plain", max_length=8, on_too_long="truncate").encode(PROMPT, " Soup, I think.")
    assert quiet.reasons == ()
    assert quiet.dropped > 0
    strict = decoder.encoder("plain", max_length=8, on_too_long="error")
    with pytest.raises(InputError, match=r"rows\[2\]: \d+ tokens, the limit is max_length=8. Shorten") as error:
        strict.encode(PROMPT, " Soup, I think.", "rows[2]")
    assert "Soup" not in str(error.value)
    assert strict.encode("Hi there", " you").dropped == 0


@pytest.mark.parametrize(("name", "text_format"), [("decoder", "chat"), ("pair", "pair")])
def test_row44_a_limit_that_leaves_no_response_is_refused(
    name: str, text_format: str, request: pytest.FixtureRequest
) -> None:
    setup: Setup = request.getfixturevalue(name)
    for limit in (1, 2, 3):
        with pytest.raises(InputError, match=f"max_length={limit} leaves no token of the response"):
            setup.encoder(text_format, max_length=limit).encode(PROMPT, "Soup, I think.")


def test_row44_an_empty_response_may_be_cut_to_its_frame(pair: Setup) -> None:
    cut = pair.encoder("pair", max_length=3).encode(PROMPT, "")
    assert len(cut.input_ids) == 3
    assert cut.reasons == ("empty_response", "truncated")


def test_the_limit_is_the_callers_or_the_tokenizers(decoder: Setup, pair: Setup) -> None:
    assert pair.encoder("pair").max_length == 512
    assert pair.encoder("pair", max_length=64).max_length == 64
    # Tokenizers without a limit report a number past any integer type.
    assert decoder.encoder("chat").max_length == 1_000_000


def test_append_eos_ends_plain_text_once(decoder: Setup) -> None:
    eos = decoder.tokenizer.eos_token_id
    ended = decoder.encoder("plain", append_eos=True)
    bare = decoder.encoder("plain").encode(PROMPT, " Soup.")
    encoded = ended.encode(PROMPT, " Soup.")
    assert encoded.input_ids == [*bare.input_ids, eos]
    assert encoded.response_mask == [*bare.response_mask, False]
    assert ended.encode(PROMPT, " Soup.<|im_end|>").input_ids.count(eos) == 1
    chat = decoder.encoder("chat", append_eos=True).encode(PROMPT, "Soup.")
    assert chat.input_ids == decoder.encoder("chat").encode(PROMPT, "Soup.").input_ids


def test_append_eos_extends_the_segment_ids_too(pair: Setup) -> None:
    tokenizer = Tokenizer(pair.tokenizer, eos_token_id=pair.tokenizer.mask_token_id)
    encoded = TextEncoder(tokenizer, "plain", append_eos=True).encode("hello there ", "you")
    assert encoded.input_ids[-1] == pair.tokenizer.mask_token_id
    assert encoded.token_type_ids == [0] * len(encoded.input_ids)


def test_plain_text_of_an_encoder_leaves_its_special_tokens_out(pair: Setup) -> None:
    encoded = pair.encoder("plain").encode("Hello there, ", "old friend")
    assert words(pair.tokenizer, encoded, encoded.prompt_mask) == "hello there,"
    assert words(pair.tokenizer, encoded, encoded.response_mask) == "old friend"
    assert pair.tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.prompt_end]) == ","


def test_a_token_across_the_border_is_the_responses(decoder: Setup) -> None:
    encoded = decoder.encoder("plain").encode("I said extra", "ordinary things")
    ids = encoded.input_ids
    # `extraordinary` is one token; the last token before it is the prompt's end.
    assert [decoder.tokenizer.decode([i]) for i in ids] == ["I", " said", " extraordinary", " things"]
    assert encoded.response_mask == [False, False, True, True]
    assert encoded.prompt_mask == [False, True, False, False]
    assert encoded.prompt_end == 1


def test_a_pair_tokenizer_without_special_tokens_or_segments(decoder: Setup) -> None:
    encoded = decoder.encoder("pair").encode("hello there", " you")
    assert encoded.reasons == ()
    assert encoded.token_type_ids is None
    assert words(decoder.tokenizer, encoded, encoded.response_mask) == " you"


def test_prompt_only_ends_where_the_prompt_does(decoder: Setup, pair: Setup) -> None:
    for encoder in (decoder.encoder("chat"), decoder.encoder("plain"), pair.encoder("pair")):
        whole = encoder.encode(PROMPT, " Soup.")
        alone = whole.prompt_only()
        n = whole.prompt_end + 1
        assert alone.input_ids == whole.input_ids[:n]
        assert alone.prompt_mask == whole.prompt_mask[:n]
        assert sum(alone.prompt_mask) == sum(whole.prompt_mask)
        assert alone.response_mask == [False] * n
        assert alone.prompt_end == whole.prompt_end
        assert (alone.token_type_ids is None) == (whole.token_type_ids is None)
        assert alone.token_type_ids is None or alone.token_type_ids == [0] * n
        # It does not depend on the response.
        assert encoder.encode(PROMPT, " Bread, and wine.").prompt_only().input_ids == alone.input_ids


# -- batches


def test_batches_are_padded_right_with_the_models_pad(decoder: Setup, pair: Setup) -> None:
    items = [pair.encoder("pair").encode(PROMPT, r) for r in ("Yes.", "Bread, soup and wine.")]
    batch = pair.encoder("pair").pad(items)
    assert set(batch.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    short, long = (len(i.input_ids) for i in items)
    assert batch.inputs["input_ids"].shape == (2, long)
    assert batch.inputs["input_ids"][0, short:].tolist() == [pair.tokenizer.pad_token_id] * (long - short)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [short, long]
    assert batch.spans.prompt_end is not None
    assert batch.spans.prompt_end.tolist() == [i.prompt_end for i in items]
    lengths = batch.spans.lengths()
    assert lengths is not None
    assert lengths.tolist() == [[sum(i.prompt_mask), sum(i.response_mask)] for i in items]
    assert batch.spans.response_mask is not None
    assert batch.spans.response_mask.dtype == torch.bool
    assert not batch.spans.response_mask[0, short:].any()
    plain = decoder.encoder("plain", pad_id=5)
    inputs = plain.pad([plain.encode(PROMPT, " a"), plain.encode(PROMPT, " a b")]).inputs
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"][0, -1] == 5


def test_a_batch_of_one_needs_no_pad_token(decoder: Setup) -> None:
    encoder = TextEncoder(Tokenizer(decoder.tokenizer, pad_token_id=None), "plain")
    assert encoder.pad([encoder.encode("hello", " you")]).inputs["attention_mask"].all()


def test_lengths_are_unknown_where_the_spans_are() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert Spans(None, None, mask).lengths() is None
    assert Spans(None, mask, None).lengths() is None
    np.testing.assert_array_equal(Spans(None, mask, ~mask).lengths(), [[3, 0], [3, 0]])


# -- formats and options


def test_the_format_is_settled_by_tokenizer_and_data(decoder: Setup, pair: Setup) -> None:
    chatty = Tokenizer(pair.tokenizer, chat_template="x")
    messages = [{"role": "user", "content": "hi"}]
    for tokenizer, prompts, expected in [
        (decoder.tokenizer, ["hello"], "plain"),
        (decoder.tokenizer, ["hello", messages], "chat"),
        (decoder.tokenizer, ["Human: hi\n\nAssistant: hello\n\nHuman: more"], "chat"),
        (pair.tokenizer, ["hello"], "pair"),
        (pair.tokenizer, [messages], "pair"),
        (chatty, ["hello"], "pair"),
        (chatty, [messages], "chat"),
    ]:
        assert resolve_format("auto", tokenizer, prompts) == expected
    for fixed in ("chat", "pair", "plain"):
        assert resolve_format(fixed, None, []) == fixed
    with pytest.raises(InputError, match="text_format='xml': expected 'auto' or one of"):
        resolve_format("xml", None, [])


def test_row50_messages_without_a_chat_template_name_the_two_remedies(decoder: Setup, pair: Setup) -> None:
    messages = [{"role": "user", "content": "hi"}]
    bare = Tokenizer(decoder.tokenizer, chat_template=None)
    with pytest.raises(InputError, match=r"no chat template. Set tokenizer.chat_template .* text_format='plain'"):
        TextEncoder(bare, resolve_format("auto", bare, [messages]))
    with pytest.raises(InputError, match=r"x: a list of messages.*Set tokenizer.chat_template, or join"):
        pair.encoder("pair").encode(messages, "fine", "x")
    with pytest.raises(InputError, match=r"x: a list of messages.*Pass strings, or fit"):
        decoder.encoder("plain").encode(messages, "fine", "x")


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(InputError, match="expected a fast tokenizer, got SimpleNamespace"):
        TextEncoder(SimpleNamespace(is_fast=False), "plain")
    with pytest.raises(InputError, match="expected a fast tokenizer, got NoneType"):
        TextEncoder(None, "plain")


def test_an_unknown_length_rule_is_refused(decoder: Setup) -> None:
    with pytest.raises(InputError, match="on_too_long='cut': expected one of"):
        decoder.encoder("plain", on_too_long="cut")


def test_the_contract_holds_what_changes_the_ids(decoder: Setup) -> None:
    base = decoder.encoder("plain", max_length=9).contract()
    assert base == {
        "format": "plain", "max_length": 9, "on_too_long": "flag", "split_special_tokens": False, "append_eos": False,
        "special_tokens": True, "suffix": [],
    }  # fmt: skip
    for options in (
        {"max_length": 8},
        {"split_special_tokens": True},
        {"append_eos": True},
        {"special_tokens": False},
        {"suffix": (7,)},
        {"on_too_long": "error"},
    ):
        assert decoder.encoder("plain", **{"max_length": 9, **options}).contract() != base


# -- inputs that came tokenised


def test_spans_of_inputs_come_from_the_segments(pair: Setup) -> None:
    encoder = pair.encoder("pair")
    batch = encoder.pad([encoder.encode(PROMPT, r) for r in ("Yes.", "Bread, soup and wine.")])
    spans = spans_of_inputs(pair.tokenizer, batch.inputs, None, None, None)
    for name in ("prompt_end", "prompt_mask", "response_mask"):
        torch.testing.assert_close(getattr(spans, name), getattr(batch.spans, name))


@pytest.mark.parametrize("side", ["right", "left"])
def test_spans_of_inputs_come_from_the_prompts_end(decoder: Setup, side: str) -> None:
    encoder = decoder.encoder("plain")
    items = [encoder.encode(PROMPT, r) for r in (" Yes.", " Bread, soup and wine.")]
    inputs = encoder.pad(items).inputs
    ends = torch.tensor([i.prompt_end for i in items])
    if side == "left":
        shift = len(items[1].input_ids) - len(items[0].input_ids)
        inputs = {name: torch.stack([x[0].roll(shift), x[1]]) for name, x in inputs.items()}
        ends[0] += shift
    spans = spans_of_inputs(decoder.tokenizer, inputs, ends, None, None)
    lengths = spans.lengths()
    assert lengths is not None
    assert lengths.tolist() == [[sum(i.prompt_mask), sum(i.response_mask)] for i in items]


def test_spans_of_inputs_without_a_mask_leave_special_tokens_out(decoder: Setup) -> None:
    pad = decoder.tokenizer.pad_token_id
    ids = torch.tensor([[100, 101, 102, pad], [103, 104, 105, 106]])
    spans = spans_of_inputs(decoder.tokenizer, {"input_ids": ids}, torch.tensor([1, 1]), None, None)
    assert spans.prompt_mask is not None
    assert spans.response_mask is not None
    assert spans.prompt_mask.int().tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]
    assert spans.response_mask.int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]


def test_spans_of_inputs_take_what_the_caller_gives(decoder: Setup) -> None:
    ids = torch.tensor([[100, 101, 102, 103]])
    prompt, response = torch.tensor([[0, 0, 1, 0]]), torch.tensor([[0, 0, 0, 1]])
    end = torch.tensor([1])
    given_both = spans_of_inputs(decoder.tokenizer, {"input_ids": ids}, end, prompt, response)
    assert given_both.prompt_mask is not None
    assert given_both.prompt_mask.dtype == torch.bool
    torch.testing.assert_close(given_both.prompt_mask, prompt.bool())
    torch.testing.assert_close(given_both.prompt_end, end)
    one = spans_of_inputs(decoder.tokenizer, {"input_ids": ids}, end, prompt, None)
    torch.testing.assert_close(one.prompt_mask, prompt.bool())
    torch.testing.assert_close(one.response_mask, torch.tensor([[False, False, True, True]]))
    other = spans_of_inputs(decoder.tokenizer, {"input_ids": ids}, end, None, response)
    torch.testing.assert_close(other.prompt_mask, torch.tensor([[False, True, False, False]]))
    torch.testing.assert_close(other.response_mask, response.bool())
    none = spans_of_inputs(decoder.tokenizer, {"input_ids": ids}, None, None, response)
    assert (none.prompt_end, none.prompt_mask) == (None, None)
    nothing = spans_of_inputs(decoder.tokenizer, {"input_ids": ids, "token_type_ids": ids * 0}, None, None, None)
    assert nothing == Spans(None, None, None)


@pytest.mark.parametrize(
    ("given_spans", "message"),
    [
        ({"prompt_end": torch.tensor([1, 1])}, r"prompt_end: expected shape \(1,\)"),
        ({"prompt_end": torch.tensor([[1]])}, r"prompt_end: expected shape \(1,\).*got \(1, 1\)"),
        ({"prompt_end": torch.tensor([1.0])}, "of integers.*float32"),
        ({"prompt_end": torch.tensor([4])}, "prompt_end: a column outside 0 to 3"),
        ({"prompt_end": torch.tensor([-1])}, "prompt_end: a column outside 0 to 3"),
        ({"prompt_mask": torch.ones(1, 3)}, r"prompt_mask: expected shape \(1, 4\) like input_ids, got \(1, 3\)"),
        ({"response_mask": torch.ones(2, 4)}, "response_mask: expected shape"),
    ],
)
def test_spans_of_another_shape_are_refused(decoder: Setup, given_spans: dict[str, Any], message: str) -> None:
    spans = {"prompt_end": None, "prompt_mask": None, "response_mask": None, **given_spans}
    with pytest.raises(InputError, match=message):
        spans_of_inputs(decoder.tokenizer, {"input_ids": torch.tensor([[100, 101, 102, 103]])}, **spans)


def test_inputs_without_ids_are_refused(decoder: Setup) -> None:
    with pytest.raises(InputError, match="needs input_ids"):
        spans_of_inputs(decoder.tokenizer, {"inputs_embeds": torch.ones(1, 4, 8)}, None, None, None)


# -- BOS and EOS


@pytest.fixture(scope="module")
def bos(decoder_tokenizer: Any) -> Setup:
    """A tokenizer that begins every text with a BOS of its own, as Llama's does."""
    tokenizer = copy.deepcopy(decoder_tokenizer)
    tokenizer.bos_token = BOS
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.convert_tokens_to_ids(BOS))]
    )
    return Setup(tokenizer)


def test_plain_text_has_the_special_tokens_that_it_is_asked_to_have(bos: Setup) -> None:
    first, last = bos.tokenizer.bos_token_id, bos.tokenizer.eos_token_id
    words_alone = bos.tokenizer(PROMPT + " Soup.", add_special_tokens=False)["input_ids"]
    for options, ids in [
        ({}, [first, *words_alone]),
        ({"append_eos": True}, [first, *words_alone, last]),
        ({"special_tokens": False}, words_alone),
        ({"special_tokens": False, "append_eos": True}, [*words_alone, last]),
    ]:
        encoded = bos.encoder("plain", **options).encode(PROMPT, " Soup.")
        assert encoded.input_ids == ids
        assert words(bos.tokenizer, encoded, encoded.response_mask) == " Soup."
        # Position 0 never counts: with BOS there, the prompt keeps its first word.
        assert encoded.prompt_mask[1] == encoded.prompt_mask[2] == (not encoded.prompt_mask[0])


def test_an_encoders_plain_text_may_go_without_special_tokens_too(pair: Setup) -> None:
    encoded = pair.encoder("plain", special_tokens=False).encode("hello there ", "you")
    assert encoded.input_ids == pair.tokenizer("hello there you", add_special_tokens=False)["input_ids"]
    # A pair is told by its special tokens: it keeps them.
    kept = pair.encoder("pair", special_tokens=False).encode("hello there", "you")
    assert kept == pair.encoder("pair").encode("hello there", "you")


def test_a_doubled_bos_is_told(bos: Setup, pair: Setup) -> None:
    plain = bos.encoder("plain")
    doubled = plain.encode(BOS + PROMPT, " Soup.")
    assert doubled.input_ids[:2] == [bos.tokenizer.bos_token_id] * 2
    assert doubled.reasons == ("special_tokens_in_text", "doubled_bos")
    assert plain.encode(PROMPT, " Soup.").reasons == ()
    # Elsewhere in the text, or where the tokenizer adds none, it is typed once.
    assert plain.encode("So " + BOS + BOS, " Soup.").reasons == ("special_tokens_in_text",)
    alone = bos.encoder("plain", special_tokens=False).encode(BOS + PROMPT, " Soup.")
    assert alone.reasons == ("special_tokens_in_text",)
    assert pair.encoder("pair").encode("[CLS] hello", "you").reasons == ("special_tokens_in_text", "doubled_bos")


def test_a_template_that_writes_bos_has_one(bos: Setup) -> None:
    writes = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    encoded = TextEncoder(with_template(bos.tokenizer, writes), "chat").encode(PROMPT, "Soup.")
    assert encoded.input_ids.count(bos.tokenizer.bos_token_id) == 1
    assert encoded.input_ids[0] == bos.tokenizer.bos_token_id
    assert encoded.reasons == ()
    bare = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    typed = TextEncoder(with_template(bos.tokenizer, bare), "chat").encode(BOS + PROMPT, "Soup.")
    assert typed.reasons == ("special_tokens_in_text", "doubled_bos")


def test_text_without_a_token_is_refused(pair: Setup, decoder: Setup) -> None:
    for encoder in (pair.encoder("plain", special_tokens=False), decoder.encoder("plain")):
        with pytest.raises(InputError, match="x: prompt and response give no token"):
            encoder.encode("", "", "x")
