"""Verdict rows of `rm-ood check` and of the server, read back into `Decisions`; what is not as documented is refused.

The same row everywhere: `Decision.to_dict()` with an id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rm_ood.decision import AxisDecisions, ChannelDecisions, Decisions
from rm_ood.errors import EngineError
from rm_ood.preferences import CLASSES

Floats = NDArray[np.float64]


def read_rows(
    rows: Any, ids: Sequence[str], prompt_index: NDArray[np.int64], *, alpha: float = float("nan")
) -> Decisions:
    """Verdicts on n items from the rows that were answered for them.

    A score that is null is +inf and a reward that is null is NaN, as the guard had them; both only where the item is flagged:
    what could not be scored is never normal. Rows do not tell the calibration.

    Args:
        rows: n rows in the order of the items.
        ids: the items' ids, which the rows have to carry.
        prompt_index: (n,) which prompt of the call an item belongs to.
        alpha: level of the flags, where it is known: each has to be `p_value <= alpha`.
    Raises:
        EngineError: another count or order, a field that is missing or of another type, a number that is not finite, rows of
            different axes or channels, something unscored that is not flagged.
    """
    if not isinstance(rows, list) or len(rows) != len(ids):
        found = f"{len(rows)} rows" if isinstance(rows, list) else type(rows).__name__
        raise EngineError(f"results: {len(ids)} items were sent, the reply has {found}")
    read = [_Row(row, f"results[{i}]") for i, row in enumerate(rows)]
    for i, (row, name) in enumerate(zip(read, ids, strict=True)):
        if row.text("id") != name:
            raise EngineError(f"results[{i}].id: not that of the item that was sent there")
    p = np.array([row.share("p_value") for row in read], dtype=np.float64)
    flags = np.array([row.flag("is_ood") for row in read], dtype=bool)
    rewards = np.array([row.number("reward", np.nan) for row in read], dtype=np.float64)
    _flagged(~np.isfinite(rewards), flags, "reward")
    _at_level(p, flags, alpha, "")
    odds = [row.number("class_log_odds", np.nan) for row in read]
    nearest = [row.choice("nearest_class", CLASSES) for row in read]
    is_classed = any(index >= 0 for index in nearest)
    return Decisions(
        rewards=rewards,
        is_ood=flags,
        p_values=p,
        axes=_axes([row.object("axes") for row in read], alpha),
        nearest_class=np.array(nearest, dtype=np.int64) if is_classed else None,
        class_log_odds=np.array(odds, dtype=np.float64) if is_classed else None,
        reasons=tuple(row.texts("reasons") for row in read),
        truncated=np.array([row.flag("truncated") for row in read], dtype=bool),
        prompt_index=prompt_index,
        alpha=alpha,
    )


class _Row:
    """One JSON object and where it stands, with its fields by type."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise EngineError(f"{where}: expected an object, got {type(value).__name__}")
        self.value, self.where = value, where

    def _field(self, name: str) -> Any:
        if name not in self.value:
            raise EngineError(f"{self.where}.{name}: missing. Is another version of the guard served there?")
        return self.value[name]

    def _wrong(self, name: str, wanted: str) -> EngineError:
        # What came may be the text that was sent.
        return EngineError(f"{self.where}.{name}: expected {wanted}, got {type(self.value[name]).__name__}")

    def text(self, name: str) -> str:
        value = self._field(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._field(name)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self._wrong(name, "a list of strings")
        return tuple(value)

    def flag(self, name: str) -> bool:
        value = self._field(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def number(self, name: str, missing: float) -> float:
        """A finite number; `missing` for null."""
        value = self._field(name)
        if value is None:
            return missing
        if not _is_finite(value):
            raise self._wrong(name, "a finite number or null")
        return float(value)

    def share(self, name: str) -> float:
        value = self._field(name)
        if not _is_finite(value) or not 0 <= value <= 1:
            raise self._wrong(name, "a number in [0, 1]")
        return float(value)

    def numbers(self, name: str, missing: float) -> list[float] | None:
        value = self._field(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(v is None or _is_finite(v) for v in value):
            raise self._wrong(name, "null, or a list of finite numbers and nulls")
        return [missing if v is None else float(v) for v in value]

    def choice(self, name: str, choices: tuple[str, ...]) -> int:
        """Its place among the choices; -1 for null."""
        value = self._field(name)
        if value is not None and value not in choices:
            raise self._wrong(name, f"null or one of {choices}")
        return -1 if value is None else choices.index(value)

    def object(self, name: str) -> dict[str, _Row]:
        """Objects by name."""
        value = self._field(name)
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object")
        return {str(key): _Row(inner, f"{self.where}.{name}[{i}]") for i, (key, inner) in enumerate(value.items())}


def _axes(rows: list[dict[str, _Row]], alpha: float) -> dict[str, AxisDecisions]:
    axes = {}
    for name, column in _columns(rows, "axes").items():
        scores = np.array([row.number("ood_score", np.inf) for row in column], dtype=np.float64)
        p = np.array([row.share("p_value") for row in column], dtype=np.float64)
        flags = np.array([row.flag("is_ood") for row in column], dtype=bool)
        _flagged(~np.isfinite(scores), flags, "axes: ood_score")
        _at_level(p, flags, alpha, f"axes: {name}: ")
        channels = _columns([row.object("channels") for row in column], "channels")
        axes[name] = AxisDecisions(scores, p, flags, {key: _channel(rows) for key, rows in channels.items()})
    return axes


def _channel(rows: list[_Row]) -> ChannelDecisions:
    classes = [row.numbers("class_scores", np.inf) for row in rows]
    if len({None if values is None else len(values) for values in classes}) != 1:
        raise EngineError("results: class_scores of different lengths in one channel")
    return ChannelDecisions(
        scores=np.array([row.number("score", np.inf) for row in rows], dtype=np.float64),
        ood_scores=np.array([row.number("ood_score", np.inf) for row in rows], dtype=np.float64),
        p_values=np.array([row.share("p_value") for row in rows], dtype=np.float64),
        class_scores=None if classes[0] is None else np.array(classes, dtype=np.float64),
    )


def _columns(rows: list[dict[str, _Row]], what: str) -> dict[str, list[_Row]]:
    """Name -> its object in every row; the names have to be the same in all."""
    names = list(rows[0]) if rows else []
    if rows and (not names or any(row.keys() != rows[0].keys() for row in rows)):
        raise EngineError(f"results: expected the same {what}, at least one, in every row")
    return {name: [row[name] for row in rows] for name in names}


def _flagged(unscored: NDArray[np.bool_], flags: NDArray[np.bool_], what: str) -> None:
    if (unscored & ~flags).any():
        row = int(np.flatnonzero(unscored & ~flags)[0])
        raise EngineError(
            f"results[{row}]: {what} is null, and the item is not flagged: what has no score is never normal"
        )


def _at_level(p: Floats, flags: NDArray[np.bool_], alpha: float, where: str) -> None:
    if np.isfinite(alpha) and (flags != (p <= alpha)).any():
        raise EngineError(f"results: {where}flags that are not p_value <= {alpha}: another alpha is served there")


def _is_finite(value: Any) -> bool:
    return type(value) in (float, int) and bool(np.isfinite(value))
