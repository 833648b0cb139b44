"""The doctor: what it plants comes out in the table, and what it cannot know it says."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
from conftest import preference_rows
from scipy import stats

from rm_ood import InputError, MismatchError, NotFittedError, OODGuard
from rm_ood.canaries import EVERYDAY, SCRIPTS
from rm_ood.doctor import Findings, Planted, Share, plant
from rm_ood.study.planted import mismatched

pytestmark = pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
SHIFTS = ("other script", "shuffled words", "code", "one word repeated", "random characters")


def own(n: int) -> list[tuple[Any, str]]:
    """Clean items of the kind that the guards here are fitted on: of the same seed, which their prompts name."""
    return [(r["prompt"], r["chosen"]) for r in preference_rows(700 + n)[700:]]


def made(model_and_tokenizer: Any, rows: Any = None, **options: Any) -> OODGuard:
    guard = OODGuard(*model_and_tokenizer, **{"alpha": 0.05, "max_length": 128, **options})
    return guard.fit(rows or preference_rows(300), calibration=0.5, progress=False)


@pytest.fixture(scope="module")
def guard(shared_decoder: Any, decoder_tokenizer: Any) -> OODGuard:
    return made((copy.deepcopy(shared_decoder), decoder_tokenizer))


@pytest.fixture(scope="module")
def findings(guard: OODGuard) -> Findings:
    return plant(guard, own(24))


def test_every_shift_is_planted_on_every_side(findings: Findings) -> None:
    sides = [(row.name, row.side) for row in findings.planted]
    last = [("empty response", "response"), ("answer to another prompt", "response")]
    assert sides == [*((n, s) for n in SHIFTS for s in ("prompt", "response", "both")), *last]
    clean = findings.clean["combined"]
    assert clean.n == 24
    assert all(0 < row.n <= 24 - clean.count for row in findings.planted)


def test_the_numbers_are_those_of_check(guard: OODGuard, findings: Findings) -> None:
    items = own(24)
    clean = guard.check([p for p, _ in items], [r for _, r in items])
    passed = [item for item, bad in zip(items, clean.is_ood, strict=True) if not bad]
    empty = guard.check([p for p, _ in passed], [""] * len(passed))
    row = findings.planted[-2]
    assert row.n == len(passed)
    assert row.flagged["combined"] == Share(int(empty.is_ood.sum()), len(passed))
    for axis in ("prompt", "response"):
        assert row.flagged[axis] == Share(int(empty.axis(axis).is_ood.sum()), len(passed))
    score = [max(a.ood_scores[i] for a in empty.axes.values()) for i in range(len(passed))]
    before = [max(a.ood_scores[i] for a in clean.axes.values()) for i in range(24) if not clean.is_ood[i]]
    wins = stats.mannwhitneyu(score, before).statistic / len(passed) ** 2
    assert row.auroc == pytest.approx(wins, abs=1e-12)
    flags = findings.clean["combined"].count
    assert findings.clean_p == pytest.approx(stats.binomtest(flags, 24, 0.05, alternative="greater").pvalue)


def test_an_answer_to_another_prompt_is_one_of_the_clean_answers(guard: OODGuard, findings: Findings) -> None:
    items = own(24)
    clean = guard.check([p for p, _ in items], [r for _, r in items])
    passed = [item for item, bad in zip(items, clean.is_ood, strict=True) if not bad]
    swapped = mismatched(passed, 0)
    assert [p for p, _ in swapped] == [p for p, _ in passed]
    assert sorted(r for _, r in swapped) == sorted(r for _, r in passed)
    assert all(one[1] != other[1] for one, other in zip(passed, swapped, strict=True))
    row = findings.planted[-1]
    flags = guard.check([p for p, _ in swapped], [r for _, r in swapped]).is_ood
    assert row.flagged["combined"] == Share(int(flags.sum()), len(passed))
    # Hard to see: it is told like the others, and fails nothing.
    assert any(name.startswith("answer to another prompt (response") for name in (*findings.caught, *findings.blind))


def test_items_of_one_prompt_have_no_answer_to_another(guard: OODGuard) -> None:
    (prompt, _), *_ = items = own(24)
    findings = plant(guard, [(prompt, response) for _, response in items])
    assert "answer to another prompt" not in {row.name for row in findings.planted}
    assert any(note.startswith("answer to another prompt: more than half") for note in findings.notes)


def test_findings_are_json_and_repeatable(guard: OODGuard, findings: Findings) -> None:
    values = findings.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert plant(guard, own(24)).to_dict() == values
    assert set(values) == {"items", "seed", "alpha", "rule", "clean", "shifts", "caught", "blind", "notes"}
    assert values["items"] == "given"
    assert set(values["shifts"][0]) == {"name", "side", "n", "flagged", "auroc", "caught"}
    assert set(values["shifts"][0]["flagged"]["combined"]) == {"count", "share", "low", "high"}
    other = plant(guard, own(24), seed=1)
    assert other.to_dict() != values


def test_more_than_60_items_are_drawn_from_and_nothing_warns(guard: OODGuard) -> None:
    with warnings.catch_warnings():
        # Over a thousand planted items are not the traffic that the guard knows.
        warnings.simplefilter("error")
        assert plant(guard, own(70)).clean["combined"].n == 60


def test_items_the_guard_was_not_calibrated_on_are_called_so(guard: OODGuard) -> None:
    foreign = [(p * 4, r * 4) for p, r in SCRIPTS["CJK"] * 6]
    findings = plant(guard, foreign)
    assert findings.clean["combined"].count == 12
    assert not findings.as_calibrated
    assert findings.planted == ()
    text = str(findings)
    assert "not what this guard was calibrated on" in text
    assert text.endswith("caught: unknown\nblind to: unknown")
    assert json.dumps(findings.to_dict())


def test_few_items_are_said_to_be_few(guard: OODGuard) -> None:
    assert any("only" in note for note in plant(guard, own(7)).notes)
    assert not plant(guard, own(24)).notes


def test_built_in_items_by_default(guard: OODGuard) -> None:
    findings = plant(guard)
    assert findings.items == "built-in"
    assert findings.clean["combined"].n == len(EVERYDAY)


def test_items_of_every_script_leave_that_shift_out(guard: OODGuard) -> None:
    mixed = own(24) + [(p * 2, r) for talk in SCRIPTS.values() for p, r in talk[:2]]
    findings = plant(guard, mixed)
    assert {row.name for row in findings.planted} == {*SHIFTS[1:], "empty response", "answer to another prompt"}
    assert any(note.startswith("other script") for note in findings.notes)


@pytest.mark.parametrize("axis", ["prompt", "response"])
def test_a_guard_of_one_axis(tiny_decoder: Any, axis: str) -> None:
    other = "response" if axis == "prompt" else "prompt"
    findings = plant(made(tiny_decoder, axes=(axis,)), own(24))
    assert findings.to_dict()["shifts"][0]["flagged"][other] is None
    assert f"the guard does not judge the {other} by itself" in findings.notes
    if axis == "prompt":
        # The prompt's tokens come first: nothing in the response can reach a decoder's prompt vectors.
        response_only = [row for row in findings.planted if row.side == "response"]
        assert all(row.flagged["combined"].count == 0 and abs(row.auroc - 0.5) < 0.05 for row in response_only)


def test_a_chat_guard_and_message_lists(tiny_decoder: Any) -> None:
    chat = [{**r, "prompt": [{"role": "user", "content": r["prompt"]}]} for r in preference_rows(300)]
    guard = made(tiny_decoder, chat)
    messages = [([{"role": "user", "content": p}], r) for p, r in own(24)]
    assert plant(guard, messages).to_dict() == plant(guard, own(24)).to_dict()


def test_a_guard_with_a_grouping_column(tiny_decoder: Any) -> None:
    rows = [{**r, "team": "ab"[i % 2]} for i, r in enumerate(preference_rows(600))]
    guard = made(tiny_decoder, rows, groups="team", channels="final")
    items = own(70)
    assert plant(guard, items, groups=["a", "b"] * 35).clean["combined"].n == 60
    with pytest.raises(InputError, match="70 labels needed, one per item, got 2"):
        plant(guard, items, groups=["a", "b"])
    with pytest.raises(InputError, match="groups"):
        plant(guard, items)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "got none"),
        (["a secret text"], r"items\[0\]: expected a \(prompt, response\) pair, got str"),
        ([("a", "b"), ("a", "b", "c")], r"items\[1\]: expected a \(prompt, response\) pair, got tuple"),
        ([("a", 3)], r"items\[0\]\.response: expected str, got"),
        ([("", "b")], r"items\[0\]\.prompt: empty"),
    ],
)
def test_items_that_are_no_pairs(guard: OODGuard, items: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        plant(guard, items)
    assert "secret" not in str(caught.value)


def test_a_guard_that_cannot_check(tiny_decoder: Any, guard: OODGuard, tmp_path: Any) -> None:
    bare = OODGuard(*tiny_decoder, alpha=0.05).fit(preference_rows(40), calibration=0, progress=False)
    with pytest.raises(NotFittedError, match="not calibrated"):
        plant(bare, own(4))
    guard.save_pretrained(tmp_path / "guard")
    with pytest.raises(MismatchError, match="no reward model"):
        plant(OODGuard.from_pretrained(tmp_path / "guard"), own(4))


def test_half_of_the_items_is_caught() -> None:
    def row(count: int, side: str) -> Planted:
        return Planted("code", side, 20, {"combined": Share(count, 20), "prompt": Share(3, 20)}, 0.75)

    findings = Findings(
        "given", 0, 0.05, {"combined": Share(1, 21)}, 0.66, (row(10, "prompt"), row(9, "both")), ("few",)
    )
    assert findings.caught == ("code (prompt 50 %)",)
    assert findings.blind == ("code (both 45 %)",)
    text = str(findings).splitlines()
    assert text[-2:] == ["caught: code (prompt 50 %)", "blind to: code (both 45 %)"]
    assert "Note: few" in text
    assert text[3].split() == ["code,", "prompt", "20", "50", "%", "27", "to", "73", "%", "15", "%", "-", "0.75"]


def test_minilm_catches_another_script_on_either_side(minilm: Any) -> None:
    """A real encoder: what its detection benchmark says of languages holds for what the doctor plants."""
    guard = made(minilm, preference_rows(400))
    findings = plant(guard, own(20))
    scripts = [row for row in findings.planted if row.name == "other script"]
    assert [row.side for row in scripts] == ["prompt", "response", "both"]
    assert all(row.caught and row.auroc > 0.95 for row in scripts)
    assert findings.as_calibrated
    guard.detach()
