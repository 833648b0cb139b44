"""What `check` was called with, as items: tools and template keywords for the whole call."""

from __future__ import annotations

from typing import Any

import pytest

from rm_ood.calls import read_call
from rm_ood.config import GuardConfig
from rm_ood.dialogue import Dialogue
from rm_ood.errors import InputError

CONFIG = GuardConfig()
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
USER = {"role": "user", "content": "Is it cold?"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "weather"}}]}


def test_tools_go_to_every_prompt_of_the_call() -> None:
    call = read_call(
        ["Is it cold?", [USER]],
        ["Yes.", ["No.", "Why?"]],
        CONFIG,
        tools=TOOLS,
        template_kwargs={"enable_thinking": False},
    )
    prompt = Dialogue([USER], TOOLS, {"enable_thinking": False})
    assert call.items == [(prompt, "Yes."), (prompt, "No."), (prompt, "Why?")]
    assert call.prompt_index.tolist() == [0, 1, 1]
    assert read_call("Is it cold?", "Yes.", CONFIG, tools=[], template_kwargs={}).items == [("Is it cold?", "Yes.")]


def test_a_dialogue_is_one_prompt() -> None:
    prompt = Dialogue([USER], TOOLS)
    single = read_call(prompt, "Yes.", CONFIG)
    assert (single.is_single, single.items) == (True, [(prompt, "Yes.")])
    several = read_call(prompt, ["Yes.", [CALL]], CONFIG)
    assert (several.is_single, several.items) == (False, [(prompt, "Yes."), (prompt, CALL)])
    listed = read_call([prompt, "Why?"], ["Yes.", "So."], CONFIG)
    assert listed.items == [(prompt, "Yes."), ("Why?", "So.")]
    with pytest.raises(InputError, match="a Dialogue brings its own tools and keywords"):
        read_call(prompt, "Yes.", CONFIG, tools=TOOLS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": "no JSON"}, r"^tools: a string that is not JSON"),
        ({"tools": 3}, r"^tools: expected a list of JSON schemas.*got int"),
        ({"template_kwargs": {"padding": True}}, r"^chat_template_kwargs: \['padding'\] are the tokenizer's own"),
    ],
)
def test_tools_of_another_kind_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_call("Is it cold?", "Yes.", CONFIG, **arguments)


def test_a_prompt_listed_once_for_each_answer_is_one() -> None:
    flat = read_call(["a", "a", "b", "a"], ["1", "2", "3", "4"], CONFIG)
    assert flat.prompt_index.tolist() == [0, 0, 1, 0]
    # The same words as a string and as messages are one; with other tools, or another later turn, they are not.
    turns = [USER, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}]
    prompts = ["Is it cold?", [USER], Dialogue([USER], TOOLS), turns, [USER]]
    assert read_call(prompts, ["x"] * 5, CONFIG).prompt_index.tolist() == [0, 0, 1, 2, 0]
    # Nested answers are numbered by the place of their prompt in the call.
    assert read_call(["a", "a"], [["1", "2"], ["3"]], CONFIG).prompt_index.tolist() == [0, 0, 1]
    assert read_call([], [], CONFIG).prompt_index.shape == (0,)
