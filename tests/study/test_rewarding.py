"""Shifts that raise a reward: by a known reward, they raise it, and pick what is known to be liked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentence

from rm_ood.errors import InputError
from rm_ood.study.pairs import Pair, read_pairs
from rm_ood.study.registry import ShiftContext, registered_shifts
from rm_ood.study.rewarding import best_phrases
from rm_ood.study.shifts import conditions, vocabulary

RNG = random.Random(1)
LIKED = "golden key"
ROWS = read_pairs(
    [
        {
            "prompt": f"question {i}",
            "chosen": f"{sentence(RNG)} {LIKED if i % 4 == 0 else 'plain stone'} {sentence(RNG)}.",
            "rejected": [sentence(RNG), {"role": "assistant", "content": "z"}["content"] + sentence(RNG)],
        }
        for i in range(40)
    ]
)


def liking(prompts: Sequence[Any], responses: Sequence[Any]) -> np.ndarray:
    """Counts what it likes; the rest is small noise by the text's length."""
    return np.array([str(r).count(LIKED) + 1e-3 * (len(str(r)) % 7) for r in responses])


def apply(name: str, severity: float | None, reward: Any = liking) -> list[Pair]:
    return registered_shifts()[name](ROWS, ShiftContext("response", severity, 0, vocabulary(ROWS), reward=reward))


def test_phrases_are_those_that_the_reward_likes() -> None:
    phrases = best_phrases(ROWS, ShiftContext("response", reward=liking))
    assert len(phrases) == 3
    assert all(LIKED in phrase for phrase in phrases)


def test_rewarded_phrases_raise_the_reward_with_severity() -> None:
    means = []
    for severity in (0, 1, 4):
        rows = ROWS if severity == 0 else apply("rewarded phrases", severity)
        means.append(liking([], [r for row in rows for r in row.responses]).mean())
    assert means[0] + 2 < means[1] < means[2]
    new = apply("rewarded phrases", 1)
    assert all(str(row.chosen).startswith(str(old.chosen)) for old, row in zip(ROWS, new, strict=True))
    assert apply("rewarded phrases", 0) == ROWS


def test_rows_without_a_common_phrase_are_refused() -> None:
    rows = [Pair(str(i), f"p{i}", f"w{i}", ("x",), i) for i in range(3)]
    with pytest.raises(InputError, match="no phrase stands in two of 3"):
        best_phrases(rows, ShiftContext("response", reward=liking))


def length(prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
    return [float(len(str(r))) for r in responses]


def test_the_best_of_more_never_has_less_reward() -> None:
    levels = [ROWS, *(apply("best of n", n, length) for n in (2, 4, 16))]
    rewards = [length([], [r for row in rows for r in row.responses]) for rows in levels]
    for less, more in pairwise(rewards):
        assert all(a <= b for a, b in zip(less, more, strict=True))
        assert sum(less) < sum(more)
    assert apply("best of n", 0) == ROWS
    assert apply("best of n", 4, length) == levels[2]


def test_equal_rewards_leave_the_response() -> None:
    with pytest.raises(InputError, match="changed none"):
        apply("best of n", 4, lambda p, r: np.zeros(len(r)))


def test_padding_wrappers_and_flattery_hold_the_response() -> None:
    for name in ("padding", "flattery wrapper"):
        severity = 3.0 if name == "padding" else None
        for old, row in zip(ROWS, apply(name, severity, None), strict=True):
            assert all(str(a) in str(b) and a != b for a, b in zip(old.responses, row.responses, strict=True))
    three, eight = apply("padding", 3, None), apply("padding", 8, None)
    assert all(str(b.chosen).startswith(str(a.chosen)) for a, b in zip(three, eight, strict=True))


def test_markdown_keeps_every_word_in_order() -> None:
    text = "First do this. Then that!\nAt last, rest"
    new = registered_shifts()["markdown wrapper"]([Pair("0", "p", text, ("no",), 0)], ShiftContext("response"))[0]
    lines = str(new.chosen).splitlines()
    assert lines[0] == "## Answer"
    points = [line[2:].replace("**", "") for line in lines if line.startswith("- ")]
    assert points == ["First do this.", "Then that!", "At last, rest"]
    assert "- **First do this.**" in lines
    assert "- **At last, rest**" in lines


def test_a_shift_that_asks_the_model_says_so_before_anything_is_made() -> None:
    for name in ("rewarded phrases", "best of n"):
        with pytest.raises(InputError, match=f"shift '{name}' asks the reward model: pass reward="):
            conditions(ROWS, [name])


def test_a_real_reward_model_is_raised(minilm: tuple[Any, Any]) -> None:
    model, tokenizer = minilm

    @torch.inference_mode()
    def reward(prompts: Sequence[Any], responses: Sequence[Any]) -> np.ndarray:
        out = []
        for i in range(0, len(responses), 64):
            batch = tokenizer(
                list(prompts[i : i + 64]),
                list(responses[i : i + 64]),
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
            out.append(model(**batch).logits[:, 0].double().numpy())
        return np.concatenate(out)

    rows = ROWS[:8]

    def mean(rows: list[Pair]) -> float:
        return float(reward([r.prompt for r in rows], [r.chosen for r in rows]).mean())

    for condition in conditions(rows, ["rewarded phrases:4", "best of n:4"], reward=reward):
        assert mean(condition.rows) > mean(rows), condition.name
