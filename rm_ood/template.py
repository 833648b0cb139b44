"""Chat templates: the rendered text, which of its characters are whose words, and where its turns end.

A template is a program: it may strip texts, drop the reasoning of earlier turns, move the system prompt, or write words of
its own. So it is rendered once with the texts and once with placeholders in their place (a frame, cached by its structure),
and the two are laid side by side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rm_ood.dialogue import Dialogue, Message, Response, Text, content_text, messages_of
from rm_ood.errors import InputError
from rm_ood.frames import Frames

# Stand in for the texts while a template is rendered, to learn what the template writes between them.
_PLACEHOLDER = "\u2039response\u203a"
_SLOT = "\u2039message {} {}\u203a"
_MASKED_ANSWER = {"role": "assistant", "content": _PLACEHOLDER}
# Fields of a message that hold the assistant's reasoning. Templates render them, or leave them out of earlier turns.
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Fields that name a turn and hold no words.
_LABELS = frozenset({"name", "tool_call_id", "id"})
# Roles that a template may refuse; only these are named in an error, since any other role is the caller's own text.
_ROLES = ("system", "developer", "tool", "function", "user", "assistant")
# Of frames and their keys: a dialogue of 256 turns with all its cuts takes less than half of it.
_FRAME_CHARS = 2**23

Characters = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A dialogue as its chat template writes it; places are characters of `text`.

    Attributes:
        response: what the template left of the response.
        prompt: the prompt's own words, in the order of the text.
        turn_ends: the end of each turn, prompt messages then the response: where the text ends if the dialogue is cut after
            that turn; -1 where that cannot be told. A template that cannot be cut there (a system message alone) ends the
            turn with its words.
        reasons: `response_rewritten`, `prompt_rewritten`, `unrendered_fields`.
    """

    text: str
    response: Characters
    prompt: list[Characters]
    turn_ends: list[int]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Piece:
    """A text that a placeholder stands for, and the message it belongs to."""

    slot: str
    text: str
    message: int


