"""Texts rewritten in place: the turns of a prompt and a response one by one, and noise on words.

What stands around the texts (messages, `Human:`/`Assistant:` turns, tools, text blocks) is taken apart and put together
here, so that no change touches a role.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from rm_ood.dialogue import Dialogue, Message, Response, Text, parse_dialogue
from rm_ood.errors import InputError
from rm_ood.preferences import stable_hash

# Of the words that are hit, .33 are inserted before, up to here; .34 are deleted, up to there; the rest replaced.
INSERT, DELETE = 0.33, 0.67
_TURN = re.compile(r"(?:\A\n*|\n\n)(?:Human|Assistant):[ \t]?")
_MARKER = re.compile(r"\n\n+(?=(?:Human|Assistant):)")
# Written without spaces between words.
_UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI"})


def change_prompt(prompt: Text, change: Callable[[str], str]) -> Text:
    """The prompt with the text of each of its turns changed."""
    if isinstance(prompt, Dialogue):
        return replace(prompt, messages=[_change_message(message, change) for message in prompt.messages])
    if not isinstance(prompt, str):
        return [_change_message(message, change) for message in prompt]
    if parse_dialogue(prompt) is None:
        return _change_core(prompt, change)
    return _over_turns(prompt, lambda text: _MARKER.sub("\n", _change_core(text, change)))


def change_response(response: Response, change: Callable[[str], str]) -> Response:
    """The response with its text changed; tool calls and other fields of a message stay."""
    return _change_core(response, change) if isinstance(response, str) else _change_message(response, change)


def prompt_texts(prompt: Text) -> list[str]:
    """The texts of a prompt that a shift sees."""
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    change_prompt(prompt, keep)
    return found


def response_texts(response: Response) -> list[str]:
    """The texts of a response that a shift sees."""
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    change_response(response, keep)
    return found


def word_perturbation(text: str, p: float, vocabulary: Sequence[str], seed: int = 0) -> str:
    """Word noise: each word, with probability `p`, gets a random word before it (.33), is deleted (.34) or replaced (.33).

    The paper's shift without the slips of its code: each original word is visited once, an inserted word is not visited,
    and white space survives where no word changes.

    Args:
        text: any text; words are runs of characters that are not white space, or the characters of a script without spaces.
        p: probability that a word is hit, a fraction in [0, 1].
        vocabulary: words to draw from, uniformly.
        seed: decides everything, together with the text: the same text gets the same noise wherever it stands, and the
            words hit at a small `p` are hit in the same way at a larger one.

    Returns:
        The perturbed text, empty only if `text` holds no word: where every word was deleted, one random word is left.

    Raises:
        InputError: `p` outside [0, 1], or an empty vocabulary.
    """
    check_noise(p, vocabulary)
    rng = random.Random(stable_hash(text, seed))
    kept: list[str] = []
    drawn = ""
    joint = "" if is_unspaced(text) else " "
    for token in tokens(text):
        # Three draws a word whether or not it is hit, so that severities of one text are nested.
        hit, action, drawn = rng.random() < p, rng.random(), vocabulary[rng.randrange(len(vocabulary))]
        word = token.lstrip()
        space = token[: len(token) - len(word)]
        if not hit:
            kept.append(token)
        elif action < INSERT:
            kept.append(space + drawn + joint + word)
        elif action >= DELETE:
            kept.append(space + drawn)
    noisy = "".join(kept)
    return text if noisy == text.rstrip() else noisy.strip() or drawn


def vocabulary(texts: Iterable[str]) -> list[str]:
    """The distinct words of texts that are letters only, lower case, in a fixed order: what word noise draws from."""
    return sorted({w.lower() for text in texts for token in tokens(text) if (w := token.strip()).isalpha()})


def tokens(text: str) -> list[str]:
    """Words with the white space before them; characters where the script knows no spaces."""
    return re.findall(r"\s*\S" if is_unspaced(text) else r"\s*\S+", text)


def letters(text: str) -> Counter[str]:
    """Script, by the first word of the letters' Unicode names -> number of letters."""
    return Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())


def is_unspaced(text: str) -> bool:
    """Whether most letters are of a script that puts no spaces between words."""
    if text.isascii():
        return False
    found = letters(text)
    return 2 * sum(count for script, count in found.items() if script in _UNSPACED) > found.total()


def check_noise(p: float, vocabulary: Sequence[str]) -> None:
    """Raises InputError for a probability outside [0, 1] or no words."""
    check_fraction(p)
    if not vocabulary:
        raise InputError("vocabulary: got no words. Pass some of the text's language.")


def check_fraction(p: float) -> None:
    """Raises InputError for a probability outside [0, 1]."""
    if not 0 <= p <= 1:
        raise InputError(f"p={p}: expected a fraction in [0, 1]")


def _over_turns(text: str, change: Callable[[str], str]) -> str:
    marks = list(_TURN.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    turns = [mark[0] + change(text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]
    return "".join([text[: marks[0].start()], *turns])


def _change_message(message: Message, change: Callable[[str], str]) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _change_core(content, change)}
    if isinstance(content, list):
        return {**message, "content": [{**block, "text": _change_core(block["text"], change)} for block in content]}
    return message


def _change_core(text: str, change: Callable[[str], str]) -> str:
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    return text[:start] + change(core) + text[start + len(core) :]
