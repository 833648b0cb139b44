"""What may be a prompt or a response: strings, messages, and dialogues with tools; checked before anything reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rm_ood.errors import InputError

# `role`, `content` (a string, or several text blocks; absent beside tool calls) and whatever else the template renders.
Message = dict[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """Messages with what their chat template renders beside them.

    Attributes:
        messages: the turns before the response.
        tools: JSON schemas of the tools, or none.
        template_kwargs: further keywords of the chat template, such as `enable_thinking`.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)


Text = str | list[Message] | Dialogue
# A message where the response is more than a text: tool calls, reasoning apart, several text blocks.
Response = str | Message

_DIALOGUE_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}
# `input_text` and `output_text` are the Responses API's names for the same block.
_TEXT_BLOCKS = ("text", "input_text", "output_text")
_NO_TEMPLATE_KWARGS = frozenset(
    {
        "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
        "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
        "sanitize_control_tokens",
    }
)  # fmt: skip


def check_prompt(value: Any, where: str, *, allow_empty: bool = False, max_chars: int = 200_000) -> Text:
    """A prompt as a string, as a list of `{"role", "content"}` messages, or as a `Dialogue`.

    Raises:
        InputError: another type, a message without role or text, an empty prompt, a text past `max_chars`.
    """
    if isinstance(value, str):
        _check_string(value, where, max_chars)
        if not value.strip() and not allow_empty:
            raise InputError(f"{where}: empty. Pass allow_empty=True if empty prompts are part of your traffic.")
        return value
    if isinstance(value, Dialogue):
        messages = check_prompt(value.messages, f"{where}.messages", allow_empty=allow_empty, max_chars=max_chars)
        return check_dialogue(messages, value.tools, value.template_kwargs, f"{where}.", max_chars=max_chars)
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: expected str or a list of messages, got {_kind(value)}")
    messages = [_check_message(message, f"{where}[{i}]", max_chars) for i, message in enumerate(value)]
    size = sum(len(content_text(m)) + _size(_extras(m)) for m in messages)
    if size > max_chars:
        raise InputError(
            f"{where}: {size} characters in {len(messages)} messages; the limit is max_chars={max_chars}. Cut the dialogue, "
            "or raise max_chars."
        )
    if not allow_empty and not any(content_text(m).strip() for m in messages):
        raise InputError(f"{where}: no text in {len(messages)} messages. Pass allow_empty=True if that can happen.")
    return messages


