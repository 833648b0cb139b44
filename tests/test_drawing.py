"""Draws of prompts: which, and how they lie in memory."""

from __future__ import annotations

import functools
import gc
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import sentence
from hypothesis import given
from hypothesis import strategies as st

from rm_ood import OODGuard, collected, fit, fitting, moments
from rm_ood.copies import Copied, CopiedPrompts
from rm_ood.dialogue import Dialogue
from rm_ood.drawing import UNKNOWN, Kept, KeptPrompts
from rm_ood.errors import MismatchError
from rm_ood.preferences import Item
from rm_ood.state import FittedState

WIDTHS = {"final": 64, "prompt/mean@0.67": 64, "response/mean@0.67": 64}


def kept(key: int, response_hash: int = 0) -> Kept:
    return Kept(key, response_hash, None, None, {}, 0.0, (1, 1))


def full(key: int, *, group: str | None = "a") -> Kept:
    """A prompt with vectors that are its own."""
    rng = np.random.default_rng(key)
    vectors = {name: rng.normal(size=width).astype(np.float32) for name, width in WIDTHS.items()}
    return Kept(
        key, key // 2, group, key % 3 - 1 if key % 3 else None, vectors, float(rng.normal()), (key % 7, key % 5)
    )


# -- which


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=1), st.randoms(use_true_random=False))
def test_the_draw_depends_on_the_data_and_never_on_their_order(
    offers: list[tuple[int, int]], rng: random.Random
) -> None:
    def draw(order: list[tuple[int, int]]) -> list[tuple[int, int]]:
        reservoir = KeptPrompts(4, seed=3)
        for key, response_hash in order:
            reservoir.offer(kept(key, response_hash))
        return [(k.key, k.response_hash) for k in reservoir.items()]

    shuffled = list(offers)
    rng.shuffle(shuffled)
    found = draw(offers)
    assert found == draw(shuffled)
    assert len(found) == min(4, len({key for key, _ in offers}))
    # One response a prompt: the one with the smallest hash.
    assert all(h == min(r for k, r in offers if k == key) for key, h in found)


def test_what_is_not_wanted_would_not_be_kept() -> None:
    reservoir = KeptPrompts(3, seed=0)
    rng = random.Random(0)
    for _ in range(300):
        item = kept(rng.randrange(40), rng.randrange(20))
        before = [(k.key, k.response_hash) for k in reservoir.items()]
        wanted = reservoir.wants(item.key, item.response_hash)
        reservoir.offer(item)
        assert ([(k.key, k.response_hash) for k in reservoir.items()] != before) == wanted
        assert len(reservoir) <= 3


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_64_bit_seed_draws(seed: int) -> None:
    reservoir = KeptPrompts(2, seed)
    for key in range(5):
        reservoir.offer(kept(key, reservoir.response_hash(key, str(key))))
    assert len(reservoir) == 2


def test_the_draw_is_uniform_over_prompts_and_moves_with_the_seed() -> None:
    drawn = []
    for seed in range(40):
        reservoir = KeptPrompts(50, seed)
        for key in range(200):
            reservoir.offer(kept(key))
        drawn.append({k.key for k in reservoir.items()})
    counts = np.array([sum(key in d for d in drawn) for key in range(200)])
    # Binomial(40, 1/4): mean 10, five standard deviations.
    assert counts.mean() == 10
    assert counts.max() < 10 + 5 * 2.74
    assert len({frozenset(d) for d in drawn}) == 40


def test_one_canned_answer_is_drawn_anew_for_every_prompt() -> None:
    reservoir = KeptPrompts(size=10, seed=0)
    first = [reservoir.response_hash(key, "canned") < reservoir.response_hash(key, "other") for key in range(400)]
    assert 150 < sum(first) < 250


def test_prompts_of_one_rank_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeptPrompts, "_rank", lambda self, key: key % 2)
    found = []
    for order in (range(8), reversed(range(8))):
        reservoir = KeptPrompts(3, seed=0)
        for key in order:
            reservoir.offer(kept(key, 5))
        assert [reservoir.wants(key, 4) for key in (0, 2, 4, 6, 1)] == [True, True, True, False, False]
        assert not reservoir.wants(4, 5)
        found.append(reservoir.keys())
    assert found == [[0, 2, 4]] * 2


@given(st.sets(st.integers(0, 60), min_size=1), st.sets(st.integers(0, 60)), st.integers(1, 12))
def test_what_does_not_outlive_the_others_would_go_in_the_merge(mine: set[int], others: set[int], size: int) -> None:
    one, whole = KeptPrompts(size, 0), KeptPrompts(size, 0)
    for key in mine:
        one.offer(full(key))
    for key in mine | others:
        whole.offer(full(key))
    one.outlive(others)
    assert one.keys() == sorted(mine & set(whole.keys()))
    # Places that were given up are taken again.
    for key in range(100, 130):
        one.offer(full(key))
    for item in one.items():
        np.testing.assert_equal(vars(item), vars(full(item.key)))


# -- how


