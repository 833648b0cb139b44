"""Strict JSON for files that others may have written: what Python's parser lets through is refused here."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn

from rm_ood.errors import FormatError


def canonical_json(value: Any) -> str:
    """The one way of writing a value as JSON: ASCII, sorted keys, no spaces. NaN and infinity raise ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse_json(data: bytes, what: str, limit: int) -> Any:
    """Strict JSON: UTF-8, no NaN, Infinity or overflow, no doubled keys, no lone surrogates, bounded size and depth.

    Raises:
        FormatError: names `what` and the first thing that is wrong with it.
    """
    if len(data) > limit:
        raise FormatError(f"{what}: {len(data)} bytes of JSON, at most {limit} are read")
    try:
        value = json.loads(
            data.decode(),
            parse_constant=_no_constant,
            parse_int=_short_int,
            parse_float=_finite_float,
            object_pairs_hook=_unique_keys,
        )
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not strict JSON ({type(error).__name__}: {error})") from error
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _short_int(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number too large for a float")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {name[:100]!r} appears twice")
    return found
