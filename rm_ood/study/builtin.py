"""The shifts that come with the package: noise, length, order, script, and what raises a reward without earning it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

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
from rm_ood.study.pairs import Pair
from rm_ood.study.registry import ShiftContext, shift
from rm_ood.study.scripts import swapped

_NOISE = (0.1, 0.3, 0.5, 0.9)


@shift("word noise", severities=_NOISE)
def word_noise(text: str, context: ShiftContext) -> str:
    """Words inserted, deleted and replaced; severity: share of words hit."""
    return word_perturbation(text, context.strength, context.words, context.seed)


@shift("word noise (paper)", severities=_NOISE)
def word_noise_paper(text: str, context: ShiftContext) -> str:
    """The same with the slips of the paper's code; a text of which nothing is left stays, as no guard reads it."""
    return paper_word_perturbation(text, context.strength, context.words, context.seed) or text


@shift("character noise", severities=(0.05, 0.1, 0.2, 0.5))
def noisy_characters(text: str, context: ShiftContext) -> str:
    """Characters swapped, inserted, deleted and replaced; severity: share of characters hit."""
    return character_noise(text, context.strength, context.seed)


@shift("truncation", severities=(0.25, 0.5, 0.75))
def truncation(text: str, context: ShiftContext) -> str:
    """The end is missing; severity: share of words cut."""
    return truncated(text, context.strength)


@shift("shuffled words", severities=(0.25, 0.5, 1.0))
def shuffled_words(text: str, context: ShiftContext) -> str:
    """The same words in another order; severity: share of words that move."""
    return shuffled(text, context.strength, context.seed)


@shift("repeated token", severities=(0.25, 0.5, 1.0), paired=False)
def repeated_token(text: str, context: ShiftContext) -> str:
    """One word over and over, as a generation that got stuck; severity: share of the text that is the loop."""
    return repeated_word(text, context.strength)


@shift("length inflation", severities=(1, 3, 7), highest=100)
def length_inflation(text: str, context: ShiftContext) -> str:
    """The text said again; severity: number of copies added."""
    return inflated(text, context.strength)


def _script(name: str) -> None:
    @shift(f"script swap {name}", severities=(0.3, 1.0))
    def script_swap(text: str, context: ShiftContext) -> str:
        return swapped(text, name, context.strength, context.seed)


for _name in ("look-alike", "cyrillic", "greek", "fullwidth"):
    _script(_name)


@shift("mismatched", sides=("prompt", "response"), rows=True, paired=False)
def mismatched(rows: list[Pair], context: ShiftContext) -> list[Pair]:
    """Prompt and responses of different rows, and of different prompts: each side is as ever, only they do not belong."""
    others = [rows[i] for i in another_prompt([row.cluster for row in rows], context.seed)]
    if context.side == "prompt":
        return [replace(row, prompt=other.prompt) for row, other in zip(rows, others, strict=True)]
    return [replace(row, chosen=other.chosen, rejected=other.rejected) for row, other in zip(rows, others, strict=True)]


def another_prompt(clusters: Sequence[int], seed: int) -> list[int]:
    """For each row, by its cluster, the number of a row of another cluster: a seeded permutation.

    Raises:
        InputError: more than half of the rows share one prompt, so there is no such permutation.
    """
    most = Counter(clusters).most_common(1)[0][1]
    if 2 * most > len(clusters):
        raise InputError(f"mismatched: {most} of {len(clusters)} rows share one prompt; more than half have no partner")
    # Rows of a cluster stand together, so a turn by the largest cluster's size leaves none with its own.
    order = sorted(range(len(clusters)), key=lambda i: (stable_hash(f"{clusters[i]}", seed), clusters[i], i))
    partners = dict(zip(order, order[most:] + order[:most], strict=True))
    return [partners[i] for i in range(len(clusters))]
