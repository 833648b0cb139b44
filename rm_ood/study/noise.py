"""Changes to one text, by severity and seed: words, characters, length, order. What `builtin` makes shifts of.

Every function takes a severity of 0 as no change, and draws from a random state of the text's own, so that the same text
gets the same change wherever it stands and, but for the paper's own loop, what a small severity hits a larger one hits too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from rm_ood.errors import InputError
from rm_ood.preferences import stable_hash
from rm_ood.rewriting import DELETE, INSERT, check_fraction, check_noise, is_unspaced, tokens

# Fewest copies of a word that look like a loop.
_LOOP = 8
_CHARACTER_ACTIONS = ("swap", "insert", "delete", "replace")


def paper_word_perturbation(text: str, p: float, vocabulary: Sequence[str], seed: int = 0) -> str:
    """Word noise exactly as the paper's code makes it, slips included.

    The loop counts to the number of words that the text had, but acts on the text as it has become: the word after a
    deleted one is passed over, a word that got another before it can be hit again, and late positions may lie past the
    end, where deleting does nothing and inserting and replacing append. Any hit collapses white space. Severities are not
    nested.

    Args:
        text: any text.
        p: probability that a position is hit, a fraction in [0, 1].
        vocabulary: words to draw from, uniformly.
        seed: decides everything, together with the text. As in the paper, hits and actions come from one generator
            (NumPy's legacy one) and words from another (Python's).

    Returns:
        The perturbed text, which may be empty.

    Raises:
        InputError: `p` outside [0, 1], or an empty vocabulary.

    Reference:
        LeVine et al., "A Baseline Analysis of Reward Models' Ability To Accurately Analyze Foundation Models Under
        Distribution Shift", arXiv 2311.14743, its released code.
    """
    check_noise(p, vocabulary)
    key = stable_hash(text, seed) % 2**32
    hits, draws = np.random.RandomState(key), random.Random(key)
    for i in range(len(text.split())):
        if hits.rand() > p or p == 0:
            continue
        action = hits.rand()
        words = text.split()
        drawn = [] if INSERT < action <= DELETE else [draws.choice(vocabulary)]
        rest = words[i:] if action <= INSERT else words[i + 1 :]
        text = " ".join([*words[:i], *drawn, *rest])
    return text


def character_noise(text: str, p: float, seed: int = 0) -> str:
    """Each character that is not white space is, with probability `p`, swapped with the next one, given another
    before it, deleted or replaced (a quarter each).

    New characters are drawn from the text's own, so its script stays.

    Args:
        text: any text.
        p: probability that a character is hit, a fraction in [0, 1].
        seed: decides everything, together with the text.

    Returns:
        The noisy text, empty only if `text` holds nothing but white space.

    Raises:
        InputError: `p` outside [0, 1].
    """
    check_fraction(p)
    own = [c for c in text if not c.isspace()]
    rng = random.Random(stable_hash(text, seed))
    kept: list[str] = []
    swapped, drawn = "", ""
    for c in text:
        if c.isspace():
            kept.append(swapped + c)
            swapped = ""
            continue
        hit, action, drawn = rng.random() < p, rng.choice(_CHARACTER_ACTIONS), rng.choice(own)
        if swapped:
            # The partner of a swap is not hit again.
            kept.append(c + swapped)
            swapped = ""
        elif not hit or action == "insert":
            kept.append(drawn + c if hit else c)
        elif action == "swap":
            swapped = c
        elif action == "replace":
            kept.append(drawn)
    noisy = "".join(kept) + swapped
    return noisy if noisy.strip() or not own else drawn


def truncated(text: str, share: float) -> str:
    """The text without the last `share` of its words (characters where a script has no spaces), at least one left."""
    check_fraction(share)
    found = tokens(text)
    return "".join(found[: max(1, math.ceil((1 - share) * len(found)))]) if share and found else text


def repeated_word(text: str, share: float) -> str:
    """The text whose last `share` of words is its longest word over and over, as a generation that got stuck."""
    check_fraction(share)
    found = tokens(text)
    if not share or not found:
        return text
    kept = math.floor((1 - share) * len(found))
    word = max((token.strip() for token in found), key=len)
    joint = "" if is_unspaced(text) else " "
    copies = max(math.ceil(_LOOP * share), len(found) - kept)
    return joint.join(["".join(found[:kept])] * (kept > 0) + [word] * copies)


def inflated(text: str, copies: float) -> str:
    """The text followed by itself `copies` times; a fraction of a copy is the first words of it."""
    if not 0 <= copies < math.inf:
        raise InputError(f"severity={copies}: expected a number of copies, 0 or more")
    whole, part = divmod(copies, 1)
    last = [truncated(text, 1 - part)] if part else []
    return "\n".join([text] * (1 + int(whole)) + last)


def shuffled(text: str, share: float, seed: int = 0) -> str:
    """A random `share` of the words (characters where a script has no spaces) in random order, white space collapsed."""
    check_fraction(share)
    units = [token.strip() for token in tokens(text)]
    rng = random.Random(stable_hash(text, seed))
    where = [i for i in range(len(units)) if rng.random() < share]
    if len(where) < 2:
        return text
    moved = dict(zip(where, rng.sample(where, len(where)), strict=True))
    joint = "" if is_unspaced(text) else " "
    return joint.join(units[moved.get(i, i)] for i in range(len(units)))
