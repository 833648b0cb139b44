"""Rendered texts read back: what the template wrote is found again, and nothing else is believed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_ood import InputError
from rm_ood.read_back import ReadBack

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|sep|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|sep|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)


@pytest.fixture(params=["chatml", "llama", "mistral"])
def tokenizer(request: pytest.FixtureRequest, decoder_tokenizer: Any) -> Any:
    import copy

    found = copy.deepcopy(decoder_tokenizer)
    if request.param != "chatml":
        found.chat_template = LLAMA if request.param == "llama" else MISTRAL
    return found


def render(tokenizer: Any, messages: Any, **more: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **more))


DIALOGUES = [
    [("user", "How are you?"), ("assistant", "Well.")],
    [("user", "One\n\ntwo"), ("assistant", "three"), ("user", "four?"), ("assistant", "five\nsix")],
    [("system", "Be kind."), ("user", "How are you?"), ("assistant", "Well, thanks. [INST]")],
]


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_a_rendered_dialogue_is_found_again(tokenizer: Any, dialogue: Any) -> None:
    messages = [{"role": role, "content": content} for role, content in dialogue]
    if tokenizer.chat_template == MISTRAL and messages[0]["role"] == "system":
        # It has no system role.
        messages = messages[1:]
    text = render(tokenizer, messages)
    reader = ReadBack(tokenizer, "chat")
    prompt, response = reader.split(text, None, "input")
    own_default = [m for m in prompt if m["role"] == "system"] if isinstance(prompt, list) else []
    assert isinstance(prompt, list)
    assert [m for m in prompt if m["role"] != "system"] == [m for m in messages[:-1] if m["role"] != "system"]
    assert response == messages[-1]["content"]
    # A system prompt that the template writes by itself may be read as one: it renders to the same text.
    assert render(tokenizer, [*prompt, messages[-1]]) == text
    assert len(own_default) <= 1
    # As OpenRLHF sends it, and cut off before the end marker.
    start = render(tokenizer, messages[:-1], add_generation_prompt=True) if tokenizer.chat_template != MISTRAL else None
    assert reader.split(text, start, "query[0]") == (prompt, response)
    if tokenizer.chat_template != MISTRAL:
        assert start is not None
        assert reader.split(start + messages[-1]["content"], start, "query[0]") == (prompt, response)


@given(first=st.text(min_size=1), second=st.text())
def test_what_is_read_back_renders_to_the_same_text(decoder_tokenizer: Any, first: str, second: str) -> None:
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
    text = render(decoder_tokenizer, messages)
    try:
        prompt, response = ReadBack(decoder_tokenizer, "chat").split(text, None, "input")
    except InputError:
        return
    again = render(decoder_tokenizer, [*prompt, {"role": "assistant", "content": response}])
    assert again.rstrip() == text.rstrip()


def test_another_templates_text_is_refused(decoder_tokenizer: Any) -> None:
    reader = ReadBack(decoder_tokenizer, "chat")
    for text in ("<|im_start|>user\nHi", "<|im_start|>robot\nHi<|im_end|>\n", "Hi<|im_end|>"):
        with pytest.raises(InputError, match="chat template writes"):
            reader.split(text, None, "input")


# What other families' templates write, none of it a special token of the tokenizer here.
FOREIGN = {
    "Llama 2": ("[INST] Name a river. [/INST]", " The Elbe.</s>"),
    "Gemma": ("<start_of_turn>user\nName a river.<end_of_turn>\n<start_of_turn>model\n", "The Elbe.<end_of_turn>"),
    "Zephyr": ("<|user|>\nName a river.\n<|assistant|>\n", "The Elbe."),
    "none": ("Name a river.", " The Elbe."),
    "begun": ("<|im_start|>user\nName a river.", " The Elbe."),
    "a dialogue within": ("[INST] Human: Hi\n\nAssistant: [/INST]", " Yes."),
    "a dialogue with markers": ("\n\nHuman: Hi<|im_end|>\n\nAssistant:", " Yes."),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_chat_guard_gets_no_prompt_that_its_template_did_not_write(name: str, tokenizer: Any) -> None:
    prompt, response = FOREIGN[name]
    if tokenizer.chat_template == MISTRAL and name == "Llama 2":
        prompt = prompt.replace("INST", "ASK")
    reader = ReadBack(tokenizer, "chat", "Do that.")
    with pytest.raises(
        InputError, match=r"query\[0\]: its prompt does not read back as a dialogue.* Do that\."
    ) as caught:
        reader.split(prompt + response, prompt, "query[0]")
    assert "river" not in str(caught.value)
    with pytest.raises(InputError, match=r"Send messages \(/v1/score\)"):
        ReadBack(tokenizer, "chat").split(prompt + response, prompt, "query[0]")
    # A guard of plain text has no template to miss.
    assert prompt.endswith(str(ReadBack(tokenizer, "plain").split(prompt + response, prompt, "query[0]")[0]))


def test_a_chat_guard_takes_a_dialogue_in_words(decoder_tokenizer: Any) -> None:
    asked = "\n\nHuman: Hi\n\nAssistant:"
    assert ReadBack(decoder_tokenizer, "chat").split(f"{asked} Yes.", asked, "x") == (asked, " Yes.")


@pytest.mark.parametrize("text_format", ["chat", "plain", "pair"])
def test_plain_texts_are_cut_at_their_prompt(decoder_tokenizer: Any, text_format: str) -> None:
    reader = ReadBack(decoder_tokenizer, text_format)
    if text_format != "chat":
        assert reader.split("How are you? Well.", "How are you?", "query[0]") == ("How are you?", " Well.")
    with pytest.raises(InputError, match=r"query\[0\]: it does not begin"):
        reader.split("How are you? Well.", "Who", "query[0]")
    with pytest.raises(InputError, match="cannot be told"):
        reader.split("How are you? Well.", None, "query[0]")
    assert reader.split("\n\nHuman: Hi\n\nAssistant: Yes.", None, "x") == ("\n\nHuman: Hi\n\nAssistant:", "Yes.")
    with pytest.raises(InputError, match="cannot be told"):
        reader.split("\n\nHuman: Hi\n\nAssistant: Yes.\n\nHuman: Ho", None, "x")


def test_end_tokens_are_not_part_of_a_plain_response(decoder_tokenizer: Any) -> None:
    reader = ReadBack(decoder_tokenizer, "plain")
    eos, bos = decoder_tokenizer.eos_token, decoder_tokenizer.bos_token
    assert reader.split(f"{bos}Hi there{eos}{eos}", f"{bos}Hi", "x") == ("Hi", " there")
