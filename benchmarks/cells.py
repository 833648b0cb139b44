"""Clean and shifted items of the detection benchmark, split into a development and a sealed half.

The split was written down before the first run: everything is chosen on the development half (its languages, domains, kinds
of noise and reward models), and the sealed half is for the report. No domain or kind of noise is in both; of the languages
French and Chinese are, in other data.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from train_reward_model import Recipe

from rm_ood.preferences import hash_fraction, prompt_key, stable_hash

Row = dict[str, Any]
HALVES = ("development", "sealed")
SIDES = ("prompt", "response", "both")
# The sealed reward models are trained on other prompts, from other seeds, for longer or shorter, with larger adapters.
REWARD_MODELS = {
    "development": (Recipe("smollm2", seed=0), Recipe("minilm", seed=0)),
    "sealed": (Recipe("smollm2", seed=1, epochs=3, rank=32), Recipe("minilm", seed=1, epochs=3, rank=32)),
}
# Items in a cell, and clean prompts, of one response each.
CELL_SIZE, CLEAN_SHARE = 50, 0.45
_CLEAN_SALT = 77


class Item(NamedTuple):
    """One input.

    Attributes:
        prompt: what was asked. response: the answer that is judged. other: the other answer of the pair, if there is one.
        source: what the item was made from: items with the same source are resampled together.
    """

    prompt: str
    response: str
    other: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Cell:
    """One kind of shift on one side, with its items."""

    half: str
    side: str
    family: str
    name: str
    items: tuple[Item, ...]


def split(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Rows for the guard (fit and calibration), and clean rows; by prompt."""
    clean = [hash_fraction(prompt_key(row["prompt"]), _CLEAN_SALT + seed) < CLEAN_SHARE for row in rows]
    return (
        [row for row, c in zip(rows, clean, strict=True) if not c],
        [row for row, c in zip(rows, clean, strict=True) if c],
    )


def clean_items(rows: Sequence[Row], seed: int) -> list[Item]:
    """One response a prompt, chosen or rejected by a seeded coin: as independent as calibration items."""
    one = {prompt_key(row["prompt"]): row for row in rows}
    found = []
    for key, row in sorted(one.items()):
        sides = ("chosen", "rejected") if hash_fraction(key, seed + 31) < 0.5 else ("rejected", "chosen")
        found.append(Item(row["prompt"], row[sides[0]], row[sides[1]], f"hh {key}"))
    return found


