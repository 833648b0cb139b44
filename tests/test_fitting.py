from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm_ood import fitting
from rm_ood.fitting import DuplicateSketch, FitMoments, KeySet, in_other_half, windows
from rm_ood.preferences import hash_fraction, prompt_key, stable_hash

KEYS = st.integers(0, 2**64 - 1)


# -- keys


@given(st.lists(KEYS), st.lists(KEYS), st.integers(1, 5))
def test_a_key_set_is_a_set(first: list[int], second: list[int], chunk: int) -> None:
    keys = KeySet(np.array(first, dtype=np.uint64))
    expected = set(first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "_RECENT", chunk)
        for key in second:
            assert keys.add(key) == (key not in expected)
            expected.add(key)
            assert len(keys) == len(expected)
    assert keys.sorted().tolist() == sorted(expected)
    assert keys.sorted().dtype == np.uint64
    assert all(key in keys for key in expected)
    assert all((key in keys) == (key in expected) for key in (0, 1, 2**64 - 1))


def test_an_empty_key_set_holds_nothing() -> None:
    assert len(KeySet()) == 0
    assert 5 not in KeySet()
    assert KeySet().sorted().shape == (0,)


# -- duplicates


def test_row14_the_share_of_repeats_is_exact_while_it_fits() -> None:
    sketch = DuplicateSketch()
    assert sketch.share == 0
    for i in (1, 2, 3, 3, 3, 4, 4, 5):
        sketch.add(i)
    assert sketch.share == 3 / 8


def test_row14_the_share_of_repeats_is_estimated_in_bounded_memory() -> None:
    sketch = DuplicateSketch(size=500)
    for i in range(20_000):
        sketch.add(stable_hash(str(i if i % 2 else i % 4_000)))
    # 10,000 odd numbers, and 2,000 even ones five times each.
    assert len(sketch._counts) <= 500
    assert sketch.share == pytest.approx(0.4, abs=0.1)


# -- moments


def vectors(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {name: torch.randn(n, 3, generator=generator) for name in ("final", "prompt/mean@0.5")}


def test_responses_count_by_class_and_prompts_once() -> None:
    moments = FitMoments(2)
    labels, first = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([True, False, True, False, True])
    x = vectors(5)
    rewards = np.arange(5.0)
    moments.update(x, rewards, labels, first)
    moments.update(x, rewards + 1, labels, torch.zeros(5, dtype=torch.bool))
    final, prompt = moments.channels["final"], moments.channels["prompt/mean@0.5"]
    assert final.counts.tolist() == [4, 6]
    assert prompt.counts.tolist() == [3]
    torch.testing.assert_close(final.means[1], x["final"][labels == 1].double().mean(0))
    torch.testing.assert_close(prompt.means[0], x["prompt/mean@0.5"][first].double().mean(0))
    assert moments.reward.n_samples == 10
    assert float(moments.reward.means[0, 0]) == 2.5


def test_prompt_and_response_side_by_side_count_every_response_as_one_class() -> None:
    moments, x = FitMoments(2), {"final": torch.randn(3, 4), "response_given_prompt/mean@0.5": torch.randn(3, 8)}
    moments.update(x, np.ones(3), torch.tensor([0, 1, 1]), torch.tensor([True, False, False]))
    pair = moments.channels["response_given_prompt/mean@0.5"]
    assert (pair.n_features, pair.counts.tolist()) == (8, [3])
    assert moments.class_counts() == [1, 2]
    assert not moments.other_half


def test_halves_are_kept_apart_and_add_up_to_the_whole() -> None:
    halves, whole = FitMoments(2), FitMoments(2)
    for seed in range(3):
        x, labels = vectors(6 + seed), torch.arange(6 + seed) % 2
        first, other = torch.arange(6 + seed) % 3 == 0, torch.arange(6 + seed) % 4 == 0
        halves.update(x, np.arange(6.0 + seed), labels, first, other)
        whole.update(x, np.arange(6.0 + seed), labels, first)
    assert halves.other_half["final"].counts.tolist() == [6, 0]
    assert halves.other_half["prompt/mean@0.5"].counts.tolist() == [3]
    assert halves.class_counts() == whole.class_counts() == [11, 10]
    for name, moments in whole.channels.items():
        both = halves.channels[name].copy().merge(halves.other_half[name])
        assert both.counts.tolist() == moments.counts.tolist()
        torch.testing.assert_close(both.within_scatter(), moments.within_scatter())
    assert halves.reward.n_samples == whole.reward.n_samples


def test_the_halves_are_even_among_the_prompts_that_are_fitted() -> None:
    keys = [prompt_key(f"prompt {i}") for i in range(4000)]
    fitted = [key for key in keys if hash_fraction(key, 3) >= 0.3]
    assert sum(in_other_half(key, 3) for key in fitted) / len(fitted) == pytest.approx(0.5, abs=0.03)
    assert [in_other_half(key, 3) for key in keys] != [in_other_half(key, 4) for key in keys]


def test_one_class_takes_any_label() -> None:
    moments = FitMoments(1)
    moments.update(vectors(4), np.ones(4), torch.tensor([0, 1, 0, 1]), torch.ones(4, dtype=torch.bool))
    assert moments.channels["final"].counts.tolist() == [4]


@given(st.lists(st.integers()), st.integers(1, 7))
def test_windows_hold_all_items_in_order(items: list[int], size: int) -> None:
    parts = list(windows(iter(items), size))
    assert [x for part in parts for x in part] == items
    assert all(len(part) == size for part in parts[:-1])
    assert all(0 < len(part) <= size for part in parts)


def test_windows_are_lazy() -> None:
    def endless() -> Any:
        while True:
            yield 1

    assert next(windows(endless(), 3)) == [1, 1, 1]
