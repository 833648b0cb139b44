"""One function is one shift; roles, markers and everything beside the texts stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_ood.dialogue import Dialogue, messages_of, parse_dialogue
from rm_ood.errors import InputError
from rm_ood.rewriting import change_prompt, prompt_texts
from rm_ood.study import registry
from rm_ood.study.pairs import Pair, read_pairs
from rm_ood.study.registry import Shift, ShiftContext, map_texts, registered_shifts, shift

HH = "\n\nHuman: how are you\n\nAssistant: I am  well\n\nHuman: and now?\n\nAssistant: "
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    {"role": "assistant", "tool_calls": [{"name": "f"}]},
    {"role": "user", "content": "last"},
]
PAIR = Pair(
    "a", "  ask me ", " good ", ("bad", {"role": "assistant", "content": "x", "reasoning_content": "y"}), 7, "s"
)


@pytest.fixture(autouse=True)
def only_known_shifts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_SHIFTS", registered_shifts())


def up(text: str, context: ShiftContext) -> str:
    return text.upper()


def rows(n: int = 6) -> list[Pair]:
    return read_pairs([{"prompt": f"p {i}", "chosen": f"good {i}", "rejected": "bad"} for i in range(n)])


def test_a_shift_is_one_function() -> None:
    @shift("shouting", severities=(0.5, 1.0))
    def shouting(text: str, context: ShiftContext) -> str:
        rng = context.random_for(text)
        return " ".join(w.upper() if rng.random() < context.strength else w for w in text.split(" "))

    found = registered_shifts()["shouting"]
    assert found.severities == (0.5, 1.0)
    new = found(rows(), ShiftContext("response", 1.0))
    assert [(p.prompt, p.chosen, p.rejected) for p in new[:2]] == [
        ("p 0", "GOOD 0", ("BAD",)),
        ("p 1", "GOOD 1", ("BAD",)),
    ]
    # The function itself stays a plain one.
    assert shouting("abc", ShiftContext("prompt", 1.0)) == "ABC"


def test_sides_and_white_space_at_the_ends_and_fields_beside_the_text_stay() -> None:
    new = map_texts(PAIR, str.upper, "both")
    assert new.prompt == "  ASK ME "
    assert new.chosen == " GOOD "
    assert new.rejected == ("BAD", {"role": "assistant", "content": "X", "reasoning_content": "y"})
    assert map_texts(PAIR, str.upper, "prompt") == replace(PAIR, prompt="  ASK ME ")
    assert map_texts(PAIR, str.upper, "response") == replace(new, prompt=PAIR.prompt)


def test_dialogues_in_every_form_keep_their_turns() -> None:
    assert change_prompt(HH, str.upper) == (
        "\n\nHuman: HOW ARE YOU\n\nAssistant: I AM  WELL\n\nHuman: AND NOW?\n\nAssistant: "
    )
    assert change_prompt("Human: a\n\nAssistant: b\n\nHuman: c", str.upper) == "Human: A\n\nAssistant: B\n\nHuman: C"
    new = change_prompt(MESSAGES, str.upper)
    assert new == [
        {"role": "system", "content": "BE KIND"},
        {"role": "user", "content": [{"type": "text", "text": "ONE"}, {"type": "text", "text": "TWO"}]},
        {"role": "assistant", "tool_calls": [{"name": "f"}]},
        {"role": "user", "content": "LAST"},
    ]
    tools = [{"name": "f"}]
    assert change_prompt(Dialogue(MESSAGES, tools), str.upper) == Dialogue(new, tools)  # type: ignore[arg-type]
    assert prompt_texts(MESSAGES) == ["be kind", "one", "two", "last"]
    assert prompt_texts(HH) == ["how are you", "I am  well", "and now?"]


turns = st.lists(st.text(alphabet="ab :\nHA", min_size=1, max_size=12), min_size=1, max_size=5)


@given(turns, st.sampled_from(["\n\nHuman: x", "Assistant: y\n\nHuman:", "", "\n\n\nAssistant:", "\n"]))
def test_no_change_of_a_text_makes_or_removes_a_turn(texts: list[str], noise: str) -> None:
    marked = "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {text}" for i, text in enumerate(texts))
    before = parse_dialogue(marked)
    new = change_prompt(marked, lambda text: noise + text + noise)
    if before is None:
        return
    after = parse_dialogue(str(new)) or []
    assert [m["role"] for m in after] == [m["role"] for m in before]


def test_the_same_text_gets_the_same_change_even_from_a_careless_function() -> None:
    rng = np.random.default_rng(0)

    def careless(text: str, context: ShiftContext) -> str:
        return f"{text} {rng.random()}"

    new = Shift("careless", careless)(rows(), ShiftContext("response"))
    assert len({p.rejected for p in new}) == 1
    assert len({p.chosen for p in new}) == 6


def test_random_states_depend_on_seed_and_text_alone() -> None:
    a, b = ShiftContext("prompt", 0.1, seed=3), ShiftContext("response", 0.9, seed=3)
    assert a.random_for("x").random() == b.random_for("x").random() != a.random_for("y").random()
    assert a.random_for("x").random() != ShiftContext("prompt", seed=4).random_for("x").random()


def test_a_shift_of_rows_sees_all_of_them_and_cannot_touch_ids() -> None:
    def reverse(given_rows: list[Pair], context: ShiftContext) -> list[Pair]:
        assert list(context.rows) == given_rows
        return given_rows[::-1]

    clean = rows()
    new = Shift("reverse", reverse, rows=True)(clean, ShiftContext("both"))
    assert [p.prompt for p in new] == [p.prompt for p in clean[::-1]]
    assert [(p.id, p.cluster) for p in new] == [(p.id, p.cluster) for p in clean]


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (lambda text, context: 3, {}, "expected a text back, got int"),
        (lambda text, context: text, {}, r"\(both, severity None\): changed none of 6 rows"),
        (lambda text, context: "", {}, "left no text in the prompt of row '0'"),
        (lambda given_rows, context: given_rows[1:], {"rows": True}, "expected 6 rows in a list back, got list of 5"),
        (lambda given_rows, context: None, {"rows": True}, "expected 6 rows in a list back, got NoneType"),
    ],
)
def test_what_a_function_gives_back_is_checked(function: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"shift 'mine'.*{message}"):
        Shift("mine", function, **options)(rows(), ShiftContext("both"))


def test_declarations_are_checked() -> None:
    with pytest.raises(InputError, match=r"sides \['answer'\]: expected some of"):
        shift("x", sides=("answer",))
    for name in ("", "a:b", "a=b"):
        with pytest.raises(InputError, match="a name has neither"):
            shift(name)
    with pytest.raises(InputError, match=r"the name is taken, by word_noise in .*builtin\.py"):
        shift("word noise")(up)
    # The same function once more, as when a file is loaded twice.
    shift("upper")(up)
    shift("upper")(up)


def test_sides_and_severities_are_held_to() -> None:
    plain, graded = Shift("plain", up), Shift("graded", up, ("prompt",), (0.1, 0.2), 2.0)
    with pytest.raises(InputError, match=r"has no severities, got 0\.5"):
        plain(rows(), ShiftContext("both", 0.5))
    with pytest.raises(InputError, match=r"needs a severity, such as 0\.1"):
        graded(rows(), ShiftContext("prompt"))
    with pytest.raises(InputError, match="it changes prompt"):
        graded(rows(), ShiftContext("both", 0.1))
    for severity in (-0.1, 2.1, float("nan")):
        with pytest.raises(InputError, match="expected 0 to 2"):
            graded(rows(), ShiftContext("prompt", severity))
    with pytest.raises(InputError, match="needs a severity"):
        _ = ShiftContext("prompt").strength


def test_rewards_are_checked() -> None:
    with pytest.raises(InputError, match="pass reward="):
        ShiftContext("response").rewards(["p"], ["r"])
    with pytest.raises(InputError, match=r"expected 1 finite rewards, got shape \(2,\)"):
        ShiftContext("response", reward=lambda p, r: [1.0, 2.0]).rewards(["p"], ["r"])
    with pytest.raises(InputError, match="with NaN"):
        ShiftContext("response", reward=lambda p, r: [float("nan")]).rewards(["p"], ["r"])
    assert ShiftContext("response", reward=lambda p, r: [1]).rewards(["p"], ["r"]).dtype == np.float64


def test_roles_survive_every_registered_text_shift() -> None:
    clean = [Pair("0", HH, "fine, thank you very much", ("no",), 1), Pair("1", MESSAGES, "yes and no", ("b c d",), 2)]
    words = ["Human:", "river", "\n\nHuman:"]
    for name, found in registered_shifts().items():
        if found.rows or "prompt" not in found.sides:
            continue
        severity = max(found.severities) if found.severities else None
        new = found(clean, ShiftContext("prompt", severity, words=words))
        for old, row in zip(clean, new, strict=True):
            roles = [[m["role"] for m in messages_of(prompt)] for prompt in (old.prompt, row.prompt)]
            assert roles[0] == roles[1], name
