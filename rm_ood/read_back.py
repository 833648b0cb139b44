"""Text that was rendered elsewhere, read back into prompt and response, for protocols that send nothing else.

A chat template is a program, so its text is cut at what the template writes between placeholders, and believed only if the
template writes that very text again from what was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rm_ood.dialogue import Message, Text, parse_dialogue
from rm_ood.errors import InputError

_ROLES = ("user", "assistant", "user", "assistant")
# Stands for the response while its prompt is read.
_ANSWER = "\u2039answer\u203a"


@dataclass(frozen=True)
class _Frame:
    """What a template writes around turns; `system` is between a system message and the first user turn, None without."""

    lead: str
    system: str | None
    to_assistant: str
    to_user: str
    end: str


class ReadBack:
    """Prompt and response of rendered texts.

    Args:
        tokenizer: the one whose chat template wrote them: the policy's, or the reward model's.
        text_format: the guard's: `"chat"`, `"pair"` or `"plain"`.
        remedy: what an error tells to do about a prompt that this template did not write.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_format: str,
        remedy: str = "Send messages (/v1/score), or text rendered by the reward model's template.",
    ) -> None:
        self._tokenizer, self._remedy = tokenizer, remedy
        self._is_chat = text_format == "chat"
        self._frames = [f for f in (self._frame(True), self._frame(False)) if f is not None] if self._is_chat else []
        self._specials = tuple(token for token in tokenizer.all_special_tokens if token)
        ends = (tokenizer.eos_token, tokenizer.pad_token)
        self._ends = tuple(token for token in ends if token)

    def split(self, text: str, prompt: str | None, where: str) -> tuple[Text, str]:
        """Prompt and response of a whole text.

        Args:
            text: rendered, with its special tokens.
            prompt: what it begins with, where the protocol tells.
        Raises:
            InputError: where the response begins cannot be told; or, for a guard of chats, the prompt is neither what the
                template writes nor a `Human: ...`/`Assistant: ...` dialogue: the markers of another template would be read
                as words of one user turn, which no reward is meant for.
        """
        if prompt is not None:
            if not text.startswith(prompt):
                raise InputError(f"{where}: it does not begin with its prompt, so the response cannot be told")
            return self._after(prompt, text[len(prompt) :], where)
        dialogue = self._dialogue(text)
        if dialogue is not None:
            return dialogue[:-1], str(dialogue[-1]["content"])
        self._refuse_specials(text, where)
        turns = parse_dialogue(text)
        if turns is None or turns[-1]["role"] != "assistant":
            raise InputError(
                f"{where}: where the response begins cannot be told: send messages, or a prompt and a response"
            )
        before, _, response = text.rpartition("\n\nAssistant:")
        return before + "\n\nAssistant:", response.removeprefix(" ")

    def _after(self, prompt: str, response: str, where: str) -> tuple[Text, str]:
        """The messages of a prompt, and all of the text after it as the response, whatever turns a policy wrote there."""
        # Some templates begin the assistant's text with a space that is no part of what asks for it.
        for gap in ("", " "):
            dialogue = self._dialogue(prompt + gap + _ANSWER)
            if dialogue is not None and str(dialogue[-1]["content"]).endswith(_ANSWER):
                # What a template puts into the assistant's mouth is read as its words.
                begun = str(dialogue[-1]["content"]).removesuffix(_ANSWER)
                return dialogue[:-1], begun + self._ended(response.removeprefix(gap))
        bare = self._bare(prompt, start=True)
        is_dialogue = parse_dialogue(bare) is not None and not self._has_specials(bare)
        if self._is_chat and not is_dialogue:
            raise InputError(
                f"{where}: its prompt does not read back as a dialogue: it is not what the chat template of this tokenizer "
                f"writes. {self._remedy}"
            )
        return bare, self._bare(response, end=True)

    def _ended(self, response: str) -> str:
        """Without the template's end marker, or the tokenizer's."""
        for frame in self._frames:
            for end in (frame.end, frame.end.rstrip()):
                if end and response.endswith(end):
                    return response.removesuffix(end)
        return self._bare(response, end=True)

    def _refuse_specials(self, text: str, where: str) -> None:
        if self._is_chat and self._has_specials(text):
            raise InputError(
                f"{where}: it holds special tokens, and is not what the reward model's chat template writes. Send messages, "
                "or text rendered by that template."
            )

    def _has_specials(self, text: str) -> bool:
        return any(token in text for token in self._specials)

    def _dialogue(self, text: str) -> list[Message] | None:
        """Messages that the template renders to this text; None where there are none."""
        for frame in self._frames:
            found = _cut(text, frame)
            if found is None:
                continue
            again = self._render(found)
            # A response that was cut off has no end marker.
            if again is not None and text.rstrip() in (again.rstrip(), again.removesuffix(frame.end).rstrip()):
                return found
        return None

    def _frame(self, with_system: bool) -> _Frame | None:
        roles = ("system", *_ROLES) if with_system else _ROLES
        slots = [f"\u2039slot {i}\u203a" for i in range(len(roles))]
        text = self._render([{"role": role, "content": slot} for role, slot in zip(roles, slots, strict=True)])
        if text is None or any(text.count(slot) != 1 for slot in slots):
            return None
        parts = []
        for slot in slots:
            before, _, text = text.partition(slot)
            parts.append(before)
        lead, *between = parts
        system = between.pop(0) if with_system else None
        to_assistant, to_user, again = between
        return _Frame(lead, system, to_assistant, to_user, text) if again == to_assistant and to_user else None

    def _render(self, messages: list[Message]) -> str | None:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
        except Exception:  # a template is the model's own Jinja code: it may raise anything
            return None

    def _bare(self, text: str, *, start: bool = False, end: bool = False) -> str:
        """Without the begin token before it, or the end tokens after it."""
        if start and self._tokenizer.bos_token:
            text = text.removeprefix(self._tokenizer.bos_token)
        while end and (found := next((token for token in self._ends if text.endswith(token)), None)) is not None:
            text = text.removesuffix(found)
        return text


def _cut(text: str, frame: _Frame) -> list[Message] | None:
    """Messages between what the frame writes; the last one the assistant's."""
    if not text.startswith(frame.lead):
        return None
    rest, messages = text[len(frame.lead) :], []
    if frame.system is not None:
        content, found, rest = rest.partition(frame.system)
        if not found:
            return None
        messages.append({"role": "system", "content": content})
    while True:
        content, found, rest = rest.partition(frame.to_assistant)
        if not found:
            return None
        messages.append({"role": "user", "content": content})
        content, found, rest = rest.partition(frame.to_user)
        if not found:
            content = content.removesuffix(frame.end)
            # The end marker alone, where the template writes more after it.
            content = content.removesuffix(frame.end.rstrip()) if frame.end.strip() else content
            messages.append({"role": "assistant", "content": content})
            return messages
        messages.append({"role": "assistant", "content": content})
