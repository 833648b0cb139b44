"""Preference data in, (prompt, response, class) items out.

Takes everything that TRL's `RewardTrainer` takes (dataset formats of TRL 1.16): preference rows with an explicit or an
implicit prompt, unpaired rows with a label, strings or message lists, and besides them plain `prompt`/`response` rows
for calibration and scoring. Sources are lists, `datasets.Dataset`, `IterableDataset`, any iterable of dicts, and paths to
JSONL(.gz) or Parquet.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from rm_ood.errors import InputError

Message = dict[str, str]
Text = str | list[Message]

CHOSEN, REJECTED = 0, 1
CLASSES = ("chosen", "rejected")
_DIALOGUE_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Item:
    """One prompt with one response.

    Attributes:
        prompt: a string or a message list.
        response: a string.
        label: 0 chosen, 1 rejected, None unknown.
        row_id: the row's own id, or its number in the source.
        group: value of the grouping column, if one was asked for.
        where: the field path that an error names, such as `rows[3].chosen`.
    """

    prompt: Text
    response: str
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

    def items(self, row: Mapping[str, Any], number: int) -> list[Item]:
        """Items of one row: one per response.

        Raises:
            InputError: missing or empty columns, values of another type, chosen equal to rejected.
        """
        where = f"rows[{number}]"
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
        items = []
        for name, value, label in responses:
            response = check_response(value, f"{where}.{name}", max_chars=self.max_chars)
            items.append(Item(prompt, response, label, row_id, group, f"{where}.{name}"))
        chosen = {item.response for item in items if item.label == CHOSEN}
        if self.require_labels and any(item.label == REJECTED and item.response in chosen for item in items):
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


def check_prompt(value: Any, where: str, *, allow_empty: bool = False, max_chars: int = 200_000) -> Text:
    """A prompt as a string or as a list of `{"role", "content"}` messages.

    Raises:
        InputError: another type, a message without role or text, an empty prompt, a text past `max_chars`.
    """
    if isinstance(value, str):
        _check_string(value, where, max_chars)
        if not value.strip() and not allow_empty:
            raise InputError(f"{where}: empty. Pass allow_empty=True if empty prompts are part of your traffic.")
        return value
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: expected str or a list of messages, got {_kind(value)}")
    messages = [_check_message(message, f"{where}[{i}]", max_chars) for i, message in enumerate(value)]
    size = sum(len(m["content"]) for m in messages)
    if size > max_chars:
        raise InputError(
            f"{where}: {size} characters in {len(messages)} messages; the limit is max_chars={max_chars}. Cut the dialogue, "
            "or raise max_chars."
        )
    if not allow_empty and not any(m["content"].strip() for m in messages):
        raise InputError(f"{where}: no text in {len(messages)} messages. Pass allow_empty=True if that can happen.")
    return messages


def check_response(value: Any, where: str, *, max_chars: int = 200_000) -> str:
    """A response as a string; a message list must hold one assistant message.

    Raises:
        InputError: another type, several messages, a text past `max_chars`. An empty response is allowed.
    """
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise InputError(
                f"{where}: expected one assistant message, got {len(value)}; earlier turns belong to prompt"
            )
        message = _check_message(value[0], f"{where}[0]", max_chars)
        if message["role"] != "assistant":
            raise InputError(f"{where}[0].role: expected 'assistant', got another role")
        return message["content"]
    if not isinstance(value, str):
        raise InputError(f"{where}: expected str, got {_kind(value)}")
    _check_string(value, where, max_chars)
    return value


def _check_message(message: Any, where: str, max_chars: int) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: expected a message with role and content, got {_kind(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InputError(f"{where}.role: expected str, got {_kind(role)}")
    if not isinstance(content, str):
        raise InputError(
            f"{where}.content: expected str, got {_kind(content)}. Join the text of typed blocks first; "
            "tool calls and images are not scored."
        )
    _check_string(content, f"{where}.content", max_chars)
    others = sorted(str(k) for k, v in message.items() if k not in ("role", "content") and v)
    if others:
        raise InputError(f"{where}: {others} would not be scored. Leave them out, or write them into content.")
    return {"role": role, "content": content}


def _check_string(text: str, where: str, max_chars: int) -> None:
    if len(text) > max_chars:
        raise InputError(
            f"{where}: {len(text)} characters; the limit is max_chars={max_chars}. Cut it, or raise max_chars."
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: lone surrogate at character {error.start}: not valid Unicode text") from error


def _kind(value: Any) -> str:
    size = f" of length {len(value)}" if isinstance(value, (str, bytes, list, tuple, Mapping)) else ""
    return "None" if value is None else type(value).__name__ + size


def parse_dialogue(text: str) -> list[Message] | None:
    """Messages of a `Human: ...`/`Assistant: ...` string (the hh-rlhf format), or None where it is not one."""
    parts = _DIALOGUE_TURN.split("\n\n" + text.strip("\n"))
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        return None
    turns = list(zip(parts[1::2], parts[2::2], strict=True))
    if turns[-1][0] == "Assistant" and not turns[-1][1].strip():
        # A prompt that ends in `Assistant:` asks for that turn; it does not hold it.
        turns.pop()
    return [{"role": _ROLES[speaker], "content": content.strip()} for speaker, content in turns]


def prompt_key(prompt: Text) -> int:
    """64-bit key of a prompt: equal for prompts whose answers are not independent draws.

    The key hashes the first user turn, Unicode-normalised (NFKC), case-folded, white space collapsed: dialogues that open
    alike are one prompt, so they never straddle fit and calibration (NOTES on clustering: chosen and rejected of one prompt
    have distances that correlate at .6).
    """
    messages = parse_dialogue(prompt) if isinstance(prompt, str) else prompt
    if messages:
        first = next((m["content"] for m in messages if m["role"] == "user"), messages[0]["content"])
    else:
        first = prompt if isinstance(prompt, str) else ""
    return stable_hash(" ".join(unicodedata.normalize("NFKC", first).casefold().split()))


def stable_hash(text: str, seed: int = 0) -> int:
    """Seeded 64-bit hash that is the same in every process and on every machine (BLAKE2b)."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=seed.to_bytes(8, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


def hash_fraction(key: int, seed: int) -> float:
    """A 64-bit key as a seeded uniform number in [0, 1): decides the side of the split."""
    return stable_hash(f"{key:016x}", seed) / 2**64
