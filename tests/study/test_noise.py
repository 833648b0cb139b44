"""Changes to one text, by their stated rates."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_ood.errors import InputError
from rm_ood.study.noise import word_perturbation

WORDS = ["xa", "xb", "xc"]
texts = st.text(alphabet="ab \n", max_size=40)


def words_of(text):
    return text.split()


@given(texts, st.integers(-5, 5))
def test_no_noise_is_the_text_itself(text, seed):
    assert word_perturbation(text, 0.0, WORDS, seed) == text


@given(texts, st.floats(0, 1), st.integers(-5, 5))
def test_noise_is_the_same_for_one_seed_and_never_empties_a_text(text, p, seed):
    noisy = word_perturbation(text, p, WORDS, seed)
    assert noisy == word_perturbation(text, p, WORDS, seed)
    assert bool(words_of(noisy)) == bool(words_of(text))


def test_a_text_whose_every_word_was_deleted_keeps_one_random_word():
    noisy = {word_perturbation(" one ", 1.0, WORDS, seed) for seed in range(50)}
    assert noisy == {*WORDS, *(f"{word} one" for word in WORDS)}


@given(texts, st.floats(0, 1), st.integers(-5, 5))
def test_what_is_left_of_a_text_keeps_its_order(text, p, seed):
    left = [word for word in words_of(word_perturbation(text, p, WORDS, seed)) if not word.startswith("x")]
    original = iter(words_of(text))
    assert all(word in original for word in left)


def test_actions_come_at_their_rates():
    # Every word is hit: it is left behind a new word, gone, or another word in its place.
    text = " ".join(f"w{i}" for i in range(20_000))
    noisy = words_of(word_perturbation(text, 1.0, WORDS, seed=3))
    inserted = sum(word.startswith("w") for word in noisy)
    drawn = Counter(word for word in noisy if word.startswith("x"))
    replaced = sum(drawn.values()) - inserted
    deleted = 20_000 - inserted - replaced
    for count, rate in ((inserted, 0.33), (deleted, 0.34), (replaced, 0.33)):
        # five standard deviations of a binomial count
        assert abs(count - 20_000 * rate) < 5 * (20_000 * rate * (1 - rate)) ** 0.5
    assert set(drawn) == set(WORDS)
    assert min(drawn.values()) > 0.3 * sum(drawn.values())


def test_a_share_p_of_the_words_is_hit():
    text = " ".join(f"w{i}" for i in range(20_000))
    noisy = word_perturbation(text, 0.3, WORDS, seed=1)
    untouched = sum(
        a.startswith("w") and not b.startswith("x") for a, b in zip(words_of(noisy)[1:], words_of(noisy), strict=False)
    )
    assert untouched < 20_000 * 0.75
    kept = sum(word.startswith("w") for word in words_of(noisy))
    # deleted and replaced words are gone: .3 * .67 of all
    assert abs(kept - 20_000 * (1 - 0.3 * 0.67)) < 5 * (20_000 * 0.2 * 0.8) ** 0.5


def test_severities_are_nested():
    text = " ".join(f"w{i}" for i in range(300))
    kept = [set(words_of(word_perturbation(text, p, WORDS, seed=2))) - set(WORDS) for p in (0.1, 0.5, 0.9)]
    assert kept[0] > kept[1] > kept[2]


def test_texts_and_seeds_get_noise_of_their_own():
    text = " ".join(["same"] * 50)
    assert word_perturbation(text, 0.5, WORDS, 0) != word_perturbation(text, 0.5, WORDS, 1)
    # A common beginning does not get common noise.
    longer = word_perturbation(text + " end", 0.5, WORDS, 0)
    assert not longer.startswith(word_perturbation(text, 0.5, WORDS, 0)[:60])


def test_white_space_between_untouched_words_survives():
    text = "first line\n\nsecond   line\tend"
    noisy = next(
        n for n in (word_perturbation(text, 0.2, WORDS, seed) for seed in range(100)) if n != text and "\n\n" in n
    )
    assert words_of(noisy) != words_of(text)


def test_options_of_noise_are_checked():
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="a fraction in"):
            word_perturbation("a b", p, WORDS)
    with pytest.raises(InputError, match="vocabulary: got no words"):
        word_perturbation("a b", 0.5, [])
