"""What `check` was called with, as items: tools and template keywords for the whole call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rm_ood.calls import prompt_numbers, read_call
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


def test_items_of_equal_keys_answer_one_prompt() -> None:
    assert prompt_numbers(None, 3) is None
    for keys in ([7, 7, 3, 7], np.array([7, 7, 3, 7]), torch.tensor([7, 7, 3, 7]), "aaba", ["a", "a", "b", "a"]):
        listed = list(keys) if isinstance(keys, str) else keys
        found = prompt_numbers(listed, 4)
        assert found is not None
        assert found.tolist() == [0, 0, 1, 0]
    # As `check` compares prompts.
    mixed = prompt_numbers(["Is it cold?", [USER], Dialogue([USER], TOOLS), [dict(USER)]], 4)
    assert mixed is not None
    assert mixed.tolist() == [0, 0, 1, 0]
    for wrong, words in (
        ([1], r"expected one key per item, 2 of them, got 1 of them"),
        ("ab", "got str"),
        (7, "got int"),
        ([1, None], r"prompts\[1\]: expected a whole number, a string or messages, got NoneType"),
        ([1.5, 1], r"prompts\[0\]: .*got float"),
        (torch.tensor([1.0, 2.0]), r"prompts\[0\]: .*got Tensor"),
    ):
        with pytest.raises(InputError, match=words):
            prompt_numbers(wrong, 2)
