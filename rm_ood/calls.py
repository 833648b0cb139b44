"""What `OODGuard.check` was called with, in its many forms, as one flat list of items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rm_ood.config import GuardConfig
from rm_ood.errors import InputError
from rm_ood.preferences import Text, check_prompt, check_response


@dataclass(frozen=True)
class Call:
    """Items of a call: (prompt, response) each, the prompt each belongs to, and whether one verdict was asked for."""

    items: list[tuple[Text, str]]
    prompt_index: NDArray[np.int64]
    is_single: bool


def read_call(prompt: Any, response: Any, config: GuardConfig) -> Call:
    """Read one item, lists of items, or prompts with several answers each.

    Raises:
        InputError: names the field (`items[3].response[1]`), what came, and the remedy.
    """
    is_single = isinstance(response, str) or _is_messages(response)
    prompts, answers = ([prompt], [response]) if is_single else _pairs(prompt, response)
    items: list[tuple[Text, str]] = []
    index: list[int] = []
    for i, (one, given) in enumerate(zip(prompts, answers, strict=True)):
        where = "" if is_single else f"items[{i}]."
        text = check_prompt(one, f"{where}prompt", allow_empty=config.allow_empty, max_chars=config.max_chars)
        several = isinstance(given, (list, tuple)) and not _is_messages(given)
        for j, answer in enumerate(given if several else [given]):
            name = f"{where}response{f'[{j}]' if several else ''}"
            items.append((text, check_response(answer, name, max_chars=config.max_chars)))
            index.append(i)
    return Call(items, np.array(index, dtype=np.int64), is_single)


def _is_messages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _is_sequence(value: Any) -> bool:
    """Lists, tuples, arrays, columns of a data set."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, bytes, Mapping))


def _pairs(prompt: Any, response: Any) -> tuple[list[Any], list[Any]]:
    """Prompts and responses side by side; one prompt with a list of answers is one pair."""
    if not _is_sequence(response):
        raise InputError(f"response: expected str or a list, got {type(response).__name__}")
    if isinstance(prompt, str) or _is_messages(prompt):
        return [prompt], [list(response)]
    if not _is_sequence(prompt):
        raise InputError(f"prompt: expected str, messages or a list of those, got {type(prompt).__name__}")
    if len(prompt) != len(response):
        raise InputError(f"{len(prompt)} prompts and {len(response)} responses: expected as many of each")
    return list(prompt), list(response)
