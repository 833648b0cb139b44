"""Rendered text back to what it was made of: the response after its prompt, and the messages of a chat template."""

from __future__ import annotations

from typing import Any

from rm_ood.dialogue import Message
from rm_ood.errors import InputError

# Stand for a text in a rendered chat; no template and no user writes them.
_SYSTEM, _USER, _ASSISTANT, _AGAIN = "‹1 system›", "‹2 user›", "‹3 assistant›", "‹4 user›"


def response_after(query: str, prompt: str, where: str) -> str:
    """What a policy wrote: the text of a whole rollout after its prompt.

    Raises:
        InputError: the rollout does not begin with the prompt.
    """
    if not query.startswith(prompt):
        raise InputError(
            f"{where}: does not begin with its prompt, so the response cannot be told from it. Was the prompt cut to the longest "
            "length, or does the policy's tokenizer not give it back as it was?"
        )
    return query[len(prompt) :]


class TemplateReader:
    """Messages from the text that a chat template made of them.

    For dialogues of one system message or none, then user and assistant in turns, the user last. What is read is rendered
    again and has to give the same text, so a template that this cannot follow is an error and never a guess.

    Args:
        tokenizer: the policy's, whose chat template rendered the prompts.

    Raises:
        InputError: no chat template, or one that does not write messages one after the other.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"tokenizer: {type(tokenizer).__name__} has no chat template to undo")
        self._tokenizer = tokenizer
        user, answer, again = _message("user", _USER), _message("assistant", _ASSISTANT), _message("user", _AGAIN)
        first = self._render([user, answer, again], generate=True)
        parts = _cut(first, _USER, _ASSISTANT, _AGAIN)
        if parts is None:
            raise InputError("tokenizer: its chat template does not write user and assistant messages in their order")
        self._head, self._to_assistant, self._to_user, self._end = parts
        ended = _cut(self._render([user, answer], generate=False), _USER, _ASSISTANT)
        self._answer_end = "" if ended is None else ended[2]
        self._system: tuple[str, str] | None = None
        try:
            with_system = _cut(self._render([_message("system", _SYSTEM), user], generate=True), _SYSTEM, _USER)
        except InputError:
            # A template that takes no system message.
            with_system = None
        if with_system is not None:
            self._system = with_system[0], with_system[1]

    def messages(self, prompt: str, where: str) -> list[Message]:
        """The messages of a rendered prompt.

        Raises:
            InputError: the template did not make it of such messages.
        """
        for found in (self._turns(prompt, self._head, []), *self._with_system(prompt)):
            if found is not None and self._render(found, generate=True) == prompt:
                return found
        raise InputError(
            f"{where}: not what the chat template of {type(self._tokenizer).__name__} makes of system, user and assistant "
            "messages. Is it the policy's tokenizer? A guard fitted on the rendered text itself needs none."
        )

    def answer(self, response: str) -> str:
        """A response without the template's or the tokenizer's end of turn, where it has one."""
        ends = (self._answer_end, self._answer_end.strip(), self._tokenizer.eos_token or "")
        return next((response[: -len(end)] for end in ends if end and response.endswith(end)), response)

    def _with_system(self, prompt: str) -> list[list[Message] | None]:
        if self._system is None or not prompt.startswith(self._system[0]):
            return []
        head, after = self._system
        text, found, _ = prompt[len(head) :].partition(after)
        return [self._turns(prompt, head + text + after, [_message("system", text)])] if found else []

    def _turns(self, prompt: str, head: str, before: list[Message]) -> list[Message] | None:
        """Messages after a head, by what the template writes between them."""
        if not (prompt.startswith(head) and prompt.endswith(self._end)) or len(prompt) < len(head) + len(self._end):
            return None
        rest = prompt[len(head) : len(prompt) - len(self._end)]
        found = [*before]
        while True:
            asked, more, rest = rest.partition(self._to_assistant)
            found.append(_message("user", asked))
            if not more:
                return found
            said, more, rest = rest.partition(self._to_user)
            found.append(_message("assistant", said))
            if not more:
                return None

    def _render(self, messages: list[Message], *, generate: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except TemplateError as error:
            raise InputError(f"the chat template refuses {[m['role'] for m in messages]}") from error
        return str(text)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _cut(text: str, *marks: str) -> list[str] | None:
    """What is before, between and after marks; None where one is missing, doubled or out of order."""
    parts: list[str] = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]
