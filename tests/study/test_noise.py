"""Changes to one text, by their stated rates."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_ood.errors import InputError
from rm_ood.preferences import stable_hash
from rm_ood.rewriting import word_perturbation
from rm_ood.study.noise import (
    character_noise,
    inflated,
    paper_word_perturbation,
    repeated_word,
    shuffled,
    truncated,
)

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


def as_the_paper(text: str, p: float, words: list[str], key: int) -> str:
    """NOTES of the paper's loop, step by step: positions of the first text, acted on in the present one."""
    actions, choices = np.random.RandomState(key), random.Random(key)
    now = text
    for position in range(len(text.split())):
        if p > 0 and actions.rand() <= p:
            r = actions.rand()
            parts = now.split()
            past = position >= len(parts)
            if r <= 0.33:
                new = choices.choice(words)
                parts.append(new) if past else parts.insert(position, new)
            elif r <= 0.67:
                if not past:
                    del parts[position]
            else:
                new = choices.choice(words)
                if past:
                    parts.append(new)
                else:
                    parts[position] = new
            now = " ".join(parts)
    return now


@given(st.text(alphabet="ab \n", max_size=60), st.floats(0, 1), st.integers(-5, 5))
def test_the_papers_mode_has_the_papers_slips(text: str, p: float, seed: int) -> None:
    key = stable_hash(text, seed) % 2**32
    assert paper_word_perturbation(text, p, WORDS, seed) == as_the_paper(text, p, WORDS, key)


def test_the_papers_mode_shows_each_slip() -> None:
    runs = [paper_word_perturbation("a b\nc d", 1.0, WORDS, seed).split() for seed in range(300)]
    # Every position is hit, and yet original words are left: the one after a deletion is passed over.
    assert any("b" in run and "a" not in run for run in runs)
    # A word that got another before it is hit again, so no two words of two ever get one each; in clean mode they do.
    each = [
        [f("a b", 1.0, WORDS, seed).split() for seed in range(300)]
        for f in (paper_word_perturbation, word_perturbation)
    ]
    paper, clean = (any(len(run) == 4 and run[1] == "a" and run[3] == "b" for run in runs) for runs in each)
    assert (paper, clean) == (False, True)
    # What is deleted early leaves late positions past the end, where replacing appends.
    assert any(run[-1].startswith("x") and run[-2] == "d" for run in runs if len(run) > 1)
    assert paper_word_perturbation("a b\nc d", 0.0, WORDS) == "a b\nc d"
    assert all("\n" not in paper_word_perturbation("a b\nc d", 1.0, WORDS, seed) for seed in range(20))
    with pytest.raises(InputError, match="a fraction in"):
        paper_word_perturbation("a", 2, WORDS)
    with pytest.raises(InputError, match="no words"):
        paper_word_perturbation("a", 0.5, [])


@given(st.text(alphabet="abé漢 \n", max_size=40), st.floats(0, 1), st.integers(-5, 5))
def test_character_noise_keeps_white_space_and_never_empties(text: str, p: float, seed: int) -> None:
    noisy = character_noise(text, p, seed)
    assert noisy == character_noise(text, p, seed)
    assert set(noisy) <= set(text)
    assert bool(noisy.strip()) == bool(text.strip())
    if noisy.strip() and len(noisy) > 1:
        assert [c for c in noisy if c.isspace()] == [c for c in text if c.isspace()]
    assert character_noise(text, 0.0, seed) == text


def test_character_noise_acts_at_its_rates() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(20_000))
    noisy = character_noise(text, 0.2, seed=1)
    place = {c: i for i, c in enumerate(text)}
    # A drawn character is far from its neighbours, so what stands in order is original.
    kept = sum(abs(place[a] - place[b]) == 1 for a, b in pairwise(noisy))
    assert 0.5 * 20_000 < kept < 0.85 * 20_000
    # Insertions and deletions balance: five standard deviations.
    assert abs(len(noisy) - 20_000) < 5 * (20_000 * 0.1) ** 0.5
    swaps = sum(place[b] == place[a] - 1 for a, b in pairwise(noisy))
    assert abs(swaps - 20_000 * 0.05) < 5 * (20_000 * 0.05) ** 0.5 + 20_000 * 0.05 * 0.2


def test_truncation_cuts_the_end_at_a_word() -> None:
    text = "one two\n three four"
    assert [truncated(text, p) for p in (0, 0.25, 0.5, 0.75, 1)] == [text, "one two\n three", "one two", "one", "one"]
    assert truncated("one two three", 0.5) == "one two"
    assert truncated("今天天气很好", 0.5) == "今天天"
    assert truncated("  ", 0.5) == "  "


def test_a_repeated_word_takes_the_place_of_the_end() -> None:
    assert repeated_word("a bb cc longest", 0.5) == "a bb " + " ".join(["longest"] * 4)
    assert repeated_word("word", 1.0) == " ".join(["word"] * 8)
    assert repeated_word("一二三", 1.0) == "一" * 8
    assert repeated_word(" ".join("abcdefghijkl"), 1.0) == " ".join(["a"] * 12)


def test_inflation_says_the_text_again() -> None:
    assert inflated("a b", 0) == "a b"
    assert inflated("a b", 2) == "a b\na b\na b"
    assert inflated("a b c d", 1.5) == "a b c d\na b c d\na b"
    with pytest.raises(InputError, match="a number of copies"):
        inflated("a", -1)


@given(st.text(alphabet="abc \n", max_size=60), st.floats(0, 1), st.integers(-5, 5))
def test_shuffled_words_are_the_same_words(text: str, share: float, seed: int) -> None:
    assert Counter(words_of(shuffled(text, share, seed))) == Counter(words_of(text))
    assert shuffled(text, 0.0, seed) == text


def test_a_share_of_the_words_is_shuffled() -> None:
    text = " ".join(map(str, range(2000)))
    moved = [
        {i for i, word in enumerate(shuffled(text, p, seed=1).split()) if word != str(i)} for p in (0.25, 0.5, 1.0)
    ]
    assert 400 < len(moved[0]) < 600
    # A word may come to stand where it stood, so a few are missing in the larger set.
    assert len(moved[0] - moved[1]) < 5
    assert len(moved[2]) > 1990


def test_shares_are_checked() -> None:
    for change in (lambda: truncated("a", 2), lambda: repeated_word("a", -1), lambda: shuffled("a", float("nan")),
                   lambda: character_noise("a", 1.1)):  # fmt: skip
        with pytest.raises(InputError, match="a fraction in"):
            change()
