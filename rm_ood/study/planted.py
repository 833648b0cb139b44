"""Known shifts to plant in clean items: another script, shuffled words, code, one word repeated, noise, no response.

Beside `shifts`, whose shifts are for measuring, these are for finding out in a minute what a guard catches: they need no
data but the items, and each is so strong that a reader would see it at once.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import replace

from rm_ood.canaries import CODE, EVERYDAY, SCRIPTS, Pair
from rm_ood.dialogue import Dialogue, Message, Text, content_text
from rm_ood.preferences import prompt_key, stable_hash
from rm_ood.rewriting import letters
from rm_ood.study.builtin import another_prompt
from rm_ood.study.noise import repeated_word, shuffled

OTHER_SCRIPT, EMPTY_RESPONSE, MISMATCHED = "other script", "empty response", "answer to another prompt"
# Share of the items' letters from which a script belongs to them.
_OWN_SCRIPT = 0.01
_NOISE = string.ascii_letters + string.digits + string.punctuation + " "

Item = tuple[Text, str]
# (text, number of the item, 0 for the prompt or 1 for the response, random state of that text) -> text
Change = Callable[[str, int, int, random.Random], str]


def changes(items: Sequence[Item]) -> dict[str, Change]:
    """Name -> shift. A script that the items are written in is no shift for them: `OTHER_SCRIPT` may be missing."""
    found = letters(" ".join(_text(prompt) + response for prompt, response in items))
    total = max(1, found.total())
    foreign = [
        pair
        for script, talk in {**SCRIPTS, "LATIN": EVERYDAY[:3]}.items()
        if found[script] < _OWN_SCRIPT * total
        for pair in talk
    ]
    return {
        **({OTHER_SCRIPT: _another(foreign)} if foreign else {}),
        "shuffled words": lambda text, i, side, rng: shuffled(text, 1.0, rng.getrandbits(62)),
        "code": _another(CODE),
        "one word repeated": lambda text, i, side, rng: repeated_word(text, 1.0),
        "random characters": _noise,
        EMPTY_RESPONSE: lambda text, i, side, rng: "",
    }


def changed(item: Item, i: int, change: Change, sides: Sequence[str], seed: int) -> Item:
    """Item number i with a shift on `"prompt"`, `"response"` or both; in a message list the last user turn is changed.

    The same text gets the same shuffle and the same noise wherever it stands.
    """
    prompt, response = item
    if "prompt" in sides:
        before = _text(prompt)
        after = change(before, i, 0, random.Random(stable_hash(before, seed)))
        if isinstance(prompt, Dialogue):
            prompt = replace(prompt, messages=_with_turn(prompt.messages, after))
        else:
            prompt = after if isinstance(prompt, str) or not prompt else _with_turn(prompt, after)
    if "response" in sides:
        response = change(response, i, 1, random.Random(stable_hash(response, seed)))
    return prompt, response


def mismatched(items: Sequence[Item], seed: int) -> list[Item]:
    """The items, each with the response to another prompt among them: nothing is strange but that the two do not belong.

    Not one of `changes`: it is weak, and a reader has to follow both sides to see it.

    Raises:
        InputError: more than half of the items have one prompt.
    """
    partners = another_prompt([prompt_key(prompt) for prompt, _ in items], seed)
    return [(prompt, items[other][1]) for (prompt, _), other in zip(items, partners, strict=True)]


def _another(pairs: Sequence[Pair]) -> Change:
    return lambda text, i, side, rng: pairs[i % len(pairs)][side]


def _noise(text: str, i: int, side: int, rng: random.Random) -> str:
    return "".join(rng.choices(_NOISE, k=max(16, len(text)))).strip()


def _text(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    messages = prompt.messages if isinstance(prompt, Dialogue) else prompt
    return content_text(messages[_turn(messages)]) if messages else ""


def _with_turn(messages: list[Message], text: str) -> list[Message]:
    turn = _turn(messages)
    return [{**message, "content": text} if i == turn else message for i, message in enumerate(messages)]


def _turn(messages: Sequence[Message]) -> int:
    """The last user turn, or the last turn of all where no user speaks."""
    return next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "user"), len(messages) - 1)