class ChatTemplate:
    """The chat template of a tokenizer.

    Several text blocks of one message are joined by what the template itself writes between them, or, where it takes strings
    only, by a newline, as inference engines serve such templates.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._frame = Frames(self._fresh_frame, _FRAME_CHARS)

    def render(self, prompt: Text, response: Response, where: str, *, turns: bool = False) -> Rendered:
        """The dialogue's text, and what is where in it.

        Args:
            turns: find where the turns end; the dialogue is rendered anew for each of them.

        Raises:
            InputError: the template refuses the roles, renders neither the tools nor a field of a message, or rewrites the
                response past recognition.
        """
        messages = [self._joined(message) for message in messages_of(prompt)]
        answer = self._joined({"role": "assistant", "content": response} if isinstance(response, str) else response)
        beside = _beside(prompt)
        dialogue = [*messages, answer]
        masked, pieces = _mask(messages)
        key = _key([*masked, _MASKED_ANSWER], *beside)
        try:
            text = self._apply(dialogue, *beside)
        except Exception as error:  # a template is the model's own Jinja code: it may raise anything
            raise self._refusal(masked, beside, error, where) from error
        words, is_more = content_text(answer), bool(set(answer) - {"role", "content"})
        frame = self._frame(key)
        placed = _align(text, frame, pieces, words, is_more)
        if placed is None and frame is not None:
            # The template may have read the clock since the frame was made.
            fresh = self._fresh_frame(key)
            if fresh != frame:
                self._frame.clear()
                frame, placed = fresh, _align(text, fresh, pieces, words, is_more)
        if placed is None:
            placed = _search(text, self._fresh_frame(_key([*messages, _MASKED_ANSWER], *beside)) or "", pieces, where)
        places, span = placed
        if beside[0] and self._fresh_frame(_key(dialogue, [], beside[1])) == text:
            raise InputError(
                f"{where}: tools were given, but the chat template does not render tools: the text is the same without them. "
                "Use the template that the reward model was trained with, or leave the tools out."
            )
        unrendered = self._unrendered(text, dialogue, beside, where)
        left = {p.slot: text[slice(*places[p.slot])] for p in pieces if p.slot in places}
        reasons = []
        if not _holds(text[max([0, *(end for _, end in places.values())]) : span[1]], words):
            reasons.append("response_rewritten")
        if any(p.text.strip() and not _holds(left.get(p.slot, ""), p.text) for p in pieces):
            reasons.append("prompt_rewritten")
        return Rendered(
            text=text,
            response=span,
            prompt=[places[p.slot] for p in pieces if left.get(p.slot) and _holds(p.text, left[p.slot])],
            turn_ends=[*self._turn_ends(text, masked, places, beside, frame or ""), len(text)] if turns else [],
            reasons=(*reasons, *(("unrendered_fields",) if unrendered else ())),
        )

    def _turn_ends(
        self, text: str, masked: list[Message], places: dict[str, Characters], beside: Any, frame: str
    ) -> list[int]:
        closing = frame.rpartition(_PLACEHOLDER)[2]
        ends: list[int] = []
        before: str | None = ""
        for i in range(len(masked)):
            cut = self._frame(_key(masked[: i + 1], *beside))
            slot = _SLOT.format(i, "content")
            end = max((places[f][1] for f in masked[i].values() if isinstance(f, str) and f in places), default=-1)
            if cut is not None and slot in places and slot in cut:
                end = _after(text, end, cut.rpartition(slot)[2], closing) or end
            elif cut is not None and before is not None and cut.startswith(before):
                # A turn without words of its own, such as tool calls: all that the template writes for it.
                end = _after(text, ends[-1] if ends else 0, cut[len(before) :], closing) or end
            before = cut
            ends.append(end)
        return ends

    def _unrendered(self, text: str, turns: list[Message], beside: Any, where: str) -> list[str]:
        """Fields of the messages without which the text would be the same; those with words in them raise."""
        lost = []
        for chosen in (range(len(turns) - 1), range(len(turns) - 1, len(turns))):
            for name in sorted({name for i in chosen for name in turns[i]} - {"role", "content"}):
                without = [
                    {k: v for k, v in turn.items() if k != name or i not in chosen} for i, turn in enumerate(turns)
                ]
                # A template that cannot do without the field reads it.
                if self._fresh_frame(_key(without, *beside)) == text:
                    lost.append(name)
        with_words = sorted({name for name in lost if name not in _LABELS and name not in _REASONING})
        if with_words:
            raise InputError(
                f"{where}: {with_words} would not be scored: the chat template does not render them. Leave them out, or write "
                "them into content."
            )
        return lost

    def _refusal(self, masked: list[Message], beside: Any, error: Exception, where: str) -> InputError:
        """Why the template refused, in its own words: those that it says to placeholders, which quote no text."""
        said = ""
        if not any(beside) and all(len(m) == 2 and m["role"] in _ROLES for m in masked):
            try:
                self._apply([*masked, _MASKED_ANSWER], *beside)
            except Exception as again:  # as above
                said = f": {str(again)[:200]}"
        culprits = [
            role
            for role in _ROLES[:4]
            if any(m["role"] == role for m in masked)
            and self._frame(_key([*(m for m in masked if m["role"] != role), _MASKED_ANSWER], *beside)) is not None
        ]
        hint = (
            f" It takes no {' or '.join(map(repr, culprits))} messages: move their text into a user's."
            if culprits
            else ""
        )
        return InputError(
            f"{where}: the chat template refused a dialogue of {len(masked)} turns before the response "
            f"({type(error).__name__}{said}).{hint} Templates differ in the roles and the order of turns that they take."
        )

    def _joined(self, message: Message) -> Message:
        if isinstance(message.get("content", ""), str):
            return message
        return {**message, "content": content_text(message, self._separator)}

    @cached_property
    def _separator(self) -> str:
        first, second = _SLOT.format(0, "content"), _SLOT.format(1, "content")
        blocks = [{"type": "text", "text": text} for text in (first, second)]
        frame = self._frame(_key([{"role": "user", "content": blocks}], [], {})) or ""
        between = frame.partition(first)[2].partition(second)
        # A template that takes strings only raises, or prints the list.
        return between[0] if between[1] and not between[0].strip() else "\n"

    def _fresh_frame(self, key: str) -> str | None:
        """What the template writes for a JSON key of messages, tools and keywords; None where it refuses them."""
        try:
            return self._apply(*json.loads(key))
        except Exception:  # as in render, where the refusal of the whole dialogue is told
            return None

    def _apply(self, messages: Sequence[Message], tools: list[dict[str, Any]], kwargs: dict[str, Any]) -> str:
        text = self._tokenizer.apply_chat_template(
            list(messages), tools=tools or None, tokenize=False, add_generation_prompt=False, **kwargs
        )
        return str(text)


def _beside(prompt: Text) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return (prompt.tools, prompt.template_kwargs) if isinstance(prompt, Dialogue) else ([], {})


def _key(messages: Sequence[Message], tools: list[dict[str, Any]], kwargs: dict[str, Any]) -> str:
    return json.dumps([list(messages), tools, kwargs])


def _mask(messages: list[Message]) -> tuple[list[Message], list[_Piece]]:
    """The messages with placeholders for their texts. Templates ask whether content beside tool calls is empty."""
    masked, pieces = [], []
    for i, message in enumerate(messages):
        one = dict(message)
        for name in (*_REASONING, "content"):
            text = message.get(name)
            if isinstance(text, str) and (text or len(message) == 2):
                one[name] = _SLOT.format(i, name)
                pieces.append(_Piece(one[name], text, i))
        masked.append(one)
    return masked, pieces


def _align(
    text: str, frame: str | None, pieces: list[_Piece], response: str, is_more: bool
) -> tuple[dict[str, Characters], Characters] | None:
    """Where the texts of `pieces` and the response stand in `text`, which is `frame` with texts in place of slots.

    What the template left of a text that it changed stands between what it writes before and after it. None where the
    template changes its own words with those of the messages.
    """
    if frame is None:
        return None
    pieces = sorted((p for p in pieces if p.slot in frame), key=lambda p: frame.find(p.slot))
    literals, tail = [], frame
    for slot in (*(p.slot for p in pieces), _PLACEHOLDER):
        literal, found, tail = tail.partition(slot)
        if not found:
            return None
        literals.append(literal)
    places, at = {}, 0
    for i, piece in enumerate(pieces):
        if not text.startswith(literals[i], at):
            return None
        at += len(literals[i])
        stop = _stop(text, at, piece.text, literals[i + 1], before_response=i + 1 == len(pieces))
        if stop is None:
            return None
        places[piece.slot] = (at, stop)
        at = stop
    stop = len(text) - len(tail)
    start = (
        _response_start(text[at:stop], literals[-1], response, is_more) if text.endswith(tail) and stop >= at else None
    )
    return None if start is None else (places, (at + start, stop))


def _after(text: str, start: int, written: str, closing: str) -> int | None:
    """Where `written`, which begins at `start`, ends in `text`; in the midst of a dialogue the template may leave one block
    of it out, such as Qwen3's empty `<think>`, as long as the closing of a turn is there."""
    if start < 0:
        return None
    at = start + _shared(written, text[start : start + len(written)])
    rest = written[at - start :]
    for skipped in range(len(rest) - len(closing) + 1 if rest and closing else 1):
        if text.startswith(rest[skipped:], at):
            return at + len(rest) - skipped
    return None


