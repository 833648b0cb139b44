"""Shifted data: the paper's word perturbation, and real conversations in many languages.

The conversations come from the PyPI package `chatterbot-corpus`; its languages are not translations of each other line
by line, so a shifted side is paired with a random other side, and `random_replies` makes the same-language control that
such pairs have to be read beside.
"""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rm_ood.errors import InputError
from rm_ood.preferences import stable_hash

# Code of a language -> its folder in chatterbot-corpus.
LANGUAGES = {
    "de": "german", "en": "english", "es": "spanish", "fr": "french", "hi": "hindi", "id": "indonesian",
    "it": "italian", "ja": "japanese", "ko": "korean", "nl": "dutch", "pt": "portuguese", "ru": "russian",
    "tr": "turkish", "uk": "ukrainian", "zh": "chinese",
}  # fmt: skip
_PACKAGE = "chatterbot_corpus"
# Of the words that are hit, .33 are inserted before, up to here; .34 are deleted, up to there; the rest replaced.
_INSERT, _DELETE = 0.33, 0.67


class Conversation(NamedTuple):
    """One turn of talk: what was said, and the reply it got."""

    prompt: str
    response: str


def word_perturbation(text: str, p: float, vocabulary: Sequence[str], seed: int = 0) -> str:
    """Word noise: each word, with probability `p`, gets a random word before it (.33), is deleted (.34) or replaced (.33).

    The paper's shift without the slips of its code: each original word is visited once, an inserted word is not visited,
    and white space survives where no word changes.

    Args:
        text: any text; words are runs of characters that are not white space.
        p: probability that a word is hit, a fraction in [0, 1].
        vocabulary: words to draw from, uniformly.
        seed: decides everything, together with the text: the same text gets the same noise wherever it stands, and the
            words hit at a small `p` are hit in the same way at a larger one.

    Returns:
        The perturbed text, empty only if `text` holds no word: where every word was deleted, one random word is left.

    Raises:
        InputError: `p` outside [0, 1], or an empty vocabulary.
    """
    if not 0 <= p <= 1:
        raise InputError(f"p={p}: expected a fraction in [0, 1]")
    if not vocabulary:
        raise InputError("vocabulary: got no words. Pass some of the text's language.")
    rng = random.Random(stable_hash(text, seed))
    kept: list[str] = []
    drawn = ""
    for token in re.findall(r"\s*\S+", text):
        # Three draws a word whether or not it is hit, so that severities of one text are nested.
        hit, action, drawn = rng.random() < p, rng.random(), vocabulary[rng.randrange(len(vocabulary))]
        word = token.lstrip()
        space = token[: len(token) - len(word)]
        if not hit:
            kept.append(token)
        elif action < _INSERT:
            kept.append(f"{space}{drawn} {word}")
        elif action >= _DELETE:
            kept.append(space + drawn)
    noisy = "".join(kept)
    return text if noisy == text.rstrip() else noisy.strip() or drawn


def conversations(language: str) -> list[Conversation]:
    """Real conversations of one language: each one's opening and the first reply.

    White space is collapsed; empty sides, replies that repeat the prompt and duplicates are left out, and so is, in
    other languages, whatever also stands in the English corpus (left untranslated, or a bare name: no shift either way).

    Args:
        language: a code of `LANGUAGES`, such as `"es"`.

    Returns:
        The conversations, in the order of the package's files.

    Raises:
        InputError: an unknown language, or the package `chatterbot-corpus` is not installed.
    """
    if language not in LANGUAGES:
        raise InputError(f"language={language!r}: expected one of {sorted(LANGUAGES)}")
    found = list(_read(LANGUAGES[language]))
    if language == "en":
        return found
    english = {text.casefold() for conversation in _read(LANGUAGES["en"]) for text in conversation}
    return [c for c in found if c.prompt.casefold() not in english and c.response.casefold() not in english]


def random_replies(rows: Sequence[Conversation], rng: random.Random) -> list[str]:
    """For each conversation the reply of another one: a rejected response, or the control of a shifted pairing.

    The reply never is one that the same prompt got anywhere in `rows`.

    Raises:
        InputError: the rows hold no reply that some prompt did not get.
    """
    own: dict[str, set[str]] = {}
    for row in rows:
        own.setdefault(row.prompt.casefold(), set()).add(row.response.casefold())
    replies = []
    for row in rows:
        others = [other.response for other in rows if other.response.casefold() not in own[row.prompt.casefold()]]
        if not others:
            raise InputError(f"conversations: {len(rows)} rows hold no reply from another conversation")
        replies.append(rng.choice(others))
    return replies


@cache
def _read(folder: str) -> tuple[Conversation, ...]:
    found: dict[tuple[str, str], Conversation] = {}
    for path in sorted((_data_directory() / folder).glob("*.yml")):
        for turns in _load(path).get("conversations") or []:
            if not isinstance(turns, list) or len(turns) < 2:
                continue
            prompt, response = (" ".join(str(turn).split()) for turn in turns[:2])
            key = (prompt.casefold(), response.casefold())
            if all(key) and key[0] != key[1]:
                found.setdefault(key, Conversation(prompt, response))
    return tuple(found.values())


def _data_directory() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the conversations need the package chatterbot-corpus: pip install 'rm_ood[demo]'")
    return Path(spec.submodule_search_locations[0]) / "data"


def _load(path: Path) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with path.open(encoding="utf-8") as file:
        content: dict[str, Any] = yaml.load(file, Loader=loader)
    return content
