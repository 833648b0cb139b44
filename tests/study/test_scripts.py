"""Words in another script, and what script a text is in."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rm_ood.errors import InputError
from rm_ood.rewriting import is_unspaced, letters
from rm_ood.study.scripts import SWAPS, swapped

LATIN = "Shine on, Charlie: the Yellow box jumps quickly over my lazy Zebra"


@pytest.mark.parametrize(
    ("to", "script"), [("look-alike", "CYRILLIC"), ("cyrillic", "CYRILLIC"), ("greek", "GREEK"), ("fullwidth", "FULLWIDTH")]
)  # fmt: skip
def test_a_swapped_text_is_in_the_other_script(to: str, script: str) -> None:
    new = swapped(LATIN, to, 1.0)
    found = letters(new)
    if to == "look-alike":
        # The rest has no look-alike.
        assert found[script] > 0.4 * found.total()
        assert len(new) == len(LATIN)
    else:
        assert set(found) == {script}
    assert len(new.split()) == len(LATIN.split())


def test_letters_of_several_characters_go_first() -> None:
    assert swapped("Shine church", "cyrillic", 1.0) == "Шине чурч"
    assert swapped("Theta psi", "greek", 1.0) == "Θετα ψι"


def test_accents_survive_and_other_scripts_stay() -> None:
    new = unicodedata.normalize("NFD", swapped("né", "cyrillic", 1.0))
    assert new == "не\u0301"
    for text in ("中文 текст", "한국어", "123 + 4"):
        assert swapped(text, "greek", 1.0) == text


@given(st.text(alphabet="abcé中 \n", max_size=40), st.sampled_from(sorted(SWAPS)), st.integers(-5, 5))
def test_swaps_are_seeded_nested_and_keep_white_space(text: str, to: str, seed: int) -> None:
    assert swapped(text, to, 0.0, seed) == text
    small, large = (swapped(text, to, share, seed) for share in (0.3, 0.8))
    assert small == swapped(text, to, 0.3, seed)
    assert [c for c in small if c.isspace()] == [c for c in text if c.isspace()]
    whole = swapped(text, to, 1.0, seed).split()
    for old, a, b, new in zip(text.split(), small.split(), large.split(), whole, strict=True):
        assert a in (old, new)
        assert b == new if a != old else b in (old, new)


def test_unspaced_scripts_are_told() -> None:
    assert is_unspaced("今天天气")
    assert is_unspaced("สวัสดี ok")
    assert not is_unspaced("hello 今")
    assert not is_unspaced("привет")
    assert not is_unspaced("123")


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match=r"script 'runic': expected one of \['cyrillic'"):
        swapped("a", "runic", 1.0)
    with pytest.raises(InputError, match="a fraction in"):
        swapped("a", "greek", 2.0)