def check_dialogue(prompt: Text, tools: Any, template_kwargs: Any, where: str, *, max_chars: int = 200_000) -> Text:
    """A checked prompt with its tools and template keywords; as it is where there are none.

    Args:
        tools: JSON schemas as a list of mappings or as a JSON string, or None.
        template_kwargs: keywords of the chat template as a mapping, or None.
        where: what an error puts before `tools`, such as `rows[3].`.

    Raises:
        InputError: another type, not JSON, text past `max_chars`, a keyword that is the tokenizer's own.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"{where}tools: a string that is not JSON. Pass a list of JSON schemas.") from error
    if tools and not (isinstance(tools, (list, tuple)) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InputError(f"{where}tools: expected a list of JSON schemas, or one as a JSON string, got {_kind(tools)}")
    if template_kwargs and not isinstance(template_kwargs, Mapping):
        raise InputError(f"{where}chat_template_kwargs: expected a mapping, got {_kind(template_kwargs)}")
    # A column of a data set has None where another row has a value.
    kwargs = {str(name): value for name, value in (template_kwargs or {}).items() if value is not None}
    reserved = sorted(_NO_TEMPLATE_KWARGS & set(kwargs))
    if reserved:
        raise InputError(f"{where}chat_template_kwargs: {reserved} are the tokenizer's own, not the template's")
    if not tools and not kwargs:
        return prompt
    schemas = [dict(tool) for tool in tools or ()]
    _check_json(schemas, f"{where}tools", max_chars)
    _check_json(kwargs, f"{where}chat_template_kwargs", max_chars)
    return Dialogue(messages_of(prompt), schemas, kwargs)


def check_response(value: Any, where: str, *, max_chars: int = 200_000) -> Response:
    """A response as a string; a message list must hold one assistant message.

    Returns:
        The text; or the message itself where it holds more (tool calls, reasoning apart, several text blocks).

    Raises:
        InputError: another type, several messages, a text past `max_chars`. An empty response is allowed.
    """
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise InputError(
                f"{where}: expected one assistant message, got {len(value)}; earlier turns belong to prompt"
            )
        message = _check_message(value[0], f"{where}[0]", max_chars)
        if message["role"] != "assistant":
            raise InputError(f"{where}[0].role: expected 'assistant', got another role")
        return message if _extras(message) or not isinstance(message["content"], str) else message["content"]
    if not isinstance(value, str):
        raise InputError(f"{where}: expected str, got {_kind(value)}")
    _check_string(value, where, max_chars)
    return value


def _check_message(message: Any, where: str, max_chars: int) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: expected a message with role and content, got {_kind(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InputError(f"{where}.role: expected str, got {_kind(role)}")
    extras = {str(name): value for name, value in message.items() if name not in ("role", "content") and value}
    _check_json(extras, where, max_chars)
    if content is None and "tool_calls" in extras:
        # Some templates tell a missing content from an empty one.
        return {"role": role, **extras}
    if isinstance(content, (list, tuple)):
        blocks = [_check_block(block, f"{where}.content[{i}]", max_chars) for i, block in enumerate(content)]
        return {"role": role, "content": blocks if len(blocks) > 1 else "".join(b["text"] for b in blocks), **extras}
    if not isinstance(content, str):
        raise InputError(f"{where}.content: expected str or a list of text blocks, got {_kind(content)}")
    _check_string(content, f"{where}.content", max_chars)
    return {"role": role, "content": content, **extras}


def _check_block(block: Any, where: str, max_chars: int) -> dict[str, str]:
    if not isinstance(block, Mapping):
        raise InputError(f"{where}: expected a typed block, got {_kind(block)}")
    kind, text = block.get("type"), block.get("text")
    if kind not in _TEXT_BLOCKS:
        # A type is a short word; anything else could be the text itself.
        named = repr(kind) if isinstance(kind, str) and re.fullmatch(r"[a-z_]{1,20}", kind) else _kind(kind)
        raise InputError(f"{where}.type: expected 'text', got {named}. A guard scores text only: leave the item out.")
    if not isinstance(text, str):
        raise InputError(f"{where}.text: expected str, got {_kind(text)}")
    _check_string(text, f"{where}.text", max_chars)
    others = sorted(str(k) for k, v in block.items() if k not in ("type", "text") and v)
    if others:
        raise InputError(f"{where}: {others} would not be scored. Leave them out.")
    return {"type": "text", "text": text}


def _check_json(value: Any, where: str, max_chars: int) -> None:
    """What a template renders beside the texts, under the texts' own rules."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected plain JSON values ({type(error).__name__})") from error
    _check_string(text, where, max_chars)


def _extras(message: Message) -> Message:
    """What a message holds beside role and content."""
    return {name: value for name, value in message.items() if name not in ("role", "content")}


def _size(extras: Message) -> int:
    return len(json.dumps(extras, ensure_ascii=False)) if extras else 0


def content_text(message: Message, separator: str = "\n") -> str:
    """The text of a message's content; several blocks are joined."""
    content = message.get("content", "")
    return content if isinstance(content, str) else separator.join(block["text"] for block in content)


def response_text(response: Response) -> str:
    """One string that tells a response from others: its text, or its message as JSON."""
    return response if isinstance(response, str) else json.dumps(response, ensure_ascii=False, sort_keys=True)


def messages_of(prompt: Text) -> list[Message]:
    """The turns before the response; a string is one user turn, or the dialogue written in it."""
    if isinstance(prompt, Dialogue):
        return prompt.messages
    if isinstance(prompt, str):
        return parse_dialogue(prompt) or [{"role": "user", "content": prompt}]
    return prompt


def _check_string(text: str, where: str, max_chars: int) -> None:
    if len(text) > max_chars:
        raise InputError(
            f"{where}: {len(text)} characters; the limit is max_chars={max_chars}. Cut it, or raise max_chars."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: lone surrogate at character {error.start}: not valid Unicode text") from error


def _kind(value: Any) -> str:
    size = f" of length {len(value)}" if isinstance(value, (str, bytes, list, tuple, Mapping)) else ""
    return "None" if value is None else type(value).__name__ + size


def parse_dialogue(text: str) -> list[Message] | None:
    """Messages of a `Human: ...`/`Assistant: ...` string (the hh-rlhf format), or None where it is not one."""
    parts = _DIALOGUE_TURN.split("\n\n" + text.strip("\n"))
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        return None
    turns = list(zip(parts[1::2], parts[2::2], strict=True))
    if turns[-1][0] == "Assistant" and not turns[-1][1].strip():
        # A prompt that ends in `Assistant:` asks for that turn; it does not hold it.
        turns.pop()
    return [{"role": _ROLES[speaker], "content": content.strip()} for speaker, content in turns]
