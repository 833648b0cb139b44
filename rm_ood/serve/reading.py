"""Request bodies to queries: strict JSON, strict schema, the limits, and the guard's own rules for texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from rm_ood.dialogue import Response, Text, check_dialogue, check_prompt, check_response, messages_of
from rm_ood.errors import FormatError, InputError
from rm_ood.preferences import prompt_key
from rm_ood.serve.refusal import Refusal
from rm_ood.serve.schemas import (
    CLASSIFY,
    MOST_TURNS,
    REWARD,
    SCORE,
    Batch,
    ClassifyMessages,
    ClassifyTexts,
    Conversation,
    Message,
    PromptResponse,
    PromptResponses,
    RewardRequest,
    TextBlock,
)
from rm_ood.serve.scorer import Query
from rm_ood.strict_json import parse_json

_MOST_ERRORS = 5
# Values in a body, keys not counted: checking each, and telling what is wrong with each, holds up everybody.
_MOST_VALUES = 20_000
_UNKNOWN = "(unknown field)"


@dataclass(frozen=True)
class TextRules:
    """What a text may be.

    Attributes:
        max_items: answers in a request. max_chars: characters of a text. allow_empty: accept empty prompts.
        grouped: the guard has a grouping column, so that each item names its group.
    """

    max_items: int
    max_chars: int
    allow_empty: bool
    grouped: bool


def parse(data: bytes, adapter: TypeAdapter[Any], limit: int) -> Any:
    """A body as its schema's model.

    Raises:
        Refusal: not strict JSON (400), or not of the schema (422).
    """
    try:
        value = parse_json(data, "body", limit)
    except FormatError as error:
        cause = error.__cause__
        where = f" (character {cause.pos})" if isinstance(cause, json.JSONDecodeError) else ""
        raise Refusal(
            400,
            "not_json",
            f"the body is not strict JSON in UTF-8{where}: no doubled keys, no NaN or Infinity, no lone surrogates",
        ) from None
    if _has_more_values(value, _MOST_VALUES):
        raise Refusal(422, "too_many_values", f"more than {_MOST_VALUES:,} values in one request")
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise Refusal(422, "invalid_request", _told(error)) from None


def _has_more_values(value: Any, most: int) -> bool:
    waiting, count = [value], 1
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict | list):
            count += len(inner)
            if count > most:
                return True
            waiting.extend(inner.values() if isinstance(inner, dict) else inner)
    return False


def _told(error: ValidationError) -> str:
    """Where and what, in our own names: a key that came is the sender's text."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    lines = []
    for one in found[:_MOST_ERRORS]:
        path = list(one["loc"])
        if one["type"] == "extra_forbidden":
            path[-1:] = [_UNKNOWN]
        lines.append(f"{_path(path)}: {one['msg']}")
    more = f"; {len(found) - _MOST_ERRORS} more" if len(found) > _MOST_ERRORS else ""
    return "; ".join(lines) + more


_MODELS: tuple[type[BaseModel], ...] = (
    PromptResponse, PromptResponses, Conversation, Batch, Message, TextBlock, RewardRequest, ClassifyTexts, ClassifyMessages,
)  # fmt: skip
_FIELDS = frozenset(name for model in _MODELS for name in model.model_fields)


def _path(parts: Sequence[Any]) -> str:
    """`items[3].prompt`; forms of a schema are left out, and so is what is no name of ours."""
    out = ""
    for part in parts:
        if isinstance(part, int):
            out += f"[{part}]"
        elif part in _FIELDS or part == _UNKNOWN:
            out += f".{part}" if out else part
    return out or "body"


def score_queries(data: bytes, rules: TextRules, limit: int) -> list[Query]:
    """Queries of `POST /v1/score`.

    Raises:
        Refusal: as `parse`, or texts or counts past the limits, or an id that another item has (422).
    """
    request = parse(data, SCORE, limit)
    items = request.items if isinstance(request, Batch) else [request]
    count = sum(len(item.responses) if isinstance(item, PromptResponses) else 1 for item in items)
    check_count(count, rules)
    found: list[Query] = []
    for i, item in enumerate(items):
        where = f"items[{i}]." if isinstance(request, Batch) else ""
        found += _of_item(item, str(i) if item.id is None else item.id, where, rules)
    _check_names(found)
    return found


def _check_names(queries: Sequence[Query]) -> None:
    """Raises Refusal (422) where two rows of the reply would have one id."""
    first: dict[str, str] = {}
    for query in queries:
        other = first.setdefault(query.name, query.where)
        if other != query.where:
            raise Refusal(
                422,
                "invalid_request",
                f"{query.where}.id: the reply would name {other} so too (an item without an id has its number, one of several "
                "answers id#0, id#1, ...): give each item an id of its own",
            )


def check_count(count: int, rules: TextRules) -> None:
    """Raises Refusal (422) where a request asks for more answers than one may."""
    if count > rules.max_items:
        raise Refusal(422, "too_many_items", f"{count} answers in one request: at most {rules.max_items}")


