"""The traffic alarm: false alarms on clean streams, delays on changed ones, river's detectors on the same streams.

In `results/`, `low` and `high` of a share of streams are its exact 95 % interval, and those of a delay its 10 % and 90 %
points. A stream's calibration scores are its own. River's detectors get the scores as they are, with their own defaults;
they need no calibration.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import harness
import numpy as np
from scipy import stats

from rm_ood import TrafficMonitor
from rm_ood.power import share_interval

TESTS = ("tests/test_bets.py", "tests/test_monitor.py")
STREAMS, LENGTH = 300, 50_000
CALIBRATION_SIZES = (200, 1_000, 5_000)
LIFETIME, RECURRING, EARLY = 100.0, 1e4, 1_000
DELAY_STREAMS, DELAY_CALIBRATION, CLEAN, CHANGED = 100, 2_000, 5_000, 6_000
AUROC = 0.92
SHARES = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
COLLAPSE = (-1.0, 0.5)
PEERS = ("river ADWIN", "river Page-Hinkley")


@dataclass(frozen=True)
class Watched:
    """One stream: items at which the lifetime and the recurring alarm came first, from 1; infinite if never."""

    lifetime: float
    recurring: float
    budget: bool


def watch(calibration: np.ndarray, scores: np.ndarray, recurring: float, *, before: int = 0) -> Watched:
    """Feed a monitor; the recurring alarm is looked for after `before` items, and the lifetime alarm from the start."""
    monitor = TrafficMonitor(calibration, lifetime=LIFETIME, recurring=recurring, alpha=0.05)
    first, known = math.inf, 0
    for at in range(0, len(scores), 500):
        state = monitor.update(scores[at : at + 500])
        if first == math.inf and state.recurring_alarm and at >= before:
            single = state.recurring_alarms == known + 1
            first = state.last_recurring_at if single else _first_in(calibration, scores, at, recurring)
        known = state.recurring_alarms
    return Watched(state.alarm_at or math.inf, first, state.flag_rate.alarm)


def _first_in(calibration: np.ndarray, scores: np.ndarray, at: int, recurring: float) -> float:
    """The item of the block at `at` that raised the recurring alarm."""
    monitor = TrafficMonitor(calibration, lifetime=LIFETIME, recurring=recurring, alpha=0.05)
    monitor.update(scores[:at])
    for i, score in enumerate(scores[at : at + 500]):
        if monitor.update(score).recurring_alarm:
            return at + i + 1
    raise AssertionError("a block alarmed as a whole and not item by item")


def peer_alarms(name: str, scores: np.ndarray) -> np.ndarray:
    """Items, from 1, at which river's detector with default settings says that there is drift."""
    from river import drift

    detector = drift.ADWIN() if name == PEERS[0] else drift.PageHinkley()
    alarms = []
    for i, score in enumerate(scores.tolist()):
        detector.update(score)
        if detector.drift_detected:
            alarms.append(i + 1)
    return np.array(alarms)


def measure() -> Iterator[harness.Row]:
    """Rows of `benchmarks/run.py monitor`."""
    yield from _cost()
    yield from _delays()
    for n in CALIBRATION_SIZES:
        yield from _null(n)
    for name in PEERS:
        yield from _peer_null(name)


