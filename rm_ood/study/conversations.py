"""Real conversations in many languages, from the PyPI package `chatterbot-corpus`.

Its languages are not translations of each other line by line, so a shifted side is paired with a random other side, and
`random_replies` makes the same-language control that such pairs have to be read beside.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rm_ood.errors import InputError

# Code of a language -> its folder in chatterbot-corpus.
LANGUAGES = {
    "de": "german", "en": "english", "es": "spanish", "fr": "french", "hi": "hindi", "id": "indonesian",
    "it": "italian", "ja": "japanese", "ko": "korean", "nl": "dutch", "pt": "portuguese", "ru": "russian",
    "tr": "turkish", "uk": "ukrainian", "zh": "chinese",
}  # fmt: skip
_PACKAGE = "chatterbot_corpus"


class Conversation(NamedTuple):
    """One turn of talk: what was said, and the reply it got."""

    prompt: str
    response: str


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