def test_what_was_kept_comes_back_in_the_order_of_the_keys() -> None:
    reservoir = KeptPrompts(150, seed=1)
    for key in random.Random(0).sample(range(1000), 500):
        reservoir.offer(full(key, group=None if key % 2 else f"group {key}"))
    facts, vectors = reservoir.facts(), reservoir.vectors()
    assert facts.keys.tolist() == reservoir.keys()
    assert len(reservoir) == len(facts.groups) == 150
    windows = [reservoir.vectors(start, start + 64) for start in range(0, 150, 64)]
    for i, item in enumerate(reservoir.items()):
        expected = full(item.key, group=None if item.key % 2 else f"group {item.key}")
        np.testing.assert_equal(vars(item), vars(expected))
        assert (facts.response_hashes[i], facts.rewards[i], facts.groups[i]) == (
            expected.response_hash,
            expected.reward,
            expected.group,
        )
        assert facts.labels[i] == (UNKNOWN if expected.label is None else expected.label)
        assert tuple(facts.lengths[i]) == expected.lengths
        for name, vector in expected.vectors.items():
            np.testing.assert_array_equal(vectors[name][i], vector)
            np.testing.assert_array_equal(windows[i // 64][name][i % 64], vector)


def test_another_response_takes_the_place_of_the_first() -> None:
    reservoir = KeptPrompts(3, seed=0)
    for key, response_hash in ((1, 9), (2, 9), (1, 4), (1, 7)):
        vectors = {"final": np.full(2, response_hash, dtype=np.float32)}
        reservoir.offer(Kept(key, response_hash, None, None, vectors, float(response_hash), (1, 1)))
    facts = reservoir.facts()
    assert (facts.response_hashes.tolist(), facts.rewards.tolist()) == ([4, 9], [4.0, 9.0])
    assert reservoir.vectors()["final"].tolist() == [[4, 4], [9, 9]]


def test_vectors_of_other_channels_or_widths_are_refused() -> None:
    reservoir = KeptPrompts(3, seed=0)
    reservoir.offer(full(1))
    for vectors in ({"final": np.zeros(64, dtype=np.float32)}, {n: np.zeros(1, dtype=np.float32) for n in WIDTHS}):
        with pytest.raises(MismatchError, match="other channels or widths"):
            reservoir.offer(Kept(2, 0, None, None, vectors, 0.0, (1, 1)))


def test_copied_items_come_back_as_they_were() -> None:
    dialogue = Dialogue(
        [{"role": "user", "content": "gr\u00fc\u00df dich \u4f60\u597d"}], [{"name": "f"}], {"mode": "short"}
    )
    items = [
        Item("plain", "answer", 1, "id \ud800", "g", "rows[0].rejected"),
        Item(dialogue, {"role": "assistant", "content": "", "tool_calls": []}, 0, "7", None, "rows[7].chosen"),
        Item([{"role": "user", "content": "hi"}], "there", None, "8", None, "rows[8].response"),
    ]
    drawn = CopiedPrompts(3, seed=0)
    for key, item in enumerate(items):
        drawn.offer(Copied(key, 2**64 - 1, item))
    assert list(drawn.items()) == [Copied(key, 2**64 - 1, item) for key, item in enumerate(items)]


def traced(call: Any) -> tuple[int, int]:
    """Bytes of Python and NumPy that a call leaves and takes at its highest."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


def test_a_kept_prompt_takes_little_more_than_its_vectors() -> None:
    size, offered = 1000, [full(key) for key in range(3000)]
    reservoir = KeptPrompts(size, seed=0)

    def fill() -> None:
        for item in offered:
            reservoir.offer(item)

    left, peak = traced(fill)
    # Vectors, 40 bytes of facts, four 64-bit numbers and one of a list; as objects of their own it was twice that.
    assert left < 1.15 * size * (4 * sum(WIDTHS.values()) + 40 + 32 + 8)
    assert peak < 1.05 * left + 16_384


# -- in a fit


def rows(n: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for i in range(n):
        yield {"prompt": f"question {i} {sentence(rng)}", "chosen": sentence(rng), "rejected": sentence(rng) + " no"}


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_the_memory_of_a_fit_does_not_grow_with_the_pairs(tiny_decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every store with a bound is full after the fewer pairs.
    monkeypatch.setattr(collected, "NOISY_PROMPTS", 60)
    monkeypatch.setattr(collected, "DuplicateSketch", functools.partial(fitting.DuplicateSketch, 128))
    monkeypatch.setattr(fitting, "_RECENT", 64)
    monkeypatch.setattr(moments, "_FLUSH_ROWS", 64)
    model, tokenizer = tiny_decoder

    def fitted(n: int) -> None:
        gc.collect()
        guard = OODGuard(model, tokenizer, alpha=0.2, max_length=64, max_calibration=100)
        guard.fit(rows(n), calibration=0.4, progress=False)

    fitted(300)
    few, many = (traced(functools.partial(fitted, n))[1] for n in (300, 900))
    # Eight bytes for each fit prompt, and what waits to be collected. Vectors and texts of a pair are more than 1,000.
    assert many - few < 600 * 200


@pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning")
def test_calibration_prompts_are_scored_a_few_at_a_time(tiny_decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def table() -> Any:
        guard = OODGuard(*tiny_decoder, alpha=0.05, max_length=64)
        return guard.fit(rows(200), calibration=0.75, progress=False).state.table

    seen: list[int] = []
    score = FittedState.score

    def counted(self: FittedState, vectors: Any, rewards: Any) -> Any:
        seen.append(len(rewards))
        return score(self, vectors, rewards)

    whole = table()
    monkeypatch.setattr(fit, "_SCORED_ROWS", 32)
    monkeypatch.setattr(FittedState, "score", counted)
    parts = table()
    assert sum(seen) == whole.n > 100
    assert max(seen) == 32
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-5)
    np.testing.assert_array_equal(parts.lengths, whole.lengths)
    np.testing.assert_array_equal(parts.part_a, whole.part_a)
