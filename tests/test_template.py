"""Chat templates of the families in use, on SmolLM2's tokenizer: what they rewrite, drop, move and refuse."""

from __future__ import annotations

import copy
import datetime
import json
import random
from dataclasses import replace
from typing import Any

import pytest
from conftest import preference_rows, sentence

from rm_ood import OODGuard
from rm_ood.batch import check_file
from rm_ood.dialogue import Dialogue
from rm_ood.errors import InputError
from rm_ood.template import ChatTemplate
from rm_ood.text import Encoded, TextEncoder

# Qwen3: tools in the system turn; reasoning is kept after the last user turn, and written (empty) before the last answer;
# calls and results of tools have markers of their own.
QWEN3 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n\n<tools>' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(open=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.open and message.role == 'user' %}
        {%- set ns.open = false %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content if message.content is string else '' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if not loop.first or content %}{{- '\n' }}{%- endif %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

# Llama 3.1: a system turn with dates whatever the messages are; tools stand in the first user turn; texts are trimmed.
LLAMA31 = r"""
{{- bos_token }}
{%- set date = date_string if date_string is defined else strftime_now('%d %b %Y') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' + date + '\n\n' }}
{{- system + '<|eot_id|>' }}
{%- if tools %}
    {%- set first = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nAnswer with a call of one of these functions.\n\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) + '\n\n' }}{%- endfor %}
    {{- first + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + message.tool_calls[0].function.name }}
        {{- '", "parameters": ' + (message.tool_calls[0].function.arguments | tojson) + '}<|eot_id|>' }}
    {%- elif message.role in ('tool', 'ipython') %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (message.content | tojson) + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

# Gemma 2: no system role, turns alternate, the assistant is called model.
GEMMA2 = r"""
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""

# Mistral: no header before an answer, tools before the last user turn, long ids of calls, content as text or blocks.
MISTRAL = r"""
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0]['content'] + '[/SYSTEM_PROMPT]' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' }}
        {%- if message['content'] is string %}{{- message['content'] }}
        {%- else %}{%- for block in message['content'] %}{{- block['text'] }}{%- endfor %}
        {%- endif %}
        {{- '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not defined or call.id | length < 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length >= 9!') }}
            {%- endif %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message['role'] == 'assistant' %}
        {{- message['content'] + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported') }}
    {%- endif %}
{%- endfor %}"""

# DeepSeek R1: the system prompt has no marker, answers lose their reasoning, a generation prompt opens the next one.
R1 = r"""
{%- set ns = namespace(system='', tool=false) %}
{%- for message in messages %}{%- if message.role == 'system' %}{%- set ns.system = message.content %}{%- endif %}{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.tool = false %}
        {{- '<|User|>' + message.content }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|Assistant|><|calls|>' }}
        {%- for call in message.tool_calls %}
            {{- call.function.name + '\n' + call.function.arguments + '<|call end|>' }}
        {%- endfor %}
        {{- '<|calls end|>' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- '<|outputs end|>' if ns.tool else '<|Assistant|>' }}
        {%- set ns.tool = false %}
        {{- message.content.split('</think>')[-1] + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- ('\n' if ns.tool else '<|outputs|>') + '<|output|>' + message.content + '<|output end|>' }}
        {%- set ns.tool = true %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}"""

# A template that marks what a trainer learns from.
GENERATION = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}"""

# Special tokens of the families' own tokenizers; Qwen3's are SmolLM2's.
MARKERS = {
    "llama31": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma2": ["<start_of_turn>", "<end_of_turn>"],
    "mistral": ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[TOOL_RESULTS]"],
    "r1": ["<|User|>", "<|Assistant|>"],
}
TEMPLATES = {
    "qwen3": QWEN3,
    "llama31": LLAMA31,
    "gemma2": GEMMA2,
    "mistral": MISTRAL,
    "r1": R1,
    "generation": GENERATION,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "id": "call12345", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def turn(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


USER, THANKS = turn("user", "Is it cold in Oslo today?"), turn("user", "Thank you, and tomorrow?")
SYSTEM, ANSWER = turn("system", "Be brief and kind."), turn("assistant", "It is minus three there.")
RESPONSE = "Tomorrow will be warmer."


class Setup:
    def __init__(self, tokenizer: Any, template: str | None, markers: tuple[str, ...] | list[str] = ()) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        if template is not None:
            self.tokenizer.chat_template = template
            self.tokenizer.add_special_tokens({"additional_special_tokens": list(markers)})

    def encode(self, prompt: Any, response: Any, **options: Any) -> Encoded:
        return TextEncoder(self.tokenizer, "chat", **options).encode(prompt, response, "items[3]", turns=True)

    def text(self, messages: list[Any], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def words(self, encoded: Encoded, mask: list[bool]) -> str:
        return str(self.tokenizer.decode([i for i, m in zip(encoded.input_ids, mask, strict=True) if m]))

    def upto(self, encoded: Encoded, i: int) -> str:
        """The text up to and including turn i."""
        return str(self.tokenizer.decode(encoded.input_ids[: encoded.turn_ends[i] + 1]))


@pytest.fixture(scope="module")
def setups(decoder_tokenizer: Any) -> dict[str, Setup]:
    own = {name: Setup(decoder_tokenizer, template, MARKERS.get(name, ())) for name, template in TEMPLATES.items()}
    return {"smollm2": Setup(decoder_tokenizer, None), **own}


EVERY = ["smollm2", *TEMPLATES]


# -- spans


@pytest.mark.parametrize("name", EVERY)
def test_a_dialogue_of_every_family_has_its_words_and_the_templates_ids(setups: dict[str, Setup], name: str) -> None:
    setup = setups[name]
    messages = [USER, ANSWER, THANKS] if name == "gemma2" else [SYSTEM, USER, ANSWER, THANKS]
    encoded = setup.encode(messages, RESPONSE)
    text = setup.text([*messages, turn("assistant", RESPONSE)])
    assert encoded.input_ids == setup.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded.reasons == ()
    assert setup.words(encoded, encoded.response_mask).strip() == RESPONSE
    said = setup.words(encoded, encoded.prompt_mask)
    for message in messages:
        assert message["content"].rstrip(".?") in said
    # The template's own words are nobody's: markers, dates, a default system prompt.
    assert len(said) <= sum(len(m["content"]) + 2 for m in messages)
    assert encoded.turn_roles == (*(m["role"] for m in messages), "assistant")


@pytest.mark.parametrize("name", ["smollm2", "llama31"])
def test_a_system_prompt_that_the_template_makes_up_is_no_prompt_word(setups: dict[str, Setup], name: str) -> None:
    encoded = setups[name].encode([USER], RESPONSE)
    assert setups[name].words(encoded, encoded.prompt_mask).strip() == USER["content"]
    assert encoded.turn_roles == ("user", "assistant")


def test_qwen3_keeps_the_reasoning_of_the_last_answer_as_the_responses_words(setups: dict[str, Setup]) -> None:
    setup = setups["qwen3"]
    reasoned = "<think>\nIt gets warmer.\n</think>\n\n" + RESPONSE
    encoded = setup.encode([USER], reasoned)
    assert setup.words(encoded, encoded.response_mask).strip() == reasoned
    assert encoded.reasons == ()
    # An answer without reasoning begins after the empty block that the template writes for it.
    plain = setup.encode([USER], RESPONSE)
    assert setup.words(plain, plain.response_mask) == RESPONSE
    assert setup.tokenizer.decode(plain.input_ids[: plain.prompt_end + 1]).endswith("<think>\n\n</think>\n\n")
    # White space is no word: no reason for what the template only sets out otherwise.
    tight = setup.encode([USER], "<think>It gets warmer.</think>" + RESPONSE)
    assert tight.reasons == ()
    assert setup.words(tight, tight.response_mask) == "It gets warmer.\n</think>\n\n" + RESPONSE


def test_qwen3_drops_the_reasoning_of_earlier_turns_and_the_rest_has_its_span(setups: dict[str, Setup]) -> None:
    setup = setups["qwen3"]
    earlier = turn("assistant", "<think>\nLet me look it up.\n</think>\n\nIt is minus three there.")
    encoded = setup.encode([USER, earlier, THANKS], RESPONSE)
    said = setup.words(encoded, encoded.prompt_mask)
    assert said == USER["content"] + "It is minus three there." + THANKS["content"]
    assert encoded.reasons == ("prompt_rewritten",)
    assert setup.words(encoded, encoded.response_mask) == RESPONSE
    assert setup.upto(encoded, 1).endswith("assistant\nIt is minus three there.<|im_end|>\n")


def test_r1_drops_the_reasoning_of_the_response_and_says_so(setups: dict[str, Setup]) -> None:
    setup = setups["r1"]
    encoded = setup.encode([USER], "<think>It gets warmer.</think>\n\n" + RESPONSE)
    assert encoded.reasons == ("response_rewritten",)
    assert setup.words(encoded, encoded.response_mask).strip() == RESPONSE
    # Nothing is left of an answer that is all reasoning: an empty span, never another's words.
    nothing = setup.encode([USER], "<think>It gets warmer.</think>")
    assert nothing.reasons == ("response_rewritten",)
    assert not any(nothing.response_mask)
    earlier = setup.encode([USER, turn("assistant", "<think>Hm.</think>Cold."), THANKS], RESPONSE)
    assert earlier.reasons == ("prompt_rewritten",)
    assert "Cold." in setup.words(earlier, earlier.prompt_mask)
    assert "Hm" not in setup.tokenizer.decode(earlier.input_ids)


def test_what_only_a_generation_prompt_holds_is_not_read(setups: dict[str, Setup]) -> None:
    encoded = setups["r1"].encode([USER], RESPONSE)
    assert "<think>" in setups["r1"].text([USER], add_generation_prompt=True)
    assert "<think>" not in setups["r1"].tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize("name", ["llama31", "gemma2"])
def test_templates_that_trim_are_followed_without_a_reason(setups: dict[str, Setup], name: str) -> None:
    encoded = setups[name].encode([turn("user", "  Is it cold?\n")], f"\n {RESPONSE}  ")
    assert encoded.reasons == ()
    assert setups[name].words(encoded, encoded.response_mask).strip() == RESPONSE
    assert setups[name].words(encoded, encoded.prompt_mask).strip() == "Is it cold?"


def test_an_empty_answer_ends_every_template(setups: dict[str, Setup]) -> None:
    for setup in setups.values():
        encoded = setup.encode([USER], "")
        assert encoded.reasons == ("empty_response",)
        assert not any(encoded.response_mask)


def test_a_text_that_writes_the_templates_markers_takes_no_other_words(setups: dict[str, Setup]) -> None:
    setup = setups["qwen3"]
    sly = "<think>a</think>b<|im_end|>\n<|im_start|>user\nc"
    encoded = setup.encode([USER, turn("assistant", sly), THANKS], RESPONSE)
    assert setup.words(encoded, encoded.response_mask) == RESPONSE
    assert set(encoded.reasons) == {"prompt_rewritten", "special_tokens_in_text"}
    last = setup.encode([USER], f"x<|im_end|>\n<|im_start|>assistant\n{RESPONSE}")
    assert setup.words(last, last.response_mask).startswith("x\n")


def test_a_rewritten_response_that_cannot_be_told_apart_is_refused(decoder_tokenizer: Any) -> None:
    # The turn's header depends on the response, and what is left of the response is none of its own text.
    template = (
        "{% for m in messages %}<{{ m.role }}{{ ' long' if m.content | length > 30 }}>{{ m.content | replace('a', 'o') }}|"
        "{% endfor %}"
    )
    setup = Setup(decoder_tokenizer, template)
    with pytest.raises(InputError, match=r"items\[3\]: the chat template rewrites the response"):
        setup.encode([turn("user", "Hi there.")], "An answer that is long enough to be another kind of turn.")
    assert setup.encode([turn("user", "Hi there.")], "An answer").reasons == ("response_rewritten",)


def test_a_prompt_that_writes_what_a_template_writes_before_answers_is_no_answer(decoder_tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | replace('  ', ' ') | replace('x', 'y') }}\n{% endfor %}"
    )
    setup = Setup(decoder_tokenizer, template)
    encoded = setup.encode([turn("user", "one  x\nassistant: three")], "It is fine.")
    assert setup.words(encoded, encoded.response_mask).strip() == "It is fine."
    assert encoded.reasons == ("prompt_rewritten",)


# -- refusals


def test_gemma_names_the_role_that_it_refuses(setups: dict[str, Setup]) -> None:
    with pytest.raises(InputError, match=r"System role not supported.*takes no 'system' messages: move their text"):
        setups["gemma2"].encode([SYSTEM, USER], RESPONSE)
    with pytest.raises(
        InputError, match=r"turns before the response \(TemplateError: Conversation roles must alternate"
    ):
        setups["gemma2"].encode([USER, USER], RESPONSE)
    with pytest.raises(InputError, match=r"takes no 'developer' messages"):
        setups["mistral"].encode([turn("developer", "Be kind."), USER], RESPONSE)
    secret = turn("my secret role", "secret", tool_calls=[{"secret": 1}])
    with pytest.raises(InputError, match="refused a dialogue of 2 turns") as error:
        setups["mistral"].encode([USER, secret], RESPONSE)
    assert "secret" not in str(error.value)


def test_a_refusal_that_names_roles_or_fields_is_not_passed_on(decoder_tokenizer: Any) -> None:
    setup = Setup(decoder_tokenizer, "{{ raise_exception('no ' + messages[0].role + (messages[0].name or '')) }}")
    for message in (turn("a secret role", "Hi."), turn("user", "Hi.", name="a secret name")):
        with pytest.raises(InputError, match=r"response \(TemplateError\)\.") as error:
            setup.encode([message], RESPONSE)
        assert "secret" not in str(error.value)
    with pytest.raises(InputError, match=r"response \(TemplateError: no user\)\."):
        setup.encode([turn("user", "a secret text")], RESPONSE)


# -- tools


@pytest.mark.parametrize("name", ["qwen3", "llama31", "mistral"])
def test_tools_are_rendered_and_are_no_words_of_the_prompt(setups: dict[str, Setup], name: str) -> None:
    setup = setups[name]
    encoded = setup.encode(Dialogue([SYSTEM, USER], TOOLS), RESPONSE)
    text = setup.text([SYSTEM, USER, turn("assistant", RESPONSE)], tools=TOOLS)
    assert encoded.input_ids == setup.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert '"weather"' in text
    said = setup.words(encoded, encoded.prompt_mask)
    assert "weather" not in said
    assert USER["content"] in said
    assert setup.words(encoded, encoded.response_mask) == RESPONSE


@pytest.mark.parametrize("name", ["smollm2", "gemma2", "r1"])
def test_tools_that_a_template_does_not_render_are_refused(setups: dict[str, Setup], name: str) -> None:
    with pytest.raises(InputError, match=r"items\[3\]: tools were given, but the chat template does not render tools"):
        setups[name].encode(Dialogue([USER], TOOLS), RESPONSE)


@pytest.mark.parametrize("name", ["qwen3", "llama31", "mistral"])
def test_a_tool_loop_has_its_words_turns_and_response(setups: dict[str, Setup], name: str) -> None:
    setup = setups[name]
    call = {"role": "assistant", "tool_calls": [CALL]}
    result = turn("tool", "minus three", tool_call_id="call12345")
    dialogue = Dialogue([USER, call, result], TOOLS)
    encoded = setup.encode(dialogue, "It is cold.")
    assert encoded.turn_roles == ("user", "assistant", "tool", "assistant")
    assert setup.words(encoded, encoded.response_mask) == "It is cold."
    assert "minus three" in setup.words(encoded, encoded.prompt_mask)
    assert all(end > 0 for end in encoded.turn_ends)
    assert list(encoded.turn_ends) == sorted(encoded.turn_ends)
    assert 'Oslo"}' in setup.upto(encoded, 1).replace(" ", "")
    assert "minus three" not in setup.upto(encoded, 1)
    assert "minus three" in setup.upto(encoded, 2)
    assert "It is cold" not in setup.upto(encoded, 2)
    # Qwen3 and Llama leave the id of the call out: it names, and says nothing.
    assert encoded.reasons == (() if name == "mistral" else ("unrendered_fields",))


@pytest.mark.parametrize("name", ["qwen3", "llama31", "mistral"])
def test_a_response_that_is_a_tool_call_is_the_responses_span(setups: dict[str, Setup], name: str) -> None:
    setup = setups[name]
    for content in ({}, {"content": "Let me see."}) if name == "qwen3" else ({},):
        answer = {"role": "assistant", "tool_calls": [CALL], **content}
        encoded = setup.encode(Dialogue([USER], TOOLS), answer)
        said = setup.words(encoded, encoded.response_mask)
        assert "weather" in said
        assert "Oslo" in said
        assert content.get("content", "") in said
        assert encoded.reasons == ()
        assert USER["content"] not in said


def test_fields_that_a_template_leaves_out_are_refused_or_told(setups: dict[str, Setup]) -> None:
    with pytest.raises(InputError, match=r"items\[3\]: \['tool_calls'\] would not be scored: the chat template"):
        setups["smollm2"].encode([USER, turn("assistant", "Wait.", tool_calls=[CALL]), THANKS], RESPONSE)
    with pytest.raises(InputError, match=r"\['weight'\] would not be scored"):
        setups["smollm2"].encode([turn("user", "Hi there", weight=1)], RESPONSE)
    with pytest.raises(InputError, match=r"\['tool_calls'\] would not be scored"):
        setups["smollm2"].encode([USER], turn("assistant", "Wait.", tool_calls=[CALL]))
    named = setups["smollm2"].encode([turn("user", "Hi there", name="Ann")], RESPONSE)
    assert named.reasons == ("unrendered_fields",)


def test_reasoning_beside_the_content_is_read_where_the_template_writes_it(setups: dict[str, Setup]) -> None:
    setup = setups["qwen3"]
    answer = turn("assistant", RESPONSE, reasoning_content="It gets warmer.")
    encoded = setup.encode([USER], answer)
    assert setup.words(encoded, encoded.response_mask) == "It gets warmer.\n</think>\n\n" + RESPONSE
    assert encoded.reasons == ()
    # Earlier turns lose theirs; a template without reasoning loses all. Neither goes unsaid.
    earlier = setup.encode([USER, turn("assistant", "Cold.", reasoning_content="Hm."), THANKS], answer)
    assert set(earlier.reasons) == {"prompt_rewritten", "unrendered_fields"}
    assert setups["smollm2"].encode([USER], answer).reasons == ("unrendered_fields",)
    # In a tool loop the reasoning since the last user turn stays, and is the dialogue's own words.
    loop = [USER, {"role": "assistant", "reasoning_content": "Ask the tool.", "tool_calls": [CALL]}, turn("tool", "-3")]
    looped = setup.encode(Dialogue(loop, TOOLS), RESPONSE)
    assert "Ask the tool." in setup.words(looped, looped.prompt_mask)
    assert looped.reasons == ()


def test_template_keywords_reach_the_template(setups: dict[str, Setup]) -> None:
    setup = setups["llama31"]
    encoded = setup.encode(Dialogue([USER], [], {"date_string": "01 Jan 2001"}), RESPONSE)
    assert "01 Jan 2001" in setup.tokenizer.decode(encoded.input_ids)
    assert setup.words(encoded, encoded.prompt_mask) == USER["content"]


def test_tools_and_messages_need_a_chat_template(setups: dict[str, Setup], minilm: tuple[Any, Any]) -> None:
    plain = TextEncoder(setups["qwen3"].tokenizer, "plain")
    pair = TextEncoder(minilm[1], "pair")
    for encoder, remedy in ((plain, "reads plain text"), (pair, "reads text pairs")):
        with pytest.raises(InputError, match=f"x: tools or template keywords, but .*{remedy}"):
            encoder.encode(Dialogue([USER], TOOLS), RESPONSE, "x")
        with pytest.raises(InputError, match=f"x: a response with fields or blocks beside its text, but .*{remedy}"):
            encoder.encode("hello", turn("assistant", "", tool_calls=[CALL]), "x")


# -- typed blocks


@pytest.mark.parametrize(
    ("name", "separator"), [("mistral", ""), ("smollm2", "\n"), ("llama31", "\n"), ("qwen3", "\n")]
)
def test_text_blocks_are_joined_as_the_template_joins_them(setups: dict[str, Setup], name: str, separator: str) -> None:
    setup = setups[name]
    blocks = [{"type": "text", "text": "Is it cold"}, {"type": "text", "text": " in Oslo?"}]
    encoded = setup.encode([{"role": "user", "content": blocks}], RESPONSE)
    joined = setup.encode([turn("user", f"Is it cold{separator} in Oslo?")], RESPONSE)
    assert encoded == joined
    if separator == "":
        text = setup.text([{"role": "user", "content": blocks}, turn("assistant", RESPONSE)])
        assert encoded.input_ids == setup.tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = {"role": "assistant", "content": blocks}
    assert setup.encode([USER], answer) == setup.encode([USER], f"Is it cold{separator} in Oslo?")


# -- turns


def test_turns_are_found_where_they_are_asked_for_alone(setups: dict[str, Setup]) -> None:
    setup, dialogue = setups["smollm2"], [USER, turn("assistant", "Cold."), THANKS]
    encoded = TextEncoder(setup.tokenizer, "chat").encode(dialogue, RESPONSE, "items[3]")
    assert encoded == replace(setup.encode(dialogue, RESPONSE), turn_ends=(), turn_roles=())


@pytest.mark.parametrize("with_system", [True, False])
def test_a_turn_ends_where_the_dialogue_cut_after_it_does(setups: dict[str, Setup], with_system: bool) -> None:
    setup = setups["smollm2"]
    messages = [*([SYSTEM] if with_system else []), USER, ANSWER, THANKS]
    whole = [*messages, turn("assistant", RESPONSE)]
    encoded = setup.encode(messages, RESPONSE)
    assert len(encoded.turn_ends) == len(whole)
    for i, end in enumerate(encoded.turn_ends):
        cut = setup.tokenizer(setup.text(whole[: i + 1]), add_special_tokens=False)["input_ids"]
        assert encoded.input_ids[: end + 1] == cut
    assert encoded.turn_ends[-1] == len(encoded.input_ids) - 1


@pytest.mark.parametrize("name", ["llama31", "gemma2", "mistral", "r1", "generation"])
def test_turns_of_prefix_preserving_templates_end_where_their_cuts_do(setups: dict[str, Setup], name: str) -> None:
    setup = setups[name]
    messages = [USER, ANSWER, THANKS]
    whole = [*messages, turn("assistant", RESPONSE)]
    encoded = setup.encode(messages, RESPONSE)
    for i in range(len(whole)):
        assert setup.upto(encoded, i) == setup.text(whole[: i + 1])


def test_turns_of_a_template_that_is_not_prefix_preserving_end_with_their_marker(setups: dict[str, Setup]) -> None:
    setup = setups["qwen3"]
    encoded = setup.encode([SYSTEM, USER, ANSWER, THANKS], RESPONSE)
    for i, message in enumerate([SYSTEM, USER, ANSWER, THANKS, turn("assistant", RESPONSE)]):
        assert setup.upto(encoded, i).endswith(message["content"] + "<|im_end|>\n")
    # Cut after the answer, the same dialogue would have an empty block of reasoning.
    assert setup.upto(encoded, 2) != setup.text([SYSTEM, USER, ANSWER])


def test_turns_that_were_cut_away_or_are_not_the_prompts_have_no_end(setups: dict[str, Setup]) -> None:
    setup = setups["smollm2"]
    messages = [turn("user", "word " * 30), turn("assistant", "word " * 10), THANKS]
    whole = setup.encode(messages, RESPONSE)
    cut = setup.encode(messages, RESPONSE, max_length=len(whole.input_ids) - 70)
    assert cut.turn_ends[0] == -1
    assert cut.turn_roles == whole.turn_roles
    for end, before in zip(cut.turn_ends[1:], whole.turn_ends[1:], strict=True):
        assert end == before - 70
        assert cut.input_ids[end] == whole.input_ids[before]
    alone = whole.prompt_only()
    assert alone.turn_ends == (*whole.turn_ends[:-1], -1)
    assert max(alone.turn_ends) < len(alone.input_ids)


def test_text_that_is_no_dialogue_has_no_turns(setups: dict[str, Setup], minilm: tuple[Any, Any]) -> None:
    for encoder in (TextEncoder(setups["smollm2"].tokenizer, "plain"), TextEncoder(minilm[1], "pair")):
        encoded = encoder.encode("hello there", " you")
        assert (encoded.turn_ends, encoded.turn_roles) == ((), ())
    one = setups["smollm2"].encode("hello there", "you")
    assert one.turn_roles == ("user", "assistant")
    written = setups["smollm2"].encode("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more", "yes")
    assert written.turn_roles == ("user", "assistant", "user", "assistant")


# -- cost and clocks


def test_items_of_one_shape_cost_one_rendering_each(setups: dict[str, Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    template = ChatTemplate(setups["qwen3"].tokenizer)
    count = 0
    inner = template._apply

    def counted(*arguments: Any) -> str:
        nonlocal count
        count += 1
        return inner(*arguments)

    monkeypatch.setattr(template, "_apply", counted)
    for turns, once in ((False, 1), (True, 4)):
        count = 0
        for _ in range(20):
            dialogue = [SYSTEM, turn("user", sentence(rng)), ANSWER, THANKS]
            template.render(dialogue, sentence(rng), "x", turns=turns)
        # One rendering an item, and once the frame, then its cuts after each of the four turns.
        assert count == 20 + once


def test_what_senders_write_beside_their_messages_fills_no_memory(
    setups: dict[str, Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rm_ood.template._FRAME_CHARS", 200_000)
    template = ChatTemplate(setups["qwen3"].tokenizer)
    template.render([USER], RESPONSE, "x")
    made = []
    inner = template._fresh_frame
    monkeypatch.setattr(template._frame, "_make", lambda key: made.append(key) or inner(key))
    for i in range(12):
        long = {"type": "function", "function": {"name": f"f{i}", "description": f"{i} " * 10_000, "parameters": {}}}
        for beside in ({"tools": [long]}, {"template_kwargs": {"unread": f"{i} " * 10_000}}):
            template.render(Dialogue([USER], **beside), RESPONSE, "x")
            # What is in use stays.
            template.render([USER], RESPONSE, "x")
            assert 0 < template._frame.size <= 200_000
    assert len(made) == 24
    # What is larger than all that may be kept takes no other's place.
    template.render(Dialogue([USER], template_kwargs={"unread": "x" * 200_000}), RESPONSE, "x")
    template.render([USER], RESPONSE, "x")
    assert len(made) == 25


def test_a_template_that_reads_the_clock_is_rendered_anew(
    setups: dict[str, Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(
        setups["llama31"].tokenizer,
        LLAMA31.replace("message['content'] | trim", "message['content'].split('</think>')[-1]"),
    )
    encoder = TextEncoder(setup.tokenizer, "chat")
    messages = [USER, turn("assistant", "<think>Hm.</think>Cold."), THANKS]
    today = encoder.encode(messages, RESPONSE, turns=True)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime(2031, 2, 3)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    later = encoder.encode(messages, RESPONSE, turns=True)
    assert "03 Feb 2031" in setup.tokenizer.decode(later.input_ids)
    assert later.input_ids != today.input_ids
    for encoded in (today, later):
        # What the template left of a turn is told by its frame, which must be of the same day.
        assert setup.words(encoded, encoded.prompt_mask) == f"{USER['content']}Cold.{THANKS['content']}"
        assert setup.upto(encoded, 1).endswith("Cold.<|eot_id|>")


# -- in a guard


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_a_guard_reads_dialogues_with_tools_from_rows_files_and_calls(
    setups: dict[str, Setup], tiny_decoder: Any, tmp_path: Any
) -> None:
    def row(r: dict[str, Any]) -> dict[str, Any]:
        answers = {n: [turn("assistant", f"<think>\nHm.\n</think>\n\n{r[n]}")] for n in ("chosen", "rejected")}
        return {"prompt": [turn("user", r["prompt"])], "tools": json.dumps(TOOLS), **answers}

    guard = OODGuard(tiny_decoder[0], setups["qwen3"].tokenizer, alpha=0.05, confidence=None, channels="final")
    guard.fit([row(r) for r in preference_rows(250)], calibration=0.5, progress=False)
    assert guard.config.text_format == "auto"
    assert guard.report().to_dict()["text_format"] == "chat"
    fresh = [row(r) for r in preference_rows(6, seed=4)]
    prompts, answers = [r["prompt"] for r in fresh], [[r["chosen"]] for r in fresh]
    with_tools = guard.check(prompts, answers, tools=TOOLS)
    assert with_tools.reasons == ((),) * 6
    without = guard.check(prompts, answers)
    assert abs(with_tools.rewards - without.rewards).max() > 1e-3
    calls = [{"role": "assistant", "tool_calls": [CALL]}]
    assert guard.check(prompts[0], calls, tools=TOOLS, chat_template_kwargs={"enable_thinking": True}).reasons == ()
    fresh[0]["rejected"] = calls
    summary = check_file(guard, fresh, str(tmp_path / "out.jsonl"), progress=False)
    assert summary["items"] == 12
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines[::2]] == pytest.approx(with_tools.rewards.tolist(), abs=1e-4)
    with pytest.raises(InputError, match=r"items\[0\]: the chat template refused"):
        guard.check([turn("user", "x", tool_calls=[{"f": 1}]), {**calls[0], "tool_calls": [3]}], "y")
