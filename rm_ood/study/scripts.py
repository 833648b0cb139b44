"""Which script a text is written in, and the same words in another one."""

from __future__ import annotations

import random
import re
import unicodedata

from rm_ood.errors import InputError
from rm_ood.preferences import stable_hash


def _table(latin: str, other: str) -> dict[str, str]:
    """Lower and upper case: other letters of several characters are separated by spaces."""
    pairs = dict(zip(latin.split(), other.split(), strict=True))
    return pairs | {a.capitalize(): b.capitalize() for a, b in pairs.items()}


# Latin letters, the longest group first -> letters. `look-alike` reads as before, to a person.
SWAPS: dict[str, dict[str, str]] = {
    "look-alike": dict(zip("aceopxyisjABCEHKMOPTXSIJ", "асеорхуіѕјАВСЕНКМОРТХЅІЈ", strict=True)),
    "cyrillic": _table(
        "sh ch zh ya yu ts a b c d e f g h i j k l m n o p q r s t u v w x y z",
        "ш ч ж я ю ц а б к д е ф г х и й к л м н о п к р с т у в в кс ы з",
    ),
    "greek": _table(
        "th ph ch ps a b c d e f g h i j k l m n o p q r s t u v w x y z",
        "θ φ χ ψ α β κ δ ε φ γ η ι ι κ λ μ ν ο π κ ρ σ τ υ β ω ξ υ ζ",
    ),
    "fullwidth": {chr(c): chr(c + 0xFEE0) for c in range(0x21, 0x7F)},
}
_PATTERNS = {
    name: re.compile("|".join(map(re.escape, sorted(table, key=len, reverse=True)))) for name, table in SWAPS.items()
}


def swapped(text: str, to: str, share: float, seed: int = 0) -> str:
    """The text with a random `share` of its words written in another script; other scripts than Latin stay.

    Args:
        text: any text.
        to: a name of `SWAPS`.
        share: fraction of the words in [0, 1]; words swapped at a small share are swapped at a larger one.
        seed: decides which words, together with the text.

    Raises:
        InputError: an unknown script, or a share outside [0, 1].
    """
    if to not in SWAPS:
        raise InputError(f"script {to!r}: expected one of {sorted(SWAPS)}")
    if not 0 <= share <= 1:
        raise InputError(f"share={share}: expected a fraction in [0, 1]")
    rng = random.Random(stable_hash(text, seed))
    table, pattern = SWAPS[to], _PATTERNS[to]

    def word(match: re.Match[str]) -> str:
        # An accent is another character after the letter that it stands on.
        plain = unicodedata.normalize("NFD", match[0])
        new = unicodedata.normalize("NFC", pattern.sub(lambda m: table[m[0]], plain))
        return new if rng.random() < share else match[0]

    return re.sub(r"\S+", word, text)
