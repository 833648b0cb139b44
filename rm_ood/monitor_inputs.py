"""What a traffic monitor is given: settings, scores and session keys, checked."""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rm_ood.errors import InputError

Floats = NDArray[np.float64]


def number(name: str, value: Any) -> float:
    """A setting as a float, which can be saved.

    Raises:
        InputError: not a number; names the setting.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise InputError(f"{name}={value!r}: expected a number")
    return float(value)


def one_column(values: ArrayLike, axis: str) -> Floats:
    """(m,) scores of one axis, from one score or (m,).

    Raises:
        InputError: no numbers, or another shape.
    """
    try:
        column = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"scores of {axis!r}: expected numbers ({error})") from error
    if column.ndim > 1:
        raise InputError(f"scores of {axis!r}: expected one score or (m,), got shape {column.shape}")
    return column.reshape(-1)


def session_key(key: Hashable | None) -> int | None:
    """64 bits of a session's name: what is kept, and saved, is not the name."""
    if key is None:
        return None
    key = _plain(key)
    data = key if isinstance(key, bytes) else str(key).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _plain(key: Any) -> str | bytes | int | tuple[Any, ...]:
    """A key without NumPy's types, which print otherwise inside a tuple."""
    if isinstance(key, tuple):
        return tuple(_plain(part) for part in key)
    if isinstance(key, (int, np.integer)):
        return int(key)
    if isinstance(key, str):
        return str(key)
    if isinstance(key, bytes):
        return bytes(key)
    raise InputError(f"sessions: expected strings, integers, bytes or tuples of those, got {type(key).__name__}")
