"""Specifications to conditions."""

from __future__ import annotations

import pytest
from conftest import preference_rows

from rm_ood.errors import InputError
from rm_ood.study import Condition, conditions, read_pairs, registered_shifts

ROWS = read_pairs(preference_rows(30))


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
