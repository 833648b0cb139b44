"""The same rows in another language, from a file: equal ids mean the same content, so one side can be exchanged alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rm_ood.dialogue import Text, check_prompt
from rm_ood.errors import InputError
from rm_ood.rows import iter_rows
from rm_ood.study.pairs import Pair, read_pairs
from rm_ood.study.registry import SIDES

# id -> prompt, and the pair where the file has responses
_Other = dict[str, tuple[Text, Pair | None]]


def aligned(
    rows: Sequence[Pair],
    path: str | Path,
    *,
    lang: str | None = None,
    side: str | None = None,
    common: bool = False,
) -> Iterator[tuple[str, str, list[Pair]]]:
    """Clean rows with prompts, responses or both taken from the rows of equal id in a file.

    A language whose rows are the clean rows themselves is left out, and so is a side that does not differ: data whose
    responses stay in the clean language, or have none, give the prompt alone.

    Args:
        rows: the clean rows, ids distinct.
        path: JSON Lines or Parquet, `id`, `prompt` and perhaps `chosen` and `rejected` in a row; `lang` where a file holds
            several languages.
        lang: one language of the file; None takes each.
        side: `"prompt"`, `"response"` or `"both"`; None takes each that differs.
        common: keep the clean rows that the file has, instead of refusing where it lacks some.

    Yields:
        The language (the file's stem where its rows name none), the side, and the rows, with the clean rows' ids, clusters
        and subsets.

    Raises:
        InputError: ids that are missing, repeated or without match (with their number), a language or side that the file
            does not hold.
    """
    repeated = sum(count > 1 for count in Counter(row.id for row in rows).values())
    if repeated:
        raise InputError(
            f"aligned: {repeated} ids stand in several of the {len(rows)} clean rows; each has to be one row"
        )
    source = Path(path)
    raw = list(iter_rows(source))
    languages = sorted({str(row["lang"]) for row in raw if row.get("lang") is not None})
    if lang is not None and lang not in languages:
        raise InputError(f"{source.name}: no rows with lang={lang!r}; it has {languages or 'no lang column'}")
    found = 0
    wanted: Sequence[str | None] = (lang,) if lang is not None else languages or (None,)
    for name in wanted:
        kept, others = _matched(rows, _read(raw, name, source.name), f"{source.name} ({name or 'no lang'})", common)
        for s in SIDES if side is None else (side,):
            shifted = _exchanged(kept, others, s)
            if shifted is not None:
                found += 1
                yield name or source.name.removesuffix(".gz").rpartition(".")[0], s, shifted
    if not found:
        raise InputError(
            f"{source.name}: nothing of {f'its {side} side' if side else 'it'} differs from the clean rows"
        )


def _read(raw: Sequence[Mapping[str, Any]], lang: str | None, name: str) -> _Other:
    found: _Other = {}
    if not raw:
        raise InputError(f"{name}: no rows in it")
    mine = [(i, row) for i, row in enumerate(raw) if lang is None or row.get("lang") == lang]
    without = sum(row.get("id") is None for _, row in mine)
    if without:
        raise InputError(f"{name}: {without} of {len(mine)} rows have no id; aligned rows are matched by id")
    if mine[0][1].get("chosen") is not None:
        entries: list[tuple[str, Text, Pair | None]] = [
            (pair.id, pair.prompt, pair) for pair in read_pairs(raw, lang=lang, layout="preferences")
        ]
    else:
        entries = [(str(row["id"]), check_prompt(row.get("prompt"), f"rows[{i}].prompt"), None) for i, row in mine]
    for key, prompt, pair in entries:
        found[key] = (prompt, pair)
    if len(found) < len(entries):
        raise InputError(
            f"{name}: {len(entries) - len(found)} of {len(entries)} rows repeat an id. Each id has to stand for one row; if "
            "the file holds several languages, name them in a column lang."
        )
    return found


def _matched(
    rows: Sequence[Pair], others: _Other, name: str, common: bool
) -> tuple[list[Pair], list[tuple[Text, Pair | None]]]:
    kept = [row for row in rows if row.id in others]
    if not kept:
        raise InputError(f"{name}: none of its {len(others)} ids is one of the {len(rows)} clean rows'")
    if len(kept) < len(rows) and not common:
        raise InputError(
            f"{name}: {len(rows) - len(kept)} of {len(rows)} clean rows have no row of their id in it. Leave them out of the "
            "clean rows, or write `:common` after the file to compare on the rows that both have."
        )
    return kept, [others[row.id] for row in kept]


def _exchanged(rows: list[Pair], others: list[tuple[Text, Pair | None]], side: str) -> list[Pair] | None:
    """The rows with a side exchanged; None where that side, or one of the two, is no other than before."""
    prompts = [prompt for prompt, _ in others]
    pairs = [pair for _, pair in others if pair is not None]
    has_responses = len(pairs) == len(rows) and any(
        row.responses != pair.responses for row, pair in zip(rows, pairs, strict=True)
    )
    has_prompts = any(row.prompt != prompt for row, prompt in zip(rows, prompts, strict=True))
    if (side != "response" and not has_prompts) or (side != "prompt" and not has_responses):
        return None
    if side != "response":
        rows = [replace(row, prompt=prompt) for row, prompt in zip(rows, prompts, strict=True)]
    if side != "prompt":
        rows = [replace(row, chosen=pair.chosen, rejected=pair.rejected) for row, pair in zip(rows, pairs, strict=True)]
    return rows