class Data:
    """The files of the data folder, read as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self, name: str, **want: str) -> list[Row]:
        """Rows of a file whose fields have the wanted values."""
        with gzip.open(self.folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        return [row for row in found if all(row.get(key) == value for key, value in want.items())]

    def items(self, name: str, **want: str) -> list[Item]:
        """Prompts with the right or only answer, and the wrong one."""
        return [
            Item(row["prompt"], row.get("chosen", row.get("response")), row.get("rejected"), _source(row))
            for row in self.rows(name, **want)
        ]

    def aligned(self, name: str, language: str, side: str) -> list[Item]:
        """Items whose prompt, response or both are in another language, the rest in English; same content."""
        english = {row["id"]: row for row in self.rows(name, lang="en")}
        other = [row for row in self.rows(name, lang=language) if row["id"] in english]
        found = []
        for row in other:
            asked, answered = (english[row["id"]] if side == s else row for s in ("response", "prompt"))
            response = answered.get("chosen", answered.get("response"))
            found.append(Item(asked["prompt"], response, answered.get("rejected"), _source(row)))
        return found

    def background(self) -> list[Item]:
        """Plain text in twelve languages, each passage cut in two: the background corpus of relative Mahalanobis."""
        texts = [
            row["text"]
            for name in ("inaugural_en", "product_reviews_1_en", "udhr")
            for row in self.rows(f"text/{name}")
        ]
        halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
        return [Item(a.strip(), b.strip()) for a, b in halves if a.strip() and b.strip()]


def _source(row: Row) -> str:
    """The task that a row is about: one in all files, languages and answers."""
    found: str = row["id"]
    if found.startswith("mtbench-"):
        # The rest is the model that answered.
        return "-".join(found.split("-")[:2])
    return f"ukp {row['prompt']}" if found.startswith("ukp-") else found


def drawn(items: Sequence[Item], size: int = CELL_SIZE) -> tuple[Item, ...]:
    """A fixed draw of the items, by a hash of their text."""
    return tuple(sorted(items, key=lambda item: stable_hash(f"{item.prompt}\n{item.response}", 3))[:size])


def cells(data: Data, clean: Sequence[Item], half: str, noise: Callable[[str, str, float], str]) -> Iterator[Cell]:
    """The cells of one half.

    Args:
        data: the files. clean: clean items, the start of noise and of one-sided domain shifts.
        half: `"development"` or `"sealed"`.
        noise: (name of a shift of the study, text, severity) -> text.
    """
    for family, side, name, items in (
        _development(data, clean, noise) if half == HALVES[0] else _sealed(data, clean, noise)
    ):
        yield Cell(half, side, family, name, drawn(items))


def _development(data: Data, clean: Sequence[Item], noise: Any) -> Iterator[tuple[str, str, str, Sequence[Item]]]:
    for language in ("es", "zh"):
        yield (
            "language",
            "prompt",
            f"maths in {language}, answer in English",
            data.items("preference/mgsm_prompt_shift", lang=language),
        )
    for language in ("fr", "ru"):
        yield (
            "language",
            "prompt",
            f"code task in {language}",
            data.items("preference/humaneval_xl_prompt_shift", lang=language),
        )
    for side in SIDES:
        yield "language", side, "TruthfulQA in es", data.aligned("preference/truthfulqa_multi", "es", side)
        yield "language", side, "MT-Bench in fr", data.aligned("qa/mtbench_multilingual", "fr", side)
        yield "language", side, "XCOPA in it", data.aligned("preference/xcopa", "it", side)
    maths, medicine = data.items("preference/gsm8k_en"), data.items("qa/pubmedqa_en")
    yield "domain", "both", "maths", maths
    yield "domain", "both", "medicine", medicine
    yield "domain", "both", "instructions (LLMBar)", data.items("preference/llmbar_en")
    yield "domain", "prompt", "maths question", crossed(maths, clean)
    yield "domain", "response", "maths answer", crossed(clean, maths)
    yield "domain", "prompt", "medical question", crossed(medicine, clean)
    yield "domain", "response", "medical answer", crossed(clean, medicine)
    for severity in (0.1, 0.3, 0.5):
        yield from noised(clean, "word noise", severity, noise)
    yield from noised(clean, "repeated token", 0.5, noise, sides=("response",))
    yield from noised(clean, "flattery wrapper", 1.0, noise, sides=("response",))


def _sealed(data: Data, clean: Sequence[Item], noise: Any) -> Iterator[tuple[str, str, str, Sequence[Item]]]:
    for language in ("de", "fr"):
        yield (
            "language",
            "prompt",
            f"maths in {language}, answer in English",
            data.items("preference/mgsm_prompt_shift", lang=language),
        )
    for language in ("ar", "id", "pt"):
        yield (
            "language",
            "prompt",
            f"code task in {language}",
            data.items("preference/humaneval_xl_prompt_shift", lang=language),
        )
    for side in SIDES:
        yield "language", side, "TruthfulQA in ca", data.aligned("preference/truthfulqa_multi", "ca", side)
        yield "language", side, "MT-Bench in de", data.aligned("qa/mtbench_multilingual", "de", side)
        yield "language", side, "MT-Bench in zh", data.aligned("qa/mtbench_multilingual", "zh", side)
        yield "language", side, "XCOPA in tr", data.aligned("preference/xcopa", "tr", side)
    code, debate = data.items("preference/humanevalpack"), data.items("preference/ukp_convincing_en")
    yield "domain", "both", "code", code
    yield "domain", "both", "debate", debate
    yield "domain", "both", "assistant dialogues", data.items("preference/llamafactory_dpo_en")
    yield "domain", "both", "translation into German", data.items("preference/wmt_mqm_ted_ende")
    yield "domain", "prompt", "code task", crossed(code, clean)
    yield "domain", "response", "code answer", crossed(clean, code)
    yield "domain", "prompt", "debate question", crossed(debate, clean)
    yield "domain", "response", "debate argument", crossed(clean, debate)
    for severity in (0.1, 0.3):
        yield from noised(clean, "character noise", severity, noise)
    yield from noised(clean, "script swap cyrillic", 0.3, noise)
    yield from noised(clean, "length inflation", 0.5, noise, sides=("response",))
    yield from noised(clean, "markdown wrapper", 1.0, noise, sides=("response",))


def crossed(prompts: Sequence[Item], responses: Sequence[Item]) -> list[Item]:
    """The prompts of some items with the responses of others: a shift of one side, and a mismatch.

    The source is that of the clean dialogue, which stands among the clean items too.
    """
    both = list(zip(prompts, responses, strict=False))
    sources = [p.source if p.source.startswith("hh") else r.source for p, r in both]
    return [r._replace(prompt=p.prompt, source=source) for (p, r), source in zip(both, sources, strict=True)]


def noised(
    clean: Sequence[Item], kind: str, severity: float, noise: Any, sides: Sequence[str] = SIDES
) -> Iterator[tuple[str, str, str, Sequence[Item]]]:
    """Clean items with noise on a side."""
    for side in sides:
        items = [
            item._replace(
                prompt=noise(kind, item.prompt, severity) if side != "response" else item.prompt,
                response=noise(kind, item.response, severity) if side != "prompt" else item.response,
                other=noise(kind, item.other, severity) if side != "prompt" and item.other else item.other,
            )
            for item in drawn(clean)
        ]
        yield "noise", side, f"{kind} {severity:g}", items
