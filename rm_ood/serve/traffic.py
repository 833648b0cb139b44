"""The traffic monitor of a server: fed where batches are scored, told in replies and metrics, saved now and then."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rm_ood.decision import Decisions
from rm_ood.errors import MismatchError, OODGuardError
from rm_ood.monitor import TrafficMonitor
from rm_ood.monitor_state import MonitorState
from rm_ood.serve.logs import log
from rm_ood.serve.metrics import Metrics
from rm_ood.serve.scorer import Scorer, Work
from rm_ood.serve.settings import ServeSettings
from rm_ood.serve.worker import Worker

# Items in a row of which none counted, after which the log says that the monitor hears nothing.
_QUIET = 10_000


class Traffic:
    """An alarm on one guard's traffic.

    The monitor counts one item of each session, so that traffic of sessions that it knows, such as that of a sender who gives
    every item the same one, can change without an alarm. How many items in a row did not count is a gauge, and the log tells
    of 10,000.

    Args:
        scorer: whose verdicts are watched.
        settings: where the state is kept.
        metrics: told of it.
        resume: go on from the saved state; else begin anew.

    A saved state of another calibration is moved aside (`.old`): one that is found, and in a swap that of the guard before.

    Raises:
        FormatError, IntegrityError: the saved state is none.
    """

    _path: Path | None = None

    def __init__(self, scorer: Scorer, settings: ServeSettings, metrics: Metrics, *, resume: bool) -> None:
        self._path = settings.monitor_state
        self._metrics = metrics
        self._lock = threading.Lock()
        self.monitor, self._saved = self._open(scorer, resume)
        self.state: MonitorState = self.monitor.state
        self.uncounted = 0
        self._worker = Worker("rm-ood-monitor")
        self.show()

    def _open(self, scorer: Scorer, resume: bool) -> tuple[TrafficMonitor, int]:
        """A monitor, and how many of its requests its file knows; -1 where the file is to be written in any case."""
        if not resume or self._path is None:
            return scorer.monitor(None), -1
        try:
            monitor = scorer.monitor(self._path)
            return monitor, monitor.state.requests
        except MismatchError:
            # Evidence about another calibration says nothing about this one; a person may still want to read it.
            self._path.replace(_old(self._path))
            log("monitor_begins_anew", level="warning")
        return scorer.monitor(None), -1

    def watch(self, works: Sequence[Work], decisions: Decisions) -> None:
        """Count a batch's verdicts; what goes wrong here spoils no reply."""
        try:
            # Batches may end together: the state of the later one stays.
            with self._lock:
                state = self.monitor.watch(decisions, [work.query.session for work in works])
                before, self.state = self.state, state
                self._hear(before, state)
        except OODGuardError as error:
            self._metrics.monitor_failures.labels("watch").inc()
            log("monitor_failed", level="error", error=type(error).__name__)
            return
        if (state.alarm and not before.alarm) or state.recurring_alarms > before.recurring_alarms:
            log("traffic_alarm", level="warning", message=state.message)

    def _hear(self, before: MonitorState, now: MonitorState) -> None:
        """Count what came without counting; of a batch that counts, nothing does, nor before a monitor that began anew."""
        silent = self.uncounted
        heard = now.counted > before.counted or now.requests < before.requests
        self.uncounted = 0 if heard else silent + now.requests - before.requests
        if silent < _QUIET <= self.uncounted:
            log("monitor_hears_nothing", level="warning", items=self.uncounted, counted=now.counted)

    def show(self) -> None:
        """Set the gauges."""
        state, m = self.state, self._metrics
        m.alarm.set(state.alarm)
        m.evidence.set(state.e_value)
        m.threshold.set(state.threshold)
        m.recurring.set(state.recurring_alarms)
        m.uncounted.set(self.uncounted)
        m.flag_rate.set(math.nan if state.flag_rate is None else state.flag_rate.rate)

    def row(self) -> dict[str, Any]:
        """What a reply says of it."""
        state = self.state
        return {
            "alarm": state.alarm,
            "e_value": state.e_value,
            "threshold": state.threshold,
            "recurring_alarms": state.recurring_alarms,
            "requests": state.requests,
            "counted": state.counted,
            "flag_rate": None if state.flag_rate is None or not state.flag_rate.n else state.flag_rate.rate,
            "message": state.message,
        }

    async def save(self) -> None:
        """Write the state, if there is a file for it and something new."""
        now = self.state.requests
        if self._path is None or now == self._saved:
            return
        try:
            await self._worker.run(self.monitor.save, self._path)
        except OODGuardError as error:
            self._metrics.monitor_failures.labels("save").inc()
            log("monitor_not_saved", level="error", error=type(error).__name__)
            return
        self._saved = now

    async def set_aside(self) -> None:
        """Leave the file to another monitor: what this one saw, and what it may still see, is kept beside it (`.old`)."""
        if self._path is None:
            return
        path, self._path = self._path, _old(self._path)
        # Where there is none yet, or it cannot be moved, the state is written all the same.
        with contextlib.suppress(OSError):
            path.replace(self._path)
        self._saved = -1
        await self.save()

    def watches_as(self, other: TrafficMonitor) -> bool:
        """Whether a monitor of another scorer would be this one: the same calibration scores and the same promise."""
        mine, theirs = self.monitor.calibration, other.calibration
        same = mine.keys() == theirs.keys() and all(np.array_equal(mine[axis], theirs[axis]) for axis in mine)
        return same and self.state.threshold == other.state.threshold

    def stop(self) -> None:
        """Let the thread end."""
        self._worker.stop()


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")
