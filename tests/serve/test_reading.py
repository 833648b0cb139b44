"""Bodies to queries: the guard's rules for texts, groups and sessions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rm_ood.serve.reading import TextRules, score_queries
from rm_ood.serve.refusal import Refusal
from rm_ood.serve.scorer import Query

RULES = {"max_items": 4, "max_chars": 50, "allow_empty": False, "grouped": False}


def read(body: Any, **rules: Any) -> list[Query]:
    return score_queries(json.dumps(body).encode(), TextRules(**{**RULES, **rules}), 10_000)


def refused(body: Any, **rules: Any) -> str:
    with pytest.raises(Refusal) as caught:
        read(body, **rules)
    assert caught.value.status == 422
    return caught.value.message


def test_an_empty_prompt_is_the_guards_affair() -> None:
    body = {"prompt": " ", "response": ""}
    assert read(body, allow_empty=True)[0].prompt == " "
    assert refused(body).startswith("prompt: empty")


def test_a_guard_with_groups_needs_one_and_another_takes_none() -> None:
    body = {"prompt": "a", "response": "b"}
    assert read({**body, "group": "x"}, grouped=True)[0].group == "x"
    assert "calibrated by group" in refused(body, grouped=True)
    assert "has no groups" in refused({**body, "group": "x"})


def test_sessions_are_named_or_the_prompts() -> None:
    items = [
        {"prompt": "One", "response": "a"},
        {"prompt": " one ", "responses": ["b", "c"]},
        {"prompt": "One", "response": "d", "session": "prompt"},
    ]
    first, second, third, named = read({"items": items})
    assert first.session == second.session == third.session
    assert named.session == ("session", "prompt") != first.session
    assert [q.name for q in (first, second, third, named)] == ["0", "1#0", "1#1", "2"]


def test_messages_keep_what_the_template_renders() -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
        {"role": "assistant", "content": "done", "reasoning_content": "r"},
    ]
    (query,) = read({"messages": messages}, max_chars=500)
    assert query.prompt[0] == {"role": "user", "content": messages[0]["content"], "name": "n"}  # type: ignore[index]
    assert query.prompt[1]["tool_calls"] == call  # type: ignore[index, call-overload]
    assert query.response == messages[-1]


def test_errors_name_places_and_never_what_came() -> None:
    assert refused(
        {"items": [{"prompt": "a", "response": "b"}, {"prompt": "a", "responses": ["b", "x" * 51]}]}
    ).startswith("items[1].responses[1]: 51 characters")
    told = refused({"prompt": "a", "response": "b", "sekret": {"sekret": 1}, "id": ["sekret"]})
    assert "(unknown field)" in told
    assert "sekret" not in told
    assert refused({"items": [{"prompt": 1, "response": 2, "x": 3}] * 4}).endswith("more")


@pytest.mark.parametrize(
    "body",
    [
        {"items": [{}] * 30_000},
        {"prompt": "a", "response": "b", "extra": [[]] * 30_000},
        {"messages": [{"role": 1}] * 15_000},
    ],
    ids=lambda body: next(iter(body)),
)
def test_a_body_of_very_many_values_is_refused_before_it_is_checked(body: Any) -> None:
    with pytest.raises(Refusal, match="more than 20,000 values") as caught:
        score_queries(json.dumps(body).encode(), TextRules(**RULES), 2**20)
    assert (caught.value.status, caught.value.kind) == (422, "too_many_values")
