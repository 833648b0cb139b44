"""Preference data in, (prompt, response, class) items out.

Takes everything that TRL's `RewardTrainer` takes (dataset formats of TRL 1.16): preference rows with an explicit or an
implicit prompt, unpaired rows with a label, strings or message lists, `tools` and `chat_template_kwargs` beside them, and
plain `prompt`/`response` rows for calibration and scoring. Sources are lists, `datasets.Dataset`, `IterableDataset`, any
iterable of dicts, and paths to JSONL(.gz) or Parquet.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rm_ood.dialogue import (
    Response,
    Text,
    check_dialogue,
    check_prompt,
    check_response,
    content_text,
    messages_of,
    response_text,
)
from rm_ood.errors import InputError

CHOSEN, REJECTED = 0, 1
CLASSES = ("chosen", "rejected")


@dataclass(frozen=True)
class Item:
    """One prompt with one response.

    Attributes:
        prompt: a string, a message list, or a `Dialogue` where the row has tools or template keywords.
        response: a string, or an assistant message with more in it than text.
        label: 0 chosen, 1 rejected, None unknown.
        row_id: the row's own id, or its number in the source.
        group: value of the grouping column, if one was asked for.
        where: the field path that an error names, such as `rows[3].chosen`.
    """

    prompt: Text
    response: Response
    label: int | None
    row_id: str
    group: str | None
    where: str


@dataclass(frozen=True)
class RowReader:
    """Turns rows into items; the rules of the columns are here and nowhere else.

    Args:
        require_labels: whether every item needs a class (fit) or not (calibrate, check).
        group_column: name of a column to carry as the item's group.
        allow_empty: accept an empty or white-space prompt.
        max_chars: longest text accepted, in characters; tokenizing more would block for seconds.
    """

    require_labels: bool
    group_column: str | None = None
    allow_empty: bool = False
    max_chars: int = 200_000

    def items(self, row: Mapping[str, Any], number: int, where: str | None = None) -> list[Item]:
        """Items of one row: one per response.

        Args:
            number: of the row in its source, which is its id where it has none of its own.
            where: what an error calls the row; `rows[number]` by default.
        Raises:
            InputError: missing or empty columns, values of another type, chosen equal to rejected.
        """
        where = f"rows[{number}]" if where is None else where
        prompt, responses = self._responses(row, where)
        if prompt is None:
            prompt, responses = _split_implicit(responses, where)
        group = None
        if self.group_column is not None:
            if row.get(self.group_column) is None:
                raise InputError(f"{where}: no value in the grouping column {self.group_column!r}; {_columns(row)}")
            group = str(row[self.group_column])
        row_id = str(row["id"]) if row.get("id") is not None else str(number)
        prompt = check_prompt(prompt, f"{where}.prompt", allow_empty=self.allow_empty, max_chars=self.max_chars)
        prompt = check_dialogue(
            prompt, row.get("tools"), row.get("chat_template_kwargs"), f"{where}.", max_chars=self.max_chars
        )
        items = []
        for name, value, label in responses:
            response = check_response(value, f"{where}.{name}", max_chars=self.max_chars)
            items.append(Item(prompt, response, label, row_id, group, f"{where}.{name}"))
        chosen = {response_text(item.response) for item in items if item.label == CHOSEN}
        same = any(item.label == REJECTED and response_text(item.response) in chosen for item in items)
        if self.require_labels and same:
            raise InputError(f"{where}: chosen and rejected are the same text; on_bad='drop' leaves such rows out")
        return items

    def _responses(self, row: Mapping[str, Any], where: str) -> tuple[Any, list[tuple[str, Any, int | None]]]:
        has = {name for name in row if row[name] is not None}
        if "chosen" in has and "rejected" in has:
            rejected = row["rejected"]
            several = isinstance(rejected, (list, tuple)) and bool(rejected) and not isinstance(rejected[0], Mapping)
            listed = list(rejected) if several else [rejected]
            names = [f"rejected[{i}]" for i in range(len(listed))] if several else ["rejected"]
            labelled: list[tuple[str, Any, int | None]] = [("chosen", row["chosen"], CHOSEN)]
            labelled += [(name, value, REJECTED) for name, value in zip(names, listed, strict=True)]
            return row.get("prompt"), labelled
        name = next((n for n in ("completion", "response") if n in has), None)
        if "prompt" in has and name is not None:
            label = row.get("label")
            if label is None and self.require_labels:
                raise InputError(
                    f"{where}: no label. fit() needs chosen and rejected responses: columns prompt/chosen/rejected, "
                    f"or prompt/{name}/label (true = chosen). {_columns(row)}"
                )
            return row["prompt"], [(name, row[name], None if label is None else _label(label, where))]
        wanted = "prompt/chosen/rejected" if self.require_labels else "prompt/chosen/rejected or prompt/response"
        raise InputError(f"{where}: needs columns {wanted} with values. {_columns(row)}")


def named_items(
    rows: Iterable[Mapping[str, Any]], reader: RowReader, after_row: Callable[[int], object]
) -> Iterator[tuple[str, Item]]:
    """(id, item) of all rows: the row's id (its own, or its number), with `#chosen` and the like where it has several.

    Args:
        after_row: told 1 after each row, such as a progress bar's `update`.
    """
    for number, row in enumerate(rows):
        yield from names(reader.items(row, number))
        after_row(1)


def names(items: Sequence[Item]) -> Iterator[tuple[str, Item]]:
    """(id, item) of the items of one row."""
    for item in items:
        field = item.where.rpartition("].")[2]
        yield (item.row_id if len(items) == 1 else f"{item.row_id}#{field}"), item


def _label(value: Any, where: str) -> int:
    if isinstance(value, (bool, int)) and value in (0, 1):
        return CHOSEN if value else REJECTED
    raise InputError(f"{where}.label: expected true (chosen) or false (rejected), got {type(value).__name__}")


_GUESSES = {
    "question": "prompt", "instruction": "prompt", "input": "prompt", "query": "prompt", "accepted": "chosen",
    "preferred": "chosen", "chosen_response": "chosen", "rejected_response": "rejected", "dispreferred": "rejected",
    "answer": "response", "output": "response", "text": "response",
}  # fmt: skip


def _columns(row: Mapping[str, Any]) -> str:
    columns = sorted(map(str, row))
    guesses = [f"{name} -> {_GUESSES[name]}" for name in columns if name in _GUESSES]
    empty = [name for name in columns if row[name] is None]
    hint = f" Did you mean {', '.join(guesses)}? Rename the columns." if guesses else ""
    return f"Columns found: {columns[:20]}{f'; empty: {empty}' if empty else ''}.{hint}"


def _split_implicit(
    responses: list[tuple[str, Any, int | None]], where: str
) -> tuple[Text, list[tuple[str, Any, int | None]]]:
    """Implicit prompt: what the whole dialogues share, up to the last assistant turn."""
    split: list[tuple[Any, Any]]
    if all(isinstance(value, (list, tuple)) for _, value, _ in responses):
        split = [(list(value[:-1]), list(value[-1:])) for _, value, _ in responses]
    elif all(isinstance(value, str) for _, value, _ in responses):
        split = [_split_string(value, f"{where}.{name}") for name, value, _ in responses]
        if all(tail[:1] in ("", " ") for _, tail in split):
            # The space after the marker is the dialogue's, not the response's.
            split = [(f"{head} ", tail[1:]) for head, tail in split]
    else:
        kinds = sorted({type(value).__name__ for _, value, _ in responses})
        raise InputError(f"{where}: no prompt column, and chosen and rejected are not all of one kind: {kinds}")
    prompt = split[0][0]
    if any(other != prompt for other, _ in split) or not prompt:
        raise InputError(
            f"{where}: no prompt column, and chosen and rejected do not share a dialogue up to their last assistant turn. "
            "Add a prompt column."
        )
    named = [(name, tail, label) for (name, _, label), (_, tail) in zip(responses, split, strict=True)]
    return cast(Text, prompt), named


def _split_string(text: str, where: str) -> tuple[str, str]:
    before, marker, after = text.rpartition("\n\nAssistant:")
    if not marker:
        raise InputError(
            f"{where}: no prompt column, and the text has no 'Assistant:' turn to split at. Add a prompt column."
        )
    # The marker stays in the prompt: prompt + response is the text that the reward model was trained on.
    return before + marker, after


def prompt_key(prompt: Text) -> int:
    """64-bit key of a prompt: equal for prompts whose answers are not independent draws.

    The key hashes the first user turn, Unicode-normalised (NFKC), case-folded, white space collapsed: dialogues that open
    alike are one prompt, so they never straddle fit and calibration (NOTES on clustering: chosen and rejected of one prompt
    have distances that correlate at .6).
    """
    messages = messages_of(prompt)
    turns = [*(m for m in messages if m["role"] == "user"), *messages]
    first = content_text(turns[0]) if turns else ""
    return stable_hash(" ".join(unicodedata.normalize("NFKC", first).casefold().split()))


def stable_hash(text: str, seed: int = 0) -> int:
    """Seeded 64-bit hash that is the same in every process and on every machine (BLAKE2b)."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=seed.to_bytes(8, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


def hash_fraction(key: int, seed: int) -> float:
    """A 64-bit key as a seeded uniform number in [0, 1): decides the side of the split."""
    return stable_hash(f"{key:016x}", seed) / 2**64