def _of_item(item: Any, name: str, where: str, rules: TextRules) -> Iterator[Query]:
    if rules.grouped != (item.group is not None):
        what = "needed: this guard is calibrated by group" if rules.grouped else "unknown: this guard has no groups"
        raise Refusal(422, "invalid_request", f"{where}group: {what}")
    prompt: Any
    answers: list[tuple[str, Any]]
    if isinstance(item, Conversation):
        if item.messages[-1].role != "assistant":
            raise Refusal(
                422, "invalid_request", f"{where}messages: the last message must be the assistant's: it is the response"
            )
        prompt, answers = item.messages[:-1], [("messages", item.messages[-1:])]
    elif isinstance(item, PromptResponses):
        prompt = item.prompt
        answers = [(f"responses[{j}]", answer) for j, answer in enumerate(item.responses)]
    else:
        prompt, answers = item.prompt, [("response", item.response)]
    asked = "messages" if isinstance(item, Conversation) else "prompt"
    text = _beside(read_prompt(prompt, f"{where}{asked}", rules), item, where, rules)
    session = prompt_session(text) if item.session is None else ("session", item.session)
    for j, (field, answer) in enumerate(answers):
        label = f"{name}#{j}" if isinstance(item, PromptResponses) else name
        response = read_response(answer, f"{where}{field}", rules)
        yield Query(label, text, response, session, item.group, where.rstrip(".") or "item")


def _beside(prompt: Text, item: Any, where: str, rules: TextRules) -> Text:
    """The prompt with its tools and template keywords. Raises Refusal (422)."""
    try:
        return check_dialogue(prompt, item.tools, item.chat_template_kwargs, where, max_chars=rules.max_chars)
    except InputError as error:
        raise text_refusal(error) from None


Split = Callable[[str, str | None, str], tuple[Text, str]]


def reward_queries(data: bytes, rules: TextRules, limit: int, split: Split) -> list[Query]:
    """Queries of `POST /get_reward`. Raises Refusal as `score_queries`, and where a text cannot be split."""
    request = parse(data, REWARD, limit)
    if len(request.query) != len(request.prompts):
        raise Refusal(
            422,
            "invalid_request",
            f"{len(request.query)} query and {len(request.prompts)} prompts: one prompt per query",
        )
    check_count(len(request.query), rules)
    pairs = zip(request.query, request.prompts, strict=True)
    return [_of_text(text, prompt, i, f"query[{i}]", rules, split) for i, (text, prompt) in enumerate(pairs)]


def classify_queries(data: bytes, rules: TextRules, limit: int, split: Split) -> tuple[list[Query], str]:
    """Queries of `POST /classify`, and the model's name as it came. Raises Refusal as `reward_queries`."""
    request = parse(data, CLASSIFY, limit)
    name = request.model or ""
    if isinstance(request, ClassifyMessages):
        return list(_of_item(Conversation(messages=request.messages), "0", "", rules)), name
    texts = [request.input] if isinstance(request.input, str) else request.input
    check_count(len(texts), rules)
    return [_of_text(text, None, i, f"input[{i}]", rules, split) for i, text in enumerate(texts)], name


def _of_text(text: str, prompt: str | None, i: int, where: str, rules: TextRules, split: Split) -> Query:
    if rules.grouped:
        raise Refusal(422, "invalid_request", "this guard is calibrated by group, which only /v1/score can name")
    try:
        # The limit comes before the template's work.
        check_response(text, where, max_chars=2 * rules.max_chars)
        before, response = split(text, prompt, where)
    except InputError as error:
        raise text_refusal(error) from None
    asked = read_prompt(before, where, rules)
    return Query(str(i), asked, read_response(response, where, rules), prompt_session(asked), where=where)


def read_prompt(value: Any, where: str, rules: TextRules) -> Text:
    """A checked prompt, of so many turns at most, also where they are written in a string. Raises Refusal (422)."""
    try:
        prompt = check_prompt(_plain(value), where, allow_empty=rules.allow_empty, max_chars=rules.max_chars)
    except InputError as error:
        raise text_refusal(error) from None
    turns = len(messages_of(prompt))
    if turns > MOST_TURNS:
        raise Refusal(422, "invalid_request", f"{where}: {turns} turns before the response: at most {MOST_TURNS}")
    return prompt


def read_response(value: Any, where: str, rules: TextRules) -> Response:
    """A checked response. Raises Refusal (422)."""
    try:
        return check_response(_plain(value), where, max_chars=rules.max_chars)
    except InputError as error:
        raise text_refusal(error) from None


def text_refusal(error: InputError, queries: Sequence[Query] = ()) -> Refusal:
    """What the guard says of a text that it does not take; its errors never quote one, but number the queries."""
    message = (
        re.sub(r"^items\[(\d+)\]", lambda found: queries[int(found[1])].where, str(error)) if queries else str(error)
    )
    return Refusal(422, "invalid_text", message)


def prompt_session(prompt: Text) -> tuple[str, int]:
    """The session of an item that names none: its prompt, as calibration counts prompts."""
    return "prompt", prompt_key(prompt if messages_of(prompt) else "")


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return [m.model_dump(exclude_none=True) if isinstance(m, Message) else m for m in value]
