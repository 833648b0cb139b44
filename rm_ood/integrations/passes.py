"""`PassMonitor`: the traffic alarm of a training run that comes back to its prompts."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike, NDArray

from rm_ood.errors import FormatError
from rm_ood.flag_rate import FlagRate
from rm_ood.monitor import TrafficMonitor
from rm_ood.monitor_file import read_monitor, write_monitor
from rm_ood.monitor_state import Change, MonitorState


class PassMonitor:
    """A `TrafficMonitor` for each pass over the prompts, as one alarm.

    Answers to one prompt are not independent, so a monitor counts each prompt once, and hears nothing of a hack that begins
    when all prompts were seen. Here every pass has a monitor of its own. With clean traffic, that of pass j = 1, 2, ...
    ever alarms with probability 1 / A_j at most, however much its items have in common with those of other passes. With
    A_j = A j (j + 1), by a union bound,

        P(any of them ever alarms) <= sum_j 1 / A_j = (1 / A) sum_j (1 / j - 1 / (j + 1)) <= 1 / A

    for any number of passes. The price: pass 1 needs twice, pass 3 twelve times the evidence of a monitor alone. The flag
    rate's alarm is bounded alike. The recurring alarm begins anew with each pass, at the same threshold R:
    P(a false one within T items) <= sum_j T_j / R = T / R, which leaves a mean time of R / 2.

    Passes are numbered in the order in which they are seen, so that a resumed run pays for those alone. Which pass a call
    belongs to must not depend on what the policy wrote.

    Args:
        fresh: makes a monitor, given `lifetime=`, and `path=` where it is to go on from what was saved there.
        lifetime: A, larger than 1; `fresh` may multiply it by its workers.

    Raises:
        InputError, CalibrationError: of `fresh`.
    """

    def __init__(self, fresh: Callable[..., TrafficMonitor], lifetime: float = 100.0) -> None:
        # Refused as it was given, not as a multiple of it.
        self._threshold = fresh(lifetime=lifetime).state.threshold
        self._fresh, self._lifetime = fresh, lifetime
        self._nth = 0
        # Where all passes before this one left the alarm.
        self._before: MonitorState | None = None
        self._lock = threading.Lock()
        self._start()
        self._number: int | None = None

    @property
    def state(self) -> MonitorState:
        """Over all passes: evidence is the largest of any pass on the scale of `threshold`, so that it alarms there.

        Items are numbered through. `axes` and `recurring_value` are of the present pass alone, in its own scale; `flag_rate`
        is of the pass that alarmed by it, else of the present one.
        """
        with self._lock:
            return self._joined(self._monitor.state)

    @property
    def calibration(self) -> dict[str, NDArray[Any]]:
        """Axis -> calibration scores in ascending order."""
        return self._monitor.calibration

    def update(
        self,
        scores: Mapping[str, ArrayLike],
        *,
        number: int,
        sessions: Sequence[Hashable | None],
        flags: ArrayLike,
    ) -> tuple[MonitorState, int]:
        """Take a call's items; `state`, and how many of them counted.

        Args:
            number: which pass they are of; never falling, else they are taken for the present one's.
            scores, sessions, flags: as in `TrafficMonitor.update`.
        """
        with self._lock:
            before = self._monitor.state.counted
            if self._number is None or number > self._number:
                if before:
                    self._before, before = self._joined(self._monitor.state), 0
                    self._start()
                self._number = number
            state = self._monitor.update(scores, sessions=sessions, flags=flags)
            return self._joined(state), state.counted - before

    def save(self, path: str | os.PathLike[str], **beside: int) -> None:
        """Write where all passes stand to a file, atomically.

        Args:
            beside: counts of the caller's that belong to it.
        Raises:
            SaveError: as `TrafficMonitor.save`.
        """

        def content() -> dict[str, Any]:
            with self._lock:
                passes = {"nth": self._nth, "number": self._number, "before": _told(self._before), "beside": beside}
                return {**self._monitor.content(), "passes": passes}

        write_monitor(Path(path), content)

    def resume(self, path: str | os.PathLike[str]) -> dict[str, int]:
        """Go on from what `save` wrote, in the place of what was seen here.

        Returns:
            The caller's counts.
        Raises:
            FileNotFoundError: no such file.
            FormatError, IntegrityError: it is something else, or was cut or changed.
            MismatchError: it is of another calibration, or other settings.
        """
        content = read_monitor(Path(path))
        try:
            passes = content["passes"]
            nth, number = int(passes["nth"]), passes["number"]
            before, beside = _before(passes["before"]), {name: int(count) for name, count in passes["beside"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path}: not the monitor of a training run ({type(error).__name__})") from error
        monitor = self._fresh(path=path, lifetime=self._lifetime_of(nth))
        with self._lock:
            self._nth, self._number, self._before, self._monitor = nth, number, before, monitor
        return beside

    def _lifetime_of(self, nth: int) -> float:
        return self._lifetime * nth * (nth + 1)

    def _start(self) -> None:
        self._nth += 1
        self._monitor = self._fresh(lifetime=self._lifetime_of(self._nth))

    def _joined(self, own: MonitorState) -> MonitorState:
        own = replace(own, e_value=own.e_value / (self._nth * (self._nth + 1)), threshold=self._threshold)
        old = self._before
        if old is None:
            return own
        at, last = own.alarm_at, own.last_recurring_at
        return replace(
            own,
            requests=old.requests + own.requests,
            counted=old.counted + own.counted,
            unscored=old.unscored + own.unscored,
            e_value=max(old.e_value, own.e_value),
            alarm=old.alarm or own.alarm,
            alarm_at=old.alarm_at if old.alarm else None if at is None else old.counted + at,
            alarm_of=old.alarm_of if old.alarm else own.alarm_of,
            recurring_alarms=old.recurring_alarms + own.recurring_alarms,
            last_recurring_at=old.last_recurring_at if last is None else old.counted + last,
            last_recurring_of=old.last_recurring_of if last is None else own.last_recurring_of,
            flag_rate=old.flag_rate if old.flag_rate is not None and old.flag_rate.alarm else own.flag_rate,
        )

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(saved)
        self._lock = threading.Lock()


# Of the passes before this one the present one's own values stand for the rest.
_KEPT = ("requests", "counted", "unscored", "e_value", "threshold", "alarm", "alarm_at", "alarm_of", "recurring_alarms",
         "last_recurring_at", "last_recurring_of", "flag_rate")  # fmt: skip


def _told(state: MonitorState | None) -> dict[str, Any] | None:
    return None if state is None else {name: value for name, value in asdict(state).items() if name in _KEPT}


def _before(saved: Mapping[str, Any] | None) -> MonitorState | None:
    if saved is None:
        return None
    changes = {name: saved[name] and Change(*saved[name]) for name in ("alarm_of", "last_recurring_of")}
    flags = saved["flag_rate"] and FlagRate(**saved["flag_rate"])
    rest = {"recurring_value": 0.0, "recurring_threshold": 0.0, "recurring_alarm": False, "axes": {}}
    return MonitorState(**{**{name: saved[name] for name in _KEPT}, **rest, **changes, "flag_rate": flags})
