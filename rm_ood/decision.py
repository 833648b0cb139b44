"""Verdicts: one item's `Decision`, and `Decisions`, the same for many items as NumPy arrays.

One sign everywhere: a larger score is more out-of-distribution, a small p-value is out-of-distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from rm_ood.errors import InputError
from rm_ood.preferences import CLASSES

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class ChannelDecision:
    """One channel's view of an item.

    Attributes:
        score: in the detector's own unit (Mahalanobis: squared distance; contrasts: a ratio of two); larger = more OOD.
        ood_score: the score standardised for the span's length; comparable between channels.
        class_scores: squared distances to chosen and rejected, where the channel has classes.
        p_value: against the calibration prompts, this channel alone.
    """

    score: float
    ood_score: float
    p_value: float
    class_scores: tuple[float, ...] | None


@dataclass(frozen=True)
class AxisDecision:
    """The verdict on the prompt, the response, or the response given the prompt; `is_ood` is this axis alone at alpha."""

    ood_score: float
    p_value: float
    is_ood: bool
    channels: dict[str, ChannelDecision]


@dataclass(frozen=True)
class Decision:
    """The verdict on one item.

    Attributes:
        reward: what the reward model returned.
        is_ood: exactly `p_value <= alpha`.
        p_value: the item's, over all axes; calibration-conditional under a confidence.
        axes: axis -> its own verdict.
        nearest_class: `"chosen"` or `"rejected"`: the nearer class mean of the channel `final`.
        class_log_odds: (d_rejected - d_chosen) / 2 on `final`; positive = chosen-like.
        reasons: what the reader should know, such as `truncated`, `empty_response`, `non_finite`.
        truncated: tokens were cut to keep within the maximum length.
    """

    reward: float
    is_ood: bool
    p_value: float
    axes: dict[str, AxisDecision]
    nearest_class: str | None
    class_log_odds: float | None
    reasons: tuple[str, ...]
    truncated: bool

    def to_dict(self) -> dict[str, Any]:
        """The row that `rm-ood check` writes, without its id; numbers that JSON has no name for become null."""
        return {
            "reward": _json(self.reward),
            "is_ood": self.is_ood,
            "p_value": _json(self.p_value),
            "axes": {
                name: {
                    "ood_score": _json(axis.ood_score),
                    "p_value": _json(axis.p_value),
                    "is_ood": axis.is_ood,
                    "channels": {
                        key: {
                            "score": _json(c.score),
                            "ood_score": _json(c.ood_score),
                            "p_value": _json(c.p_value),
                            "class_scores": None if c.class_scores is None else [_json(v) for v in c.class_scores],
                        }
                        for key, c in axis.channels.items()
                    },
                }
                for name, axis in self.axes.items()
            },
            "nearest_class": self.nearest_class,
            "class_log_odds": None if self.class_log_odds is None else _json(self.class_log_odds),
            "reasons": list(self.reasons),
            "truncated": self.truncated,
        }


def _json(value: float) -> float | None:
    """JSON has no infinity or NaN: an unscorable item has null scores, its flag and its reasons."""
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True)
class ChannelDecisions:
    """`ChannelDecision` of n items: `scores`, `ood_scores`, `p_values` (n,), `class_scores` (n, k) or None."""

    scores: Floats
    ood_scores: Floats
    p_values: Floats
    class_scores: Floats | None

    def take(self, index: Any) -> ChannelDecisions:
        """The same for some of the items."""
        classes = None if self.class_scores is None else self.class_scores[index]
        return ChannelDecisions(self.scores[index], self.ood_scores[index], self.p_values[index], classes)


@dataclass(frozen=True)
class AxisDecisions:
    """`AxisDecision` of n items: `ood_scores`, `p_values`, `is_ood` (n,).

    Attributes:
        calibration: digest of the calibration scores that the axis was ranked among; empty where it is not known.
    """

    ood_scores: Floats
    p_values: Floats
    is_ood: Bools
    channels: dict[str, ChannelDecisions]
    calibration: str = ""

    def channel(self, name: str) -> ChannelDecisions:
        """One channel of this axis.

        Raises:
            InputError: the axis has no such channel; the message lists those it has.
        """
        if name not in self.channels:
            raise InputError(f"channel {name!r}: this axis has {sorted(self.channels)}")
        return self.channels[name]

    def take(self, index: Any) -> AxisDecisions:
        """The same for some of the items."""
        channels = {name: channel.take(index) for name, channel in self.channels.items()}
        flags = self.is_ood[index]
        return AxisDecisions(self.ood_scores[index], self.p_values[index], flags, channels, self.calibration)


@dataclass(frozen=True)
class Decisions:
    """Verdicts on n items; a sequence of `Decision`.

    Attributes:
        rewards: (n,) float, NaN where none came.
        is_ood: (n,) bool, exactly `p_values <= alpha`.
        p_values: (n,) float.
        axes: axis -> arrays.
        nearest_class: (n,) int, index into `classes`, -1 for an item that could not be scored; None where `final` was not
            given or has one class.
        class_log_odds: (n,) float; None where `final` was not given or has one class.
        reasons: n tuples of reason codes.
        truncated: (n,) bool.
        prompt_index: (n,) int: which prompt of the call an item belongs to: items with equal prompts have one number. Each item
            has its own where prompts are not known (vectors and tensors without `prompts=`).
        alpha: the level of `is_ood`.
    """

    rewards: Floats
    is_ood: Bools
    p_values: Floats
    axes: dict[str, AxisDecisions]
    nearest_class: NDArray[np.int64] | None
    class_log_odds: Floats | None
    reasons: tuple[tuple[str, ...], ...]
    truncated: Bools
    prompt_index: NDArray[np.int64]
    alpha: float
    classes: tuple[str, ...] = field(default=CLASSES)

    def axis(self, name: str) -> AxisDecisions:
        """One axis.

        Raises:
            InputError: the guard does not judge that axis.
        """
        if name not in self.axes:
            raise InputError(f"axis {name!r}: this guard judges {sorted(self.axes)}")
        return self.axes[name]

    def __len__(self) -> int:
        return len(self.p_values)

    @overload
    def __getitem__(self, index: int) -> Decision: ...
    @overload
    def __getitem__(self, index: slice | NDArray[Any] | list[int]) -> Decisions: ...
    def __getitem__(self, index: Any) -> Decision | Decisions:
        if isinstance(index, (int, np.integer)):
            return self._one(range(len(self))[index])
        rows = np.arange(len(self))[index]
        return Decisions(
            rewards=self.rewards[rows],
            is_ood=self.is_ood[rows],
            p_values=self.p_values[rows],
            axes={name: axis.take(rows) for name, axis in self.axes.items()},
            nearest_class=None if self.nearest_class is None else self.nearest_class[rows],
            class_log_odds=None if self.class_log_odds is None else self.class_log_odds[rows],
            reasons=tuple(self.reasons[i] for i in rows),
            truncated=self.truncated[rows],
            prompt_index=self.prompt_index[rows],
            alpha=self.alpha,
            classes=self.classes,
        )

    def __iter__(self) -> Iterator[Decision]:
        return (self._one(i) for i in range(len(self)))

    def _one(self, i: int) -> Decision:
        axes = {}
        for name, axis in self.axes.items():
            channels = {
                key: ChannelDecision(
                    score=float(c.scores[i]),
                    ood_score=float(c.ood_scores[i]),
                    p_value=float(c.p_values[i]),
                    class_scores=None if c.class_scores is None else tuple(map(float, c.class_scores[i])),
                )
                for key, c in axis.channels.items()
            }
            axes[name] = AxisDecision(
                float(axis.ood_scores[i]), float(axis.p_values[i]), bool(axis.is_ood[i]), channels
            )
        return Decision(
            reward=float(self.rewards[i]),
            is_ood=bool(self.is_ood[i]),
            p_value=float(self.p_values[i]),
            axes=axes,
            nearest_class=None if self.nearest_class is None else self._class_name(int(self.nearest_class[i])),
            class_log_odds=None if self.class_log_odds is None else float(self.class_log_odds[i]),
            reasons=self.reasons[i],
            truncated=bool(self.truncated[i]),
        )

    def _class_name(self, index: int) -> str | None:
        return None if index < 0 else self.classes[index]

    def to_dict(self) -> dict[str, list[Any]]:
        """Column -> list, one entry per item; nested columns hold the items' own dictionaries."""
        rows = [decision.to_dict() for decision in self]
        names = rows[0] if rows else dict.fromkeys(_COLUMNS)
        return {name: [row[name] for row in rows] for name in names}

    def to_pandas(self) -> Any:
        """One row per item, flat columns such as `response.p_value` and `response.final.score`.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError("to_pandas() needs pandas: pip install pandas") from error
        return pandas.DataFrame(self._flat())

    def _flat(self) -> Mapping[str, Any]:
        columns: dict[str, Any] = {"reward": self.rewards, "is_ood": self.is_ood, "p_value": self.p_values}
        for name, axis in self.axes.items():
            columns |= {f"{name}.ood_score": axis.ood_scores, f"{name}.p_value": axis.p_values}
            columns[f"{name}.is_ood"] = axis.is_ood
            for key, channel in axis.channels.items():
                columns |= {f"{name}.{key}.score": channel.scores, f"{name}.{key}.p_value": channel.p_values}
        if self.nearest_class is not None:
            columns["nearest_class"] = [self._class_name(int(i)) for i in self.nearest_class]
        if self.class_log_odds is not None:
            columns["class_log_odds"] = self.class_log_odds
        columns |= {"reasons": list(self.reasons), "truncated": self.truncated, "prompt_index": self.prompt_index}
        return columns


_COLUMNS = (
    "reward", "is_ood", "p_value", "axes", "nearest_class", "class_log_odds", "reasons", "truncated",
)  # fmt: skip
