"""Every shift that comes with the package, on every side: seeded, nested, none at severity 0."""

from __future__ import annotations

import random
from difflib import SequenceMatcher
from itertools import pairwise

import pytest
from conftest import preference_rows, sentence

from rm_ood.dialogue import content_text, messages_of
from rm_ood.errors import InputError
from rm_ood.rewriting import response_texts
from rm_ood.study.builtin import another_prompt
from rm_ood.study.pairs import Pair, read_pairs
from rm_ood.study.registry import ShiftContext, registered_shifts
from rm_ood.study.shifts import vocabulary

RNG = random.Random(0)
HH = [
    {
        "id": f"hh{i}",
        "prompt": f"\n\nHuman: {sentence(RNG)} {i}\n\nAssistant: {sentence(RNG)}\n\nHuman: {sentence(RNG)}\n\nAssistant:",
        "chosen": " " + sentence(RNG),
        "rejected": [sentence(RNG), sentence(RNG)],
    }
    for i in range(6)
]
MESSAGES = [
    {"id": f"m{i}", "prompt": [{"role": "user", "content": sentence(RNG)}], "chosen": sentence(RNG), "rejected": "no no no"}
    for i in range(6)
]  # fmt: skip
ROWS = read_pairs([*preference_rows(12), *HH, *MESSAGES])
WORDS = vocabulary(ROWS)
FREE = {name: s for name, s in registered_shifts().items() if not s.needs_reward}
CELLS = [(name, side) for name, s in FREE.items() for side in s.sides]


def shifted(name: str, side: str, severity: float | None, seed: int = 0, rows: list[Pair] = ROWS) -> list[Pair]:
    return FREE[name](rows, ShiftContext(side, severity, seed, WORDS))


def texts(pair: Pair, side: str) -> list[str]:
    prompt = [content_text(m).strip() for m in messages_of(pair.prompt)] if side != "response" else []
    return prompt + ([t.strip() for r in pair.responses for t in response_texts(r)] if side != "prompt" else [])


@pytest.mark.parametrize(("name", "side"), CELLS)
def test_a_shift_changes_its_side_and_no_other(name: str, side: str) -> None:
    severity = max(FREE[name].severities, default=None)
    new = shifted(name, side, severity)
    assert new == shifted(name, side, severity)
    changed = 0
    for old, row in zip(ROWS, new, strict=True):
        assert (row.id, row.cluster, row.subset) == (old.id, old.cluster, old.subset)
        if side == "prompt":
            assert row.responses == old.responses
        if side == "response":
            assert row.prompt == old.prompt
        if name != "mismatched":
            assert len(row.rejected) == len(old.rejected)
            assert [m["role"] for m in messages_of(row.prompt)] == [m["role"] for m in messages_of(old.prompt)]
            assert type(row.prompt) is type(old.prompt)
        changed += texts(row, side) != texts(old, side)
    assert changed > 0.9 * len(ROWS)


@pytest.mark.parametrize(("name", "side"), [(n, s) for n, s in CELLS if FREE[n].severities])
def test_severity_zero_is_no_change_and_severities_go_further(name: str, side: str) -> None:
    assert shifted(name, side, 0) == ROWS
    levels = [shifted(name, side, p) for p in FREE[name].severities]

    def likeness(new: list[Pair]) -> float:
        """Mean share of characters in common with the clean texts, in [0, 1]."""
        pairs = [
            p for old, row in zip(ROWS, new, strict=True) for p in zip(texts(old, side), texts(row, side), strict=True)
        ]
        return sum(SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in pairs) / len(pairs)

    falling = [likeness(new) for new in levels]
    assert falling[0] < 1
    assert all(b < a - 0.01 for a, b in pairwise(falling)), falling


@pytest.mark.parametrize("name", [n for n in FREE if "both" in FREE[n].sides])
def test_the_same_text_gets_the_same_change_wherever_it_stands(name: str) -> None:
    text = sentence(random.Random(5), 20, 20)
    turns = f"Human: {text}\n\nAssistant: {text}\n\nHuman: {text}"
    rows = [Pair("0", text, text, ("  " + text, "other words"), 1), Pair("1", turns, "x y", (text,), 2)]
    severity = max(FREE[name].severities, default=None)
    new = shifted(name, "both", severity, rows=rows)
    found = {
        *texts(new[0], "prompt"),
        new[0].chosen,
        str(new[0].rejected[0]).strip(),
        *texts(new[1], "prompt"),
        new[1].rejected[0],
    }
    assert len(found) == 1
    assert found != {text}


@pytest.mark.parametrize(
    "name", ["word noise", "word noise (paper)", "character noise", "shuffled words", "mismatched"]
)
def test_seeds_give_changes_of_their_own(name: str) -> None:
    severity = max(FREE[name].severities, default=None)
    assert shifted(name, "prompt", severity, 0) != shifted(name, "prompt", severity, 1)


def test_a_text_of_which_the_papers_noise_leaves_nothing_stays() -> None:
    rows = [Pair(str(i), f"w{i}", "a b", ("c",), i) for i in range(60)]
    new = shifted("word noise (paper)", "prompt", 0.9, rows=rows)
    assert all(str(row.prompt) for row in new)


def test_a_mismatch_takes_whole_sides_of_other_prompts() -> None:
    rows = [Pair(str(i), f"p{i // 2}", f"a{i}", (f"b{i}",), i // 2) for i in range(20)]
    for seed in range(5):
        new = shifted("mismatched", "response", None, seed, rows)
        donors = [int(str(row.chosen)[1:]) for row in new]
        assert sorted(donors) == list(range(20))
        assert all(donor // 2 != i // 2 for i, donor in enumerate(donors))
        assert [row.rejected for row in new] == [(f"b{donor}",) for donor in donors]
    assert not FREE["mismatched"].paired
    lonely = [Pair(str(i), "p", f"a{i}", ("b",), min(i, 1)) for i in range(4)]
    with pytest.raises(InputError, match="3 of 4 rows share one prompt"):
        another_prompt([row.cluster for row in lonely], 0)
