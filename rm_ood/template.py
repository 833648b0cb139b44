"""Chat templates: the rendered text, and which of its characters are whose words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rm_ood.errors import InputError
from rm_ood.preferences import Message, Text, parse_dialogue

# Stand in for the texts while a template is rendered, to learn what the template writes between them.
_PLACEHOLDER = "\u2039response\u203a"
_SLOT = "\u2039message {}\u203a"

Characters = tuple[int, int]


def render_chat(tokenizer: Any, prompt: Text, response: str, where: str) -> tuple[str, Characters, list[Characters]]:
    """Rendered text, the response's characters, and the characters of the prompt's own words.

    Raises:
        InputError: the template refuses the roles, or rewrites the response.
    """
    parsed = parse_dialogue(prompt) if isinstance(prompt, str) else prompt
    messages: list[Message] = [{"role": "user", "content": str(prompt)}] if parsed is None else parsed
    rendered = _apply(tokenizer, messages, response, where)
    slots = [_SLOT.format(i) for i in range(len(messages))]
    masked = [{**message, "content": slot} for message, slot in zip(messages, slots, strict=True)]
    known = _match_frame(
        rendered,
        _apply(tokenizer, masked, _PLACEHOLDER, where),
        [*slots, _PLACEHOLDER],
        [*(message["content"] for message in messages), response],
    )
    if known is not None:
        return rendered, known[-1], known[:-1]
    return _search(rendered, _apply(tokenizer, messages, _PLACEHOLDER, where), messages, where)


def _search(rendered: str, frame: str, messages: list[Message], where: str) -> tuple[str, Characters, list[Characters]]:
    """`render_chat` for templates whose own text depends on the messages' content."""
    at = frame.rfind(_PLACEHOLDER)
    before, after = (frame[:at], frame[at + len(_PLACEHOLDER) :]) if at >= 0 else ("", "")
    if at < 0 or not (rendered.startswith(before) and rendered.endswith(after)):
        raise InputError(
            f"{where}: the chat template rewrites the response or the turns before it, so its place in the text is not "
            "known. Pass the rendered text as plain strings (text_format='plain')."
        )
    start, end = len(before), max(len(before), len(rendered) - len(after))
    spans, search = [], 0
    for message in messages:
        for content in (message["content"], message["content"].strip()):
            found = rendered.find(content, search, start)
            if content and found >= 0:
                spans.append((found, found + len(content)))
                search = found + len(content)
                break
    return rendered, (start, end), spans


def _apply(tokenizer: Any, messages: Sequence[Message], response: str, where: str) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": response}], tokenize=False, add_generation_prompt=False
        )
    except Exception as error:  # a template is the model's own Jinja code: it may raise anything
        raise InputError(
            f"{where}: the chat template refused a dialogue of {len(messages)} turns before the response "
            f"({type(error).__name__}). Templates differ in the roles and the order of turns that they take."
        ) from error
    return str(text)


def _match_frame(rendered: str, frame: str, slots: list[str], texts: list[str]) -> list[tuple[int, int]] | None:
    """Where `texts`, as they are or stripped, stand in `rendered`, which is `frame` with texts in place of slots.

    None where it is not: the template changes its own words with those of the messages.
    """
    spans, at = [], 0
    for slot, text in zip(slots, texts, strict=True):
        before, found, frame = frame.partition(slot)
        if not found or not rendered.startswith(before, at):
            return None
        at += len(before)
        forms = [t for t in (text, text.strip()) if rendered.startswith(t + frame[:1], at)]
        if not forms:
            return None
        spans.append((at, at + len(forms[0])))
        at += len(forms[0])
    return spans if rendered[at:] == frame else None
