"""Where a traffic monitor stands, and what it reads of verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

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


@dataclass(frozen=True)
class MonitorState:
    """Where a `TrafficMonitor` stands.

    Attributes:
        requests: items seen. counted: those that were betted on, one per session. unscored: those without a finite score.
        e_value: evidence that the traffic has changed at some time.
        threshold: what `e_value` has to reach.
        alarm: it has reached it once; with probability 1 / lifetime at most it ever does on clean traffic.
        alarm_at: the counted item at which it first did, from 1.
        recurring_value, recurring_threshold: evidence of a change that is recent, begun anew after each alarm.
        recurring_alarm: the update that returned this state made it alarm.
        recurring_alarms, last_recurring_at: how often it did in all, and when last.
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
    recurring_value: float
    recurring_threshold: float
    recurring_alarm: bool
    recurring_alarms: int
    last_recurring_at: int | None
    axes: dict[str, AxisEvidence]
    flag_rate: FlagRate | None

    @property
    def message(self) -> str | None:
        """What to tell a person; None while there is nothing to tell."""
        parts = []
        if self.alarm:
            parts.append(f"since item {self.alarm_at} (evidence now {self.e_value:.3g}, threshold {self.threshold:g})")
        if self.recurring_alarms:
            parts.append(f"recurring alarm {self.recurring_alarms} at item {self.last_recurring_at}")
        if parts:
            name, axis = max(self.axes.items(), key=lambda pair: pair[1].e_value)
            what = "scores" if name == ALL else f"{name} scores"
            side = "larger" if axis.higher >= axis.lower else "smaller"
            parts[0] = f"the traffic's {what} are {side} than the calibration data's: {parts[0]}"
        if self.flag_rate is not None and self.flag_rate.alarm:
            low, high = self.flag_rate.band()
            parts.append(
                f"{100 * self.flag_rate.rate:.3g} % of {self.flag_rate.n} items are flagged (95 % band {100 * low:.3g} to "
                f"{100 * high:.3g} %), more than {100 * self.flag_rate.budget:.3g} %"
            )
        return "; ".join(parts) or None
