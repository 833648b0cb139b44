"""Where a traffic monitor stands, and what it reads of verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rm_ood.conformal import ALL
from rm_ood.flag_rate import FlagRate

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class AxisScores(Protocol):
    """OOD scores of n items on one axis, as `AxisDecisions` has them."""

    @property
    def ood_scores(self) -> Floats:
        """(n,) larger = more OOD."""


class Verdicts(Protocol):
    """What the monitor reads of a `Decisions`."""

    @property
    def axes(self) -> Mapping[str, Any]:
        """Axis -> `AxisScores`."""

    @property
    def is_ood(self) -> Bools:
        """(n,) flags."""

    @property
    def prompt_index(self) -> NDArray[np.int64]:
        """(n,) which prompt of the call an item belongs to."""


@dataclass(frozen=True)
class AxisEvidence:
    """One axis' own evidence of a change, before axes are joined; 1 when nothing has come.

    Attributes:
        e_value, recurring_value: of the lifetime and of the recurring alarm.
        higher, lower: the lifetime evidence by the bets on larger and on smaller scores alone.
    """

    e_value: float
    recurring_value: float
    higher: float
    lower: float


class Change(NamedTuple):
    """What an alarm was about: an axis' scores, `"larger"` or `"smaller"` than the calibration data's when it came."""

    axis: str
    side: str

    def __str__(self) -> str:
        what = "scores" if self.axis == ALL else f"{self.axis} scores"
        return f"the traffic's {what} are {self.side} than the calibration data's"


@dataclass(frozen=True)
class MonitorState:
    """Where a `TrafficMonitor` stands.

    Attributes:
        requests: items seen. counted: those that were betted on, one per session. unscored: those without a finite score.
        e_value: evidence that the traffic has changed at some time.
        threshold: what `e_value` has to reach.
        alarm: it has reached it once; with probability 1 / lifetime at most it ever does on clean traffic.
        alarm_at, alarm_of: the counted item at which it first did, from 1, and what had changed there.
        recurring_value, recurring_threshold: evidence of a change that is recent, begun anew after each alarm.
        recurring_alarm: the update that returned this state made it alarm.
        recurring_alarms, last_recurring_at, last_recurring_of: how often it did in all, when last, and of what.
        axes: axis -> its evidence.
        flag_rate: flags so far; None where the monitor was given none and has too few calibration scores to flag.
    """

    requests: int
    counted: int
    unscored: int
    e_value: float
    threshold: float
    alarm: bool
    alarm_at: int | None
    alarm_of: Change | None
    recurring_value: float
    recurring_threshold: float
    recurring_alarm: bool
    recurring_alarms: int
    last_recurring_at: int | None
    last_recurring_of: Change | None
    axes: dict[str, AxisEvidence]
    flag_rate: FlagRate | None

    @property
    def message(self) -> str | None:
        """What to tell a person; None while there is nothing to tell."""
        parts = []
        if self.alarm:
            evidence = f"evidence now {self.e_value:.3g}, threshold {self.threshold:g}"
            parts.append(f"{self.alarm_of}: since item {self.alarm_at} ({evidence})")
        if self.recurring_alarms:
            told = "" if self.alarm and self.last_recurring_of == self.alarm_of else f"{self.last_recurring_of}: "
            parts.append(f"{told}recurring alarm {self.recurring_alarms} at item {self.last_recurring_at}")
        if self.flag_rate is not None and self.flag_rate.alarm:
            low, high = self.flag_rate.band()
            parts.append(
                f"{100 * self.flag_rate.rate:.3g} % of {self.flag_rate.n} items are flagged (95 % band {100 * low:.3g} to "
                f"{100 * high:.3g} %), more than {100 * self.flag_rate.budget:.3g} %"
            )
        return "; ".join(parts) or None
