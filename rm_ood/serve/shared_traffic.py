"""One traffic monitor over many replicas, which tell it their verdicts; and all their metrics in one place.

The promise of the alarm is about a stream. Of R monitors on shares of it each would be right about its own share, and their
largest evidence needs a factor R; but replicas come and go, each would begin anew, and a session that is spread over them
would count in each. So there is one, and its promise holds for the whole deployment, however many replicas there are.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics
from prometheus_client.metrics_core import Metric

from rm_ood.atomic import acquire
from rm_ood.decision import Decisions
from rm_ood.errors import IntegrityError, OODGuardError, SaveError
from rm_ood.monitor import TrafficMonitor
from rm_ood.monitor_inputs import session_key
from rm_ood.monitor_state import Bools, Floats, MonitorState
from rm_ood.serve.logs import log
from rm_ood.serve.metrics import Metrics
from rm_ood.serve.scorer import Scorer, Work
from rm_ood.serve.traffic import Traffic

# (method of a `Watch`, its arguments) -> its result, from wherever it is.
Ask = Callable[..., Awaitable[Any]]
# A replica that has not been heard of for so long is gone, and its series with it.
_GONE_S = 15.0
# A monitor that nobody has told anything for so long, its guard replaced everywhere, is kept in its file alone.
_FORGOTTEN_S = 300.0
# How long a new watch waits for the one that it replaces to let go of the folder.
LEASE_WAIT_S = 60.0
# Reports that wait in a replica while the watch does not answer; more are left out, and counted.
_MOST_REPORTS = 1_000
_OWN = "watch"


@dataclass(frozen=True)
class Report:
    """One batch's verdicts: axis -> (m,) scores, (m,) flags, m session keys. No text, and no session's name."""

    scores: dict[str, Floats]
    flags: Bools
    sessions: list[int | None]


class Watch:
    """The monitors of a deployment, one for each calibration that its replicas serve; lives in one event loop.

    A report is counted once or, where it got lost with a process, not at all; neither looks at scores.

    Args:
        folder: where the monitors outlive the deployment, a file each; None: nowhere.
        save_s: how often they are written; an alarm is at once.

    Raises:
        SaveError: the folder cannot be used, or another deployment uses it.
    """

    def __init__(self, folder: str | None, save_s: float) -> None:
        self._folder = None if folder is None else Path(folder)
        self._lease = None if self._folder is None else _lease(self._folder)
        self._save_s = save_s
        self._monitors: dict[str, TrafficMonitor] = {}
        # When each was last told something.
        self._told: dict[str, float] = {}
        # Requests that each file knows of.
        self._saved: dict[str, int] = {}
        self._saving = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self._families: dict[str, tuple[float, Sequence[Metric]]] = {}
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._failures = Counter(
            "rm_ood_monitor_failures", "What the monitor could not do.", ("what",), registry=self._registry
        )
        self._failures.labels("save")

    async def open(self, fresh: TrafficMonitor) -> MonitorState:
        """Begin to watch a calibration, from its saved state where there is one; `fresh` has seen nothing.

        Raises:
            FormatError, IntegrityError: the saved state is none.
        """
        if self._keeper is None:
            self._keeper = asyncio.get_running_loop().create_task(self._keep())
        key = fresh.digest
        if key not in self._monitors:
            path = self._path(key)
            known = path is not None and path.exists()
            monitor = TrafficMonitor.load(path, fresh.calibration) if path is not None and known else fresh
            if monitor.digest != key:
                raise IntegrityError(f"{path}: the state of another monitor. Start a new one: move the file away")
            self._monitors[key] = monitor
            self._saved[key] = monitor.state.requests if known else -1
        self._told[key] = time.monotonic()
        return self._monitors[key].state

    async def watch(self, key: str, reports: Sequence[Report]) -> MonitorState | None:
        """Count verdicts; None: this calibration was not opened here."""
        monitor = self._monitors.get(key)
        if monitor is None:
            return None
        self._told[key] = time.monotonic()
        before = state = monitor.state
        for report in reports:
            state = monitor.update(report.scores, sessions=report.sessions, flags=report.flags)
        if (state.alarm and not before.alarm) or state.recurring_alarms > before.recurring_alarms:
            log("traffic_alarm", level="warning", message=state.message)
            await self.save()
        return state

    async def save(self) -> None:
        """Write what has changed, and forget whom nobody tells anything and the folder knows: `open` brings it back."""
        async with self._saving:
            for key, monitor in list(self._monitors.items()):
                path, now = self._path(key), monitor.state.requests
                if path is None or now == self._saved[key]:
                    continue
                try:
                    await asyncio.to_thread(monitor.save, path)
                except OODGuardError as error:
                    self._failures.labels("save").inc()
                    log("monitor_not_saved", level="error", error=type(error).__name__)
                else:
                    self._saved[key] = now
            last = time.monotonic() - _FORGOTTEN_S
            for key in [key for key, at in self._told.items() if at < last]:
                # Never so without a folder.
                if self._saved[key] == self._monitors[key].state.requests:
                    del self._monitors[key], self._saved[key], self._told[key]

    async def publish(self, replica: str, families: Sequence[Metric]) -> None:
        """Take a replica's metrics, and forget those that were not heard of lately."""
        now = time.monotonic()
        self._families[replica] = now, families
        self._families = {name: entry for name, entry in self._families.items() if entry[0] > now - _GONE_S}

    async def collected(self, replica: str, families: Sequence[Metric]) -> dict[str, Sequence[Metric]]:
        """The metrics of all replicas that were heard of lately, after those of one."""
        await self.publish(replica, families)
        return {_OWN: list(self._registry.collect()), **{name: entry[1] for name, entry in self._families.items()}}

    async def close(self) -> None:
        """Write, and let go of the folder."""
        if self._keeper is not None:
            self._keeper.cancel()
        await self.save()
        if self._lease is not None:
            os.close(self._lease)
            self._lease = None

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._save_s)
            await self.save()

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder / f"monitor-{key[:16]}.json"


