"""Text in another language by a Marian (OPUS-MT) model, sentence by sentence, as in the paper."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rm_ood.errors import InputError
from rm_ood.rewriting import prompt_texts, response_texts
from rm_ood.study.pairs import Pair
from rm_ood.study.registry import map_texts

# Translated once and back: the paper's fourth condition.
BACK = "back"

# After a full stop and its closing marks, before what can begin a sentence; Chinese, Japanese, Khmer and Burmese put no
# space there.
_SENTENCE_END = re.compile(
    r"(?<=[.!?…।])([\"'”’)\]]*)\s+(?=[^\s\W]|[\"'“‘(\[¿¡])|(?<=[。！？｡។៕။])[」』”’）】》]*(?![」』”’）】》。！？｡…]|$)"
)
# Where such a script pauses within a sentence.
_PAUSES = frozenset("，、；：,;:၊")
_NO_END = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|cf|No|Fig)|\b\w)\.$")
_NAME = re.compile(r"opus-mt-([A-Za-z_+]+)-([A-Za-z_+]+)$")


class Translator:
    """A Marian model as a function from texts to texts.

    Line breaks stay; within a line sentences are translated one by one and joined by spaces (the paper joined whole texts so).
    A sentence longer than the model reads is cut in two as often as it takes: at a space, at a pause where there is no
    space, between characters where there is neither, so that no part of it is lost. Every sentence is translated once.

    Args:
        model: Hub id such as `"Helsinki-NLP/opus-mt-en-de"`, or a local folder.
        device: of the model; None takes the GPU where there is one.
        batch_size: sentences a step.
        options: further keywords of `generate`, such as `num_beams`; the model's own are the default.

    Raises:
        InputError: the model cannot be loaded.
    """

    def __init__(self, model: str | Path, *, device: str | None = None, batch_size: int = 16, **options: Any) -> None:
        from transformers import MarianMTModel, MarianTokenizer

        try:
            self.tokenizer: Any = MarianTokenizer.from_pretrained(model)
            self.model: Any = MarianMTModel.from_pretrained(model).eval()
        except ImportError as error:
            raise InputError("translation needs sentencepiece: pip install 'rm_ood[translate]'") from error
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"translate={model}: no Marian model of that name or folder could be loaded ({type(error).__name__})"
            ) from error
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size = batch_size
        self.options = options
        self._known: dict[str, str] = {}

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The texts translated, in their order."""
        parts = [[self._sentences(line) for line in text.split("\n")] for text in texts]
        self._learn({sentence for lines in parts for line in lines for sentence in line})
        return ["\n".join(" ".join(self._known[s] for s in line) for line in lines) for lines in parts]

    def _sentences(self, line: str) -> list[str]:
        limit = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        return [piece for sentence in sentences(line) for piece in self._fitting(sentence, limit)]

    def _fitting(self, sentence: str, limit: int) -> Iterator[str]:
        if len(sentence) == 1 or len(self.tokenizer(sentence)["input_ids"]) <= limit:
            yield sentence
        else:
            for half in _halves(sentence):
                yield from self._fitting(half, limit)

    @torch.inference_mode()
    def _learn(self, wanted: set[str]) -> None:
        # Sentences of like length share a batch, so little of it is padding.
        new = sorted(wanted - self._known.keys(), key=lambda sentence: (len(sentence), sentence))
        for start in range(0, len(new), self.batch_size):
            batch = new[start : start + self.batch_size]
            inputs = self.tokenizer(batch, return_tensors="pt", padding=True, truncation=True).to(self.model.device)
            out = self.model.generate(**inputs, **self.options)
            texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
            self._known.update(zip(batch, (text.strip() for text in texts), strict=True))


def sentences(line: str) -> list[str]:
    """The sentences of one line, in order, without the white space between them; none of an empty line."""
    found: list[str] = []
    start = 0
    for end in _SENTENCE_END.finditer(line):
        head = line[start : end.end()].strip()
        if head and not _NO_END.search(head):
            found.append(head)
            start = end.end()
    return [*found, *filter(None, [line[start:].strip()])]


def _halves(sentence: str) -> list[str]:
    """A text of two characters or more in two parts of about one length; only white space between them is lost.

    Of the inner half of the text, the middlemost space; else the middlemost pause; else the middlemost space of all of it,
    which thins out the words of one side; else between characters, but not before a mark that belongs to the one before it.
    """
    middle = len(sentence) / 2
    inside = range(len(sentence) // 4 + 1, len(sentence) - len(sentence) // 4)

    def nearest(places: Iterable[int]) -> int | None:
        return min(places, key=lambda place: abs(place - middle), default=None)

    everywhere = range(1, len(sentence))
    cut = (
        nearest(i for i in inside if sentence[i].isspace())
        or nearest(i for i in inside if sentence[i - 1] in _PAUSES)
        or nearest(i for i in everywhere if sentence[i].isspace())
        or nearest(i for i in everywhere if not unicodedata.category(sentence[i]).startswith("M"))
        or len(sentence) // 2
    )
    return [half for half in (sentence[:cut].strip(), sentence[cut:].strip()) if half]


def translated(
    rows: Sequence[Pair], model: str, *, back: str | None = None, side: str | None = None
) -> Iterator[tuple[str, str, list[Pair]]]:
    """The paper's four conditions: prompts, responses or both translated, and both translated and back.

    Args:
        rows: the clean rows.
        model: the Marian model there, a Hub id or a folder.
        back: the model back; None takes the same name with the languages exchanged (`opus-mt-en-de`, `opus-mt-de-en`), for
            a folder only if it is there, and leaves the condition out where there is none.
        side: `"prompt"`, `"response"`, `"both"` or `"back"`; None takes each.

    Yields:
        The model's own name (`opus-mt-en-de`, with `, back` for the fourth), the side, and the rows.

    Raises:
        InputError: a model that cannot be loaded, or `"back"` without a model back.
    """
    home = back or _reverse(model)
    if side == BACK and home is None:
        raise InputError(f"translate={model}: no model back: name it, translate={model},MODEL_BACK")
    name = Path(model).name
    there = Translator(model)
    for s in ("prompt", "response", "both") if side is None else () if side == BACK else (side,):
        yield name, s, _translate(rows, s, there)
    if home is not None and side in (None, BACK):
        yield f"{name}, back", "both", _translate(_translate(rows, "both", there), "both", Translator(home))


def _translate(rows: Sequence[Pair], side: str, translator: Translator) -> list[Pair]:
    texts: set[str] = set()
    for row in rows:
        texts.update(prompt_texts(row.prompt) if side != "response" else ())
        texts.update(t for r in row.responses for t in response_texts(r) if side != "prompt")
    listed = sorted(texts)
    known = dict(zip(listed, translator(listed), strict=True))
    return [map_texts(row, known.__getitem__, side) for row in rows]


def _reverse(model: str) -> str | None:
    match = _NAME.search(model)
    if match is None:
        return None
    name = f"{model[: match.start()]}opus-mt-{match[2]}-{match[1]}"
    return name if Path(name).is_dir() or not Path(model).is_dir() else None
