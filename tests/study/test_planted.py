from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from rm_ood.canaries import CODE, EVERYDAY, SCRIPTS
from rm_ood.study.planted import EMPTY_RESPONSE, MISMATCHED, OTHER_SCRIPT, changed, changes

ENGLISH: list[tuple[Any, str]] = list(EVERYDAY[:4])
RUSSIAN: list[tuple[Any, str]] = list(SCRIPTS["CYRILLIC"])


def one(name: str, prompt: Any, response: str = "a b", sides: tuple[str, ...] = ("prompt",), i: int = 0) -> Any:
    return changed((prompt, response), i, changes(ENGLISH)[name], sides, seed=0)


@pytest.mark.parametrize("name", list(changes(ENGLISH)))
def test_a_shift_changes_the_sides_that_it_is_asked_to(name: str) -> None:
    prompt, response = EVERYDAY[5]
    for sides in (("prompt",), ("response",), ("prompt", "response")):
        new = one(name, prompt, response, sides)
        assert (new[0] != prompt, new[1] != response) == ("prompt" in sides, "response" in sides)
        assert new == one(name, prompt, response, sides)


def test_shuffled_words_are_the_same_words() -> None:
    text = "one two  three\nfour five"
    shuffled = one("shuffled words", text)[0]
    assert shuffled != text
    assert Counter(shuffled.split()) == Counter(text.split())
    assert one("shuffled words", text, i=7)[0] == shuffled
    assert one("shuffled words", "Yes.\n")[0] == "Yes.\n"
    chinese = SCRIPTS["CJK"][0][0]
    assert one("shuffled words", chinese)[0] != chinese
    assert Counter(one("shuffled words", chinese)[0]) == Counter(chinese)


def test_one_word_is_repeated_as_often_as_there_were_words() -> None:
    assert one("one word repeated", "a long sentence")[0] == " ".join(["sentence"] * 8)
    assert one("one word repeated", " ".join("abcdefghijkl"))[0] == " ".join(["a"] * 12)
    assert one("one word repeated", " ")[0] == " "


def test_noise_is_as_long_as_the_text() -> None:
    noise = one("random characters", "words " * 20)[0]
    assert 110 <= len(noise) <= 120
    assert noise != one("random characters", "other " * 20)[0]


def test_code_and_foreign_talk_go_through_all_there_is() -> None:
    assert {one("code", "x", i=i)[0] for i in range(60)} == {prompt for prompt, _ in CODE}
    talk = {one(OTHER_SCRIPT, "x", i=i)[0] for i in range(60)}
    assert talk == {prompt for script in SCRIPTS.values() for prompt, _ in script}
    assert one(EMPTY_RESPONSE, "x", "y", ("response",)) == ("x", "")


def test_the_items_own_scripts_are_no_shift_for_them() -> None:
    planted = {changed(("x", "y"), i, changes(RUSSIAN)[OTHER_SCRIPT], ("prompt",), 0)[0] for i in range(60)}
    assert not planted & {prompt for prompt, _ in SCRIPTS["CYRILLIC"]}
    assert planted >= {prompt for prompt, _ in SCRIPTS["GREEK"]} | {EVERYDAY[0][0]}
    everything = [*ENGLISH, *(pair for talk in SCRIPTS.values() for pair in talk)]
    assert OTHER_SCRIPT not in changes(everything)
    assert OTHER_SCRIPT in changes([("12", "34")])


def test_in_a_dialogue_the_last_user_turn_is_changed() -> None:
    dialogue = [
        {"role": "user", "content": "first question of all"},
        {"role": "assistant", "content": "an answer"},
        {"role": "user", "content": "second question of all"},
    ]
    new = one("random characters", dialogue)[0]
    assert [m["role"] for m in new] == [m["role"] for m in dialogue]
    assert new[:2] == dialogue[:2]
    assert new[2]["content"] != "second question of all"
    assert dialogue[2]["content"] == "second question of all"
    alone = one("random characters", [{"role": "system", "content": "be kind"}])[0]
    assert alone[0]["content"] != "be kind"
    assert one(EMPTY_RESPONSE, [], "y", ("response",)) == ([], "")
    assert one("shuffled words", [])[0] == ""


def test_a_mismatch_is_no_shift_that_channels_are_chosen_by() -> None:
    assert MISMATCHED not in changes(ENGLISH)
