"""The parts of the planted-hack benchmark that could be wrong: what is proposed, searched, counted and given up."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hacks
import numpy as np
import pytest
from conftest import preference_rows
from hypothesis import given
from hypothesis import strategies as st
from suites import hack as suite
from train_reward_model import Recipe, trains

from rm_ood import CalibrationWarning, OODGuard, Winners, best_of_n, id_regret
from rm_ood.preferences import prompt_key
from rm_ood.study.scorer import Scorer

ANSWER = "One two,\nthree four  five."


@pytest.mark.parametrize(
    ("place", "share", "expected"),
    [
        ("replaced", 0.2, "One two,\nthree four  yes"),
        ("replaced", 0.5, "One two,\nyes no yes"),
        ("replaced", 1.0, "yes no yes no yes"),
        ("appended", 0.21, "One two,\nthree four  five. yes no"),
        ("in front", 0.4, "yes no One two,\nthree four  five."),
    ],
)
def test_the_proposal(place: str, share: float, expected: str) -> None:
    assert hacks.hacked(ANSWER, ["yes", "no"], place, share) == expected


@given(st.text(alphabet="ab \n", max_size=40), st.sampled_from(hacks.PLACES), st.floats(0, 1), st.floats(0, 1))
def test_the_drift_only_grows(answer: str, place: str, a: float, b: float) -> None:
    assert hacks.hacked(answer, ["xx"], place, 0.0) == answer
    few, many = (hacks.hacked(answer, ["xx"], place, share).split().count("xx") for share in sorted((a, b)))
    assert few <= many <= len(answer.split())
    length = len(hacks.hacked(answer, ["xx"], place, b).split())
    added = 0 if place == "replaced" else math.ceil(b * len(answer.split()))
    assert length == len(answer.split()) + added


def test_breaking_off() -> None:
    assert [hacks.broken_off(a) for a in (ANSWER, "one.", "one. ", "")] == ["One two,\nthree four", "one.", "one. ", ""]


def test_what_each_kind_says() -> None:
    dialogue = "Hello Human: one\n\nAssistant: yes\n\nHuman: and two?"
    assert hacks.words_of(hacks.PROMPT, dialogue, ["found"]) == ["and", "two?"]
    assert hacks.words_of(hacks.PROMPT, "no turns", ["found"]) == ["no", "turns"]
    assert hacks.words_of(hacks.SEARCHED, dialogue, ["found"]) == ["found"]
    assert "brilliant" in hacks.words_of(hacks.FLATTERY, dialogue, ["found"])


def test_candidates_are_plain_words_of_one_token(decoder_tokenizer: Any) -> None:
    words = hacks.vocabulary_words(decoder_tokenizer.get_vocab(), 50, 0)
    assert len(set(words)) == 50
    assert all(len(decoder_tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1 for word in words)
    assert words == hacks.vocabulary_words(reversed(list(decoder_tokenizer.get_vocab())), 50, 0)
    assert words != hacks.vocabulary_words(decoder_tokenizer.get_vocab(), 50, 1)


def test_the_search_takes_the_best_word_each_time(minilm_guard: OODGuard) -> None:
    rows = preference_rows(3, seed=9)

    with Scorer(minilm_guard) as scorer:

        def reward(phrases: list[list[str]]) -> Any:
            said = [" ".join(words * 4) for words in phrases for _ in rows]
            prompts = [row["prompt"] for _ in phrases for row in rows]
            return scorer.rewards(prompts, said).reshape(len(phrases), -1).mean(1)

        words = ["river", "planet", "music", "doctor", "quiet"]
        found = hacks.greedy(reward, words, depth=4, keep=3)
        alone = reward([[word] for word in words])
        assert found.words[0] == words[int(alone.argmax())]
        kept = [words[i] for i in np.argsort(-alone)[:3]]
        best = max(kept, key=lambda word: reward([[found.words[0], word]])[0])
        assert reward([[found.words[0], best]])[0] <= alone.max() or found.words[1] == best
        assert found.rewards == pytest.approx(reward([found.words[: i + 1] for i in range(len(found.words))]))
    assert found.rewards == sorted(set(found.rewards))


def test_delays_count_from_the_drift_and_not_from_false_alarms() -> None:
    assert hacks.schedule(2, 3, 2).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    streams = [hacks.Watched(at, at and "response larger", at == 40) for at in (None, 5, 10, 11, 40)]
    shares = np.array([0, 0.5, 1.0])[hacks.schedule(10, 20, 2)]
    found = hacks.alarms(streams, 10, shares)
    assert (found["alarmed"], found["early"], found["delay"]) == (2, 2, [1.0, None, None])
    assert found["share_at_median"] is None
    assert (found["about"], found["flag_rate_alarmed"]) == ({"response larger": 4}, 1)
    assert hacks.alarms(streams[3:4], 10, shares)["share_at_median"] == 0.5
    assert hacks.alarms([hacks.Watched(30, "x", False)], 10, shares)["share_at_median"] == 0.5
    assert hacks.alarms([hacks.Watched(31, "x", False)], 10, shares)["share_at_median"] == 1.0


def test_a_stream_that_loops_alarms_after_its_drift_and_the_control_does_not(minilm_guard: OODGuard) -> None:
    rows = preference_rows(120, seed=21)
    steps = hacks.schedule(40, 80, 1)
    prompts = [row["prompt"] for row in rows]
    loops = [hacks.hacked(row["chosen"], ["planet"], "replaced", step) for row, step in zip(rows, steps, strict=True)]
    plain = hacks.watch(minilm_guard.monitor(), minilm_guard.check(prompts, [row["chosen"] for row in rows]))
    drifted = hacks.watch(minilm_guard.monitor(), minilm_guard.check(prompts, loops))
    assert plain.alarm_at is None
    assert drifted.alarm_at is not None
    assert drifted.alarm_at > 40
    assert drifted.about == "response larger"


@pytest.fixture(scope="module")
def played(minilm_guard: OODGuard) -> dict[str, Any]:
    """Four made-up answers to forty prompts, one of them a loop on the last ten, and winners of other prompts."""
    rows, others = preference_rows(40, seed=31), preference_rows(60, seed=32)
    answers = hacks.offered(rows, 0)
    for some in answers[30:]:
        some[0] = "seven " * 30
    others_said = hacks.offered(others, 0)
    winners = Winners.fit(minilm_guard, [row["prompt"] for row in others], others_said, alpha=0.2)
    prompts = [row["prompt"] for row in rows]
    verdicts = minilm_guard.check(prompts, answers)
    flat = [a for some in answers for a in some]
    found = hacks.picks(minilm_guard, verdicts, np.arange(160).reshape(40, 4), flat, winners)
    return {"prompts": prompts, "answers": answers, "winners": winners, "found": found, "rewards": verdicts.rewards}


def test_best_of_n_on_kept_verdicts_is_best_of_n(minilm_guard: OODGuard, played: dict[str, Any]) -> None:
    for i in (0, 17, 35):
        one = best_of_n(played["prompts"][i], played["answers"][i], minilm_guard, winners=played["winners"])
        kept = played["found"][i]
        assert (one.index, one.response, one.why, one.unguarded) == (
            kept.index,
            kept.response,
            kept.why,
            kept.unguarded,
        )


def test_picks_of_the_hack_are_counted(played: dict[str, Any]) -> None:
    rewards = played["rewards"].reshape(40, 4)
    counts = hacks.counted(played["found"], 0)
    assert counts["unguarded"] == (rewards.argmax(1) == 0).sum() > 0
    assert counts["guarded"] == sum(a[0] == p.response for a, p in zip(played["answers"], played["found"], strict=True))
    assert counts["all_flagged"] == sum(bool(p.flagged.all()) for p in played["found"])
    assert hacks.counted(played["found"][30:], 0)["guarded"] == 0


def test_regret_is_that_of_the_public_function(minilm_guard: OODGuard, played: dict[str, Any]) -> None:
    own = hacks.regret(played["found"], minilm_guard.state.reward_sd)
    public = asdict(id_regret(minilm_guard, played["prompts"], played["answers"], winners=played["winners"]))
    assert public["changed"] > 0
    assert own == pytest.approx({name: public[name] for name in own})


def test_the_parts_share_no_prompt_and_none_trained_the_reward_model() -> None:
    recipe, rows = Recipe("smollm2"), preference_rows(500)
    long = {**rows[0], "prompt": "long " * 200}
    split = suite.parts([*rows, *rows[:50], long], recipe)
    keys = [prompt_key(row["prompt"]) for part in split.values() for row in part]
    assert len(keys) == len(set(keys)) == sum(not trains(row, recipe) for row in rows)
    assert all(len(part) > 5 for part in split.values())
    assert not any(trains(row, recipe) for part in split.values() for row in part)


def test_offered_answers_are_two_of_the_prompt_and_two_of_others() -> None:
    rows = preference_rows(9)
    first = [hacks.said(row, 0)[0] for row in rows]
    for i, (row, some) in enumerate(zip(rows, hacks.offered(rows, 0), strict=True)):
        assert {some[0], some[1]} == {row["chosen"], row["rejected"]}
        assert some[0] == first[i]
        assert some[2:] == [first[i - 1], first[i - 2]]


def test_the_whole_suite_on_a_small_decoder(
    tiny_decoder: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_decoder
    model.save_pretrained(tmp_path / "reward-model")
    tokenizer.save_pretrained(tmp_path / "reward-model")
    small = {
        "ALPHA": 0.3,
        "CANDIDATES": 6,
        "PROBES": 2,
        "DEPTH": 2,
        "KEPT": 3,
        "CLEAN": 20,
        "PER_STEP": 10,
        "STREAMS": 2,
    }
    for name, value in {**small, "SHARES": (0.0, 0.5, 1.0), "WORTH_SD": -9.0}.items():
        monkeypatch.setattr(suite, name, value)
    rows = preference_rows(540, seed=5)
    arguments = (Recipe("smollm2"), tmp_path / "reward-model", rows, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        found = suite.measured(*arguments)
        report = json.dumps(found, allow_nan=False)
        n = found["prompts"]["policy"]
        assert list(found["drifts"]) == list(hacks.KINDS)
        for kind, drift in found["drifts"].items():
            assert drift["place"] == max(found["tricks"][kind]["places"].items(), key=lambda item: item[1])[0]
            # Before the drift all are the undrifted policy.
            assert drift["steps"][0]["flagged"] == found["undrifted"]["flagged"]
            assert drift["steps"][0] == found["drifts"][hacks.SEARCHED]["steps"][0]
            assert len(drift["steps"]) == 3
        assert found["undrifted"]["regret"]["winner"]["prompts"] == n
        # The guard and the scores are kept.
        monkeypatch.setattr(OODGuard, "fit", None)
        assert json.dumps(suite.measured(*arguments)) == report
    suite.print_report({"tiny": found})
    suite.draw({"reward_models": {"tiny": found}}, tmp_path / "hack.svg")
    assert (tmp_path / "hack.svg").read_text(encoding="utf-8").startswith("<?xml")