def _lease(folder: Path) -> int:
    """An open, locked file: no other watch writes to the folder while this process has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "monitor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SaveError(
            f"monitor_state={folder}: not a folder that can be written ({error.strerror}). Behind several replicas it is a "
            "folder, on a disk that each machine sees"
        ) from error
    held = acquire(handle, LEASE_WAIT_S)
    if held is not True:
        os.close(handle)
        why = "cannot be locked" if held is None else f"another deployment has been using it for {LEASE_WAIT_S:.0f} s"
        raise SaveError(f"monitor_state={folder}: {why}. Name another folder: one monitor writes to each")
    return handle


class SharedTraffic(Traffic):
    """A replica's end: tells the verdicts of one guard, and knows how the alarm stood when it last told some.

    Args:
        scorer: whose verdicts are watched.
        metrics: told of it.
        ask: the `Watch`.
    """

    def __init__(self, scorer: Scorer, metrics: Metrics, ask: Ask) -> None:
        self.monitor = scorer.monitor(None)
        self.state = self.monitor.state
        self.uncounted = 0
        self._metrics = metrics
        self._ask = ask
        self._key = self.monitor.digest
        self._reports: list[Report] = []
        self._telling = asyncio.Lock()
        self._told: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self.show()

    def watch(self, works: Sequence[Work], decisions: Decisions) -> None:
        """Have a batch's verdicts told; from the model's thread."""
        scores = {axis: decisions.axes[axis].ood_scores for axis in self.monitor.calibration}
        sessions = [session_key(work.query.session) for work in works]
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, Report(scores, decisions.is_ood, sessions))

    def _put(self, report: Report) -> None:
        if len(self._reports) >= _MOST_REPORTS:
            self._metrics.monitor_failures.labels("watch").inc()
            return
        self._reports.append(report)
        if self._told is None or self._told.done():
            self._told = self._loop.create_task(self.save(), name="rm-ood-reports")

    async def save(self) -> None:
        """Tell what was not told yet, and hear how the alarm stands; what goes wrong here spoils no reply."""
        async with self._telling:
            while True:
                reports, self._reports = self._reports, []
                try:
                    state = await self._ask("watch", self._key, reports)
                    if state is None:
                        await self._ask("open", self.monitor)
                        state = await self._ask("watch", self._key, reports)
                except Exception as error:
                    # Told again they might count twice: two of one item are no evidence of two.
                    self._metrics.monitor_failures.labels("watch").inc(max(1, len(reports)))
                    log("monitor_failed", level="error", error=type(error).__name__, reports=len(reports))
                    return
                if state is not None:
                    before, self.state = self.state, state
                    self._hear(before, state)
                if not self._reports:
                    return

    def watches_as(self, other: TrafficMonitor) -> bool:
        """See `Traffic`."""
        return self._key == other.digest

    def stop(self) -> None:
        """There is no thread."""


class Together:
    """The metrics of several replicas as one registry, each series with the label `replica`.

    Args:
        collected: of `Watch.collected`.
    """

    def __init__(self, collected: dict[str, Sequence[Metric]]) -> None:
        self._collected = collected

    def collect(self) -> Iterable[Metric]:
        """One family a name."""
        found: dict[str, Metric] = {}
        for replica, families in self._collected.items():
            for family in families:
                into = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                into.samples += [s._replace(labels={**s.labels, "replica": replica}) for s in family.samples]
        return found.values()