def _stop(text: str, at: int, words: str, after: str, *, before_response: bool) -> int | None:
    """Where the words that begin at `at` end: as they are, stripped, or rewritten up to what the template writes after."""
    forms = [at + len(form) for form in (words, words.strip()) if text.startswith(form, at)]
    for stop in forms:
        if text.startswith(after, stop):
            return stop
    for stop in forms:
        if before_response and _shared(after, text[stop : stop + len(after)]):
            return stop
    found = text.find(after, at) if after else -1
    return found if found >= 0 else None


def _response_start(body: str, header: str, response: str, is_more: bool) -> int | None:
    """Where the response begins in `body`, the text after the prompt's words. The header may change with the response:
    Qwen3 writes an empty `<think>` block before a response that has none."""
    shared = _shared(header, body)
    for form in (response, response.strip()):
        if body.endswith(header + form):
            return len(body) - len(form)
    if shared == len(header):
        return shared
    for form in (response, response.strip()):
        if form and body.endswith(form) and len(body) - len(form) <= shared:
            return len(body) - len(form)
    return shared if shared and (is_more or _holds(response, body[shared:])) else None


def _shared(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _holds(text: str, part: str) -> bool:
    """Whether `part` stands in `text`, white space aside."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())


def _search(text: str, marked: str, pieces: list[_Piece], where: str) -> tuple[dict[str, Characters], Characters]:
    """`_align` for templates whose own words depend on the messages' content: `marked` has the response replaced only."""
    at = marked.rfind(_PLACEHOLDER)
    before, after = (marked[:at], marked[at + len(_PLACEHOLDER) :]) if at >= 0 else ("", "")
    if at < 0 or not (text.startswith(before) and text.endswith(after)):
        raise InputError(
            f"{where}: the chat template rewrites the response or the turns before it, so its place in the text is not "
            "known. Pass the rendered text as plain strings (text_format='plain')."
        )
    start, end = len(before), max(len(before), len(text) - len(after))
    places, search = {}, 0
    for piece in pieces:
        for words in (piece.text, piece.text.strip()):
            found = text.find(words, search, start)
            if words and found >= 0:
                places[piece.slot] = (found, found + len(words))
                search = found + len(words)
                break
    return places, (start, end)