def _clean(n: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    # The traffic of a stream is the same for every calibration size, and for the peers.
    traffic = np.random.default_rng([stream, 0]).normal(size=LENGTH)
    return np.random.default_rng([stream, n]).normal(size=n), traffic


def _null(n: int) -> Iterator[harness.Row]:
    found = [watch(*_clean(n, i), RECURRING) for i in range(STREAMS)]
    print(f"clean streams, n_cal={n}: done", file=sys.stderr)
    shape = f"n_cal={n} streams={STREAMS} length={LENGTH}"
    alarms = sum(w.lifetime < math.inf for w in found)
    bound = int(stats.binom.ppf(0.999, STREAMS, 1 / LIFETIME))
    yield _share("false_alarm", f"lifetime A=100 (at most {bound} of {STREAMS})", shape, "streams_alarmed", alarms)
    budget = sum(w.budget for w in found)
    yield _share("false_alarm", "flag rate above alpha=0.05, A=100 (at most 0.06)", shape, "streams_alarmed", budget)
    early = sum(w.recurring <= EARLY for w in found)
    yield _share("false_alarm", "recurring A=1e4 (at most 0.1)", shape, f"alarmed_within_{EARLY}", early)
    # Runs that did not end count as 50,000: the mean is too small, never too large.
    runs = np.array([min(w.recurring, LENGTH) for w in found])
    error = 1.96 * runs.std(ddof=1) / math.sqrt(STREAMS)
    mean = float(runs.mean())
    provider = "recurring A=1e4 (at least 10000)"
    yield harness.Row(
        "monitor", "false_alarm", provider, shape, "float64", "mean_run", mean, mean - error, mean + error, "items"
    )


def _peer_null(name: str) -> Iterator[harness.Row]:
    alarms = [len(peer_alarms(name, _clean(0, i)[1])) for i in range(STREAMS)]
    print(f"clean streams, {name}: done", file=sys.stderr)
    shape = f"streams={STREAMS} length={LENGTH}"
    yield _share("false_alarm", name, shape, "streams_alarmed", sum(a > 0 for a in alarms))
    low, high = harness.quantile(alarms, 0.1), harness.quantile(alarms, 0.9)
    yield harness.Row(
        "monitor",
        "false_alarm",
        name,
        shape,
        "float64",
        "alarms_per_stream",
        float(np.mean(alarms)),
        low,
        high,
        "alarms",
    )


def _share(op: str, provider: str, shape: str, metric: str, count: int) -> harness.Row:
    low, high = share_interval(count, STREAMS)
    return harness.Row("monitor", op, provider, shape, "float64", metric, count / STREAMS, low, high, "share")


def _delays() -> Iterator[harness.Row]:
    shift = math.sqrt(2) * float(stats.norm.ppf(AUROC))
    for share in SHARES:
        yield from _delay(f"AUROC={AUROC} share={share}", lambda rng, x, s=share: x + shift * (rng.random(x.size) < s))
    yield from _delay("mode collapse N(-1, 0.5)", lambda rng, x: COLLAPSE[0] + COLLAPSE[1] * x)


def _delay(what: str, change) -> Iterator[harness.Row]:
    delays: dict[str, list[float]] = {"lifetime A=100": [], "recurring A=1e6": [], **{name: [] for name in PEERS}}
    for i in range(DELAY_STREAMS):
        rng = np.random.default_rng([i, 1])
        calibration = rng.normal(size=DELAY_CALIBRATION)
        scores = rng.normal(size=CLEAN + CHANGED)
        scores[CLEAN:] = change(rng, scores[CLEAN:])
        found = watch(calibration, scores, 1e6, before=CLEAN)
        delays["lifetime A=100"].append(found.lifetime)
        delays["recurring A=1e6"].append(found.recurring)
        for name in PEERS:
            alarms = peer_alarms(name, scores)
            delays[name].append(min(alarms[alarms > CLEAN], default=math.inf))
    print(f"delays, {what}: done", file=sys.stderr)
    shape = f"{what} n_cal={DELAY_CALIBRATION} clean={CLEAN} streams={DELAY_STREAMS}"
    for name, found in delays.items():
        # An alarm before the change found nothing; one that never came is infinite.
        after = [at - CLEAN if at > CLEAN else math.inf for at in found]
        low, median, high = np.quantile(after, [0.1, 0.5, 0.9], method="inverted_cdf")
        yield harness.Row(
            "monitor", "delay", name, shape, "float64", "median_delay", float(median), float(low), float(high), "items"
        )


def _cost() -> Iterator[harness.Row]:
    rng = np.random.default_rng(0)
    monitor = TrafficMonitor(rng.normal(size=DELAY_CALIBRATION))
    scores = rng.normal(size=1_000)
    scores_one = float(scores[0])
    for size, call in ((1_000, lambda: monitor.update(scores)), (1, lambda: monitor.update(scores_one))):
        timing = harness.alternate({"rm_ood": call}, clock=time.process_time)["rm_ood"]
        low, median, high = (1e6 * t / size for t in (timing.low, timing.median, timing.high))
        yield harness.Row(
            "monitor",
            "update",
            "rm_ood",
            f"items_per_update={size}",
            "float64",
            "cpu_time_per_item",
            median,
            low,
            high,
            "us",
        )
