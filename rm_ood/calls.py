"""What `OODGuard.check` and `check_embeddings` were called with, in their many forms, as one."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rm_ood.channels import FINAL, Channel
from rm_ood.config import GuardConfig
from rm_ood.dialogue import Dialogue, Response, Text, check_dialogue, check_prompt, check_response, messages_of
from rm_ood.embed import Embedded
from rm_ood.errors import InputError
from rm_ood.vectors import as_tensor, as_vectors


@dataclass(frozen=True)
class Call:
    """Items of a call: (prompt, response) each, the prompt each belongs to, and whether one verdict was asked for.

    `prompt_index` is the prompt's place in the call where prompts come with several answers each, and otherwise the number of
    the prompt among those that differ, in the order they come: one prompt, listed once for each of its answers, is one.
    """

    items: list[tuple[Text, Response]]
    prompt_index: NDArray[np.int64]
    is_single: bool


def read_call(
    prompt: Any, response: Any, config: GuardConfig, *, tools: Any = None, template_kwargs: Any = None
) -> Call:
    """Read one item, lists of items, or prompts with several answers each.

    Args:
        tools, template_kwargs: for every prompt of the call (see `Dialogue`).

    Raises:
        InputError: names the field (`items[3].response[1]`), what came, and the remedy.
    """
    is_single = isinstance(response, str) or _is_messages(response)
    prompts, answers = ([prompt], [response]) if is_single else _pairs(prompt, response)
    items: list[tuple[Text, Response]] = []
    index: list[int] = []
    flat: list[int] = []
    numbers: dict[str, int] = {}
    is_nested = False
    for i, (one, given) in enumerate(zip(prompts, answers, strict=True)):
        where = "" if is_single else f"items[{i}]."
        text = check_prompt(one, f"{where}prompt", allow_empty=config.allow_empty, max_chars=config.max_chars)
        if tools or template_kwargs:
            if isinstance(text, Dialogue):
                raise InputError(f"{where}prompt: a Dialogue brings its own tools and keywords; pass them there only")
            text = check_dialogue(text, tools, template_kwargs, "", max_chars=config.max_chars)
        several = isinstance(given, (list, tuple)) and not _is_messages(given)
        is_nested |= several
        number = numbers.setdefault(_asked(text), len(numbers))
        for j, answer in enumerate(given if several else [given]):
            name = f"{where}response{f'[{j}]' if several else ''}"
            items.append((text, check_response(answer, name, max_chars=config.max_chars)))
            index.append(i)
            flat.append(number)
    return Call(items, np.array(index if is_nested else flat, dtype=np.int64), is_single)


def read_vectors(
    embeddings: Any, rewards: Any, lengths: Any
) -> tuple[dict[str, Tensor], NDArray[np.float64] | None, Embedded]:
    """What `OODGuard.check_embeddings` was called with: vectors by channel, rewards if any, and the rest.

    Raises:
        InputError: arrays that are no vectors, or whose lengths differ.
    """
    given = embeddings if isinstance(embeddings, Mapping) else {FINAL: embeddings}
    vectors = {str(Channel.parse(name)): as_vectors(x, name=f"embeddings[{name!r}]") for name, x in given.items()}
    sizes = {name: tuple(x.shape) for name, x in vectors.items()}
    n = next(iter(sizes.values()))[0] if sizes else 0
    if not sizes or any(shape[0] != n for shape in sizes.values()):
        raise InputError(f"embeddings: expected (n, H) for every channel with one n, got {sizes}")
    values = None if rewards is None else as_tensor(rewards, name="rewards").detach().double().cpu().numpy().reshape(-1)
    if values is not None and len(values) != n:
        raise InputError(f"rewards: expected {n} values, one per vector, got {len(values)}")
    spans = None if lengths is None else np.asarray(lengths, dtype=np.int64)
    if spans is not None and (spans.shape != (n, 2) or spans.min(initial=0) < 0):
        raise InputError(f"lengths: expected counts of shape ({n}, 2), prompt and response tokens, got {spans.shape}")
    part = Embedded(
        vectors={},
        rewards=np.full(n, np.nan) if values is None else values,
        lengths=spans,
        failed=[None] * n if values is None else ["non_finite" if bad else None for bad in ~np.isfinite(values)],
        reasons=[()] * n,
        truncated=np.zeros(n, dtype=bool),
    )
    return vectors, values, part


def prompt_numbers(prompts: Any, n: int) -> NDArray[np.int64] | None:
    """Which prompt each of n items belongs to: equal keys are one prompt, numbered in the order they come.

    Args:
        prompts: n keys, such as numbers or the prompts themselves (strings, messages); None where they are not known.
    Raises:
        InputError: another number of keys, or none that can be compared.
    """
    if prompts is None:
        return None
    if not _is_sequence(prompts) or len(prompts) != n:
        found = f"{len(prompts)} of them" if _is_sequence(prompts) else type(prompts).__name__
        raise InputError(f"prompts: expected one key per item, {n} of them, got {found}")
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(_prompt_name(key, i), len(numbers)) for i, key in enumerate(prompts)], np.int64)


def _prompt_name(key: Any, i: int) -> Hashable:
    if isinstance(key, (int, np.integer)) or (
        isinstance(key, Tensor) and key.ndim == 0 and not key.is_floating_point()
    ):
        return int(key)
    if isinstance(key, (str, Dialogue)) or _is_messages(key):
        return _asked(key)
    raise InputError(f"prompts[{i}]: expected a whole number, a string or messages, got {type(key).__name__}")


def _asked(prompt: Text) -> str:
    """Equal for prompts that ask the same in the same words: messages, tools and template keywords."""
    beside = [prompt.tools, prompt.template_kwargs] if isinstance(prompt, Dialogue) else [[], {}]
    return json.dumps([messages_of(prompt), *beside], sort_keys=True)


def _is_messages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _is_sequence(value: Any) -> bool:
    """Lists, tuples, arrays, columns of a data set."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, bytes, Mapping))


def _pairs(prompt: Any, response: Any) -> tuple[list[Any], list[Any]]:
    """Prompts and responses side by side; one prompt with a list of answers is one pair."""
    if not _is_sequence(response):
        raise InputError(f"response: expected str or a list, got {type(response).__name__}")
    if isinstance(prompt, (str, Dialogue)) or _is_messages(prompt):
        return [prompt], [list(response)]
    if not _is_sequence(prompt):
        raise InputError(f"prompt: expected str, messages or a list of those, got {type(prompt).__name__}")
    if len(prompt) != len(response):
        raise InputError(f"{len(prompt)} prompts and {len(response)} responses: expected as many of each")
    return list(prompt), list(response)
