"""Specifications to conditions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import preference_rows

from rm_ood.errors import InputError
from rm_ood.study import Condition, Pair, conditions, read_pairs, registered_shifts, registry
from rm_ood.study.shifts import vocabulary

ROWS = read_pairs(preference_rows(30))
MINE = """
from rm_ood.study import ShiftContext, shift

@shift("shouting", sides=("response",), severities=(0.5, 1.0))
def shouting(text: str, context: ShiftContext) -> str:
    rng = context.random_for(text)
    return " ".join(w.upper() if rng.random() < context.strength else w for w in text.split(" "))

def plain(text, context):
    return text[::-1]

def broken(text, context):
    raise RuntimeError("mine")

NUMBER = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(registry, "_SHIFTS", registered_shifts())
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    before = set(sys.modules)
    yield path
    for name in set(sys.modules) - before:
        if name.startswith("rm_ood_shift_"):
            del sys.modules[name]


@pytest.mark.parametrize("name", [n for n, s in registered_shifts().items() if not s.needs_reward])
def test_every_shift_gives_its_sides_and_severities(name: str) -> None:
    shift = registered_shifts()[name]
    found = list(conditions(ROWS, [name]))
    cells = [(c.side, c.severity) for c in found]
    assert cells == [(side, p) for side in shift.sides for p in shift.severities or (None,)]
    assert all(c.name == name and c.paired == shift.paired for c in found)
    for condition in found:
        for old, new in zip(ROWS, condition.rows, strict=True):
            assert (old.id, old.cluster, old.subset) == (new.id, new.cluster, new.subset)
            if condition.side == "response":
                assert old.prompt == new.prompt
            if condition.side == "prompt":
                assert old.responses == new.responses


def test_a_specification_narrows_side_and_severity() -> None:
    def cells(*specs: str) -> list[tuple[str, float | None]]:
        return [(c.side, c.severity) for c in conditions(ROWS, specs)]

    assert cells("word noise:response") == [("response", p) for p in (0.1, 0.3, 0.5, 0.9)]
    assert cells("word noise:response:0.7") == [("response", 0.7)]
    assert cells("word noise:0.7") == [("prompt", 0.7), ("response", 0.7), ("both", 0.7)]
    assert cells("mismatched:prompt", "truncation:both:.5") == [("prompt", None), ("both", 0.5)]


def test_what_does_not_exist_is_named_before_anything_is_made() -> None:
    with pytest.raises(InputError, match=r"shift 'wrd noise': no such shift\. There are: .*word noise"):
        conditions(ROWS, ["word noise", "wrd noise"])
    with pytest.raises(InputError, match="'answer' is neither a side"):
        conditions(ROWS, ["word noise:answer"])
    with pytest.raises(InputError, match=r"expected NAME\[:SIDE\]\[:SEVERITY\]"):
        conditions(ROWS, ["word noise:response:0.5:0.7"])
    with pytest.raises(InputError, match="side 'both': it changes prompt, response"):
        conditions(ROWS, ["mismatched:both"])
    with pytest.raises(InputError, match=r"severity 1\.5: expected 0 to 1"):
        conditions(ROWS, ["word noise:response:1.5"])
    with pytest.raises(InputError, match="got one string"):
        conditions(ROWS, "word noise")
    with pytest.raises(InputError, match="none to shift"):
        conditions([], ["word noise"])


def test_severity_zero_is_the_clean_rows() -> None:
    for name, shift in registered_shifts().items():
        if shift.severities and not shift.needs_reward:
            assert all(c.rows == ROWS for c in conditions(ROWS, [f"{name}:0"])), name


def test_conditions_are_made_when_they_are_asked_for() -> None:
    made = conditions(ROWS, ["word noise"])
    first = next(made)
    assert isinstance(first, Condition)
    assert first.rows != ROWS


def test_a_users_function_is_a_shift(mine: Path) -> None:
    found = list(conditions(ROWS, [f"{mine}:shouting", f"{mine}:plain:prompt", "shouting:response:1"]))
    assert [(c.name, c.side, c.severity) for c in found] == [
        ("shouting", "response", 0.5),
        ("shouting", "response", 1.0),
        ("plain", "prompt", None),
        ("shouting", "response", 1.0),
    ]
    assert found[1].rows == found[3].rows
    assert found[1].rows[0].chosen == str(ROWS[0].chosen).upper()
    assert found[2].rows[0].prompt == str(ROWS[0].prompt)[::-1]
    with pytest.raises(RuntimeError, match="mine"):
        list(conditions(ROWS, [f"{mine}:broken"]))


def test_a_users_file_is_checked(mine: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such function\. The file has: broken, plain, shouting"):
        conditions(ROWS, [f"{mine}:shout"])
    with pytest.raises(InputError, match="no such function"):
        conditions(ROWS, [f"{mine}:NUMBER"])
    with pytest.raises(InputError, match=r"no file at .*absent\.py"):
        conditions(ROWS, [f"{tmp_path / 'absent.py'}:f"])
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f(:", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(SyntaxError):
            conditions(ROWS, [f"{wrong}:f"])


def test_the_vocabulary_is_the_rows_own_words() -> None:
    rows = [Pair("0", "One two, Three", "one four\n5", ("six's",), 0)]
    assert vocabulary(rows) == ["four", "one", "three"]
    new = next(conditions(ROWS, ["word noise:response:0.9"], words=["zzz"]))
    drawn = {word for row in new.rows for word in str(row.chosen).split()} - set(vocabulary(ROWS)) - {"zzz"}
    assert not drawn
    assert any("zzz" in str(row.chosen) for row in new.rows)


def test_noise_is_the_same_in_another_process() -> None:
    rows = [Pair("0", "one two three four five six seven", "a b c d e f", ("g h",), 0)]
    specs = ["word noise:both:0.5", "word noise (paper):both:0.5", "character noise:both:0.5", "shuffled words:both:1"]
    code = f"""
from rm_ood.study import Pair, conditions
rows = [Pair("0", {rows[0].prompt!r}, {rows[0].chosen!r}, {rows[0].rejected!r}, 0)]
print([(c.rows[0].prompt, c.rows[0].responses) for c in conditions(rows, {specs!r}, seed=3)])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str([(c.rows[0].prompt, c.rows[0].responses) for c in conditions(rows, specs, seed=3)])
