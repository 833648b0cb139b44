"""One alarm over passes that see the same prompts again: rarely false however they depend, and not deaf."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rm_ood import FormatError, InputError, MismatchError
from rm_ood.integrations.passes import PassMonitor
from rm_ood.monitor import TrafficMonitor

KEYS = list(range(150))
NO_FLAGS = np.zeros(150, dtype=bool)


def play(monitor: PassMonitor, scores: np.ndarray, number: int) -> bool:
    return monitor.update({"all": scores}, number=number, sessions=KEYS, flags=NO_FLAGS)[0].alarm


@pytest.mark.parametrize("same", [False, True])
def test_honest_passes_alarm_no_more_often_than_one_monitor_may(same: bool) -> None:
    rng, alarms, runs, lifetime = np.random.default_rng(0), 0, 150, 4.0
    for _ in range(runs):
        monitor = PassMonitor(partial(TrafficMonitor, rng.normal(size=200)), lifetime)
        kept = rng.normal(size=150)
        alarms += any(play(monitor, kept if same else rng.normal(size=150), number) for number in range(4))
    # Four standard errors above the promise.
    assert alarms / runs <= 1 / lifetime + 4 * np.sqrt(0.25 * 0.75 / runs)


def test_each_pass_is_heard_and_costs_more() -> None:
    rng = np.random.default_rng(1)
    one = TrafficMonitor(rng.normal(size=400))
    monitor = PassMonitor(partial(TrafficMonitor, one.calibration["all"]))
    clean, hacked = rng.normal(size=150), rng.normal(3.0, size=150)
    assert monitor.state.e_value == 0.5
    assert not play(monitor, clean, 4)
    # Prompts that come back in the same pass, or in one that is over, are not counted.
    for number in (4, 2):
        state, counted = monitor.update({"all": hacked}, number=number, sessions=KEYS, flags=NO_FLAGS)
        assert (counted, state.alarm, state.counted, state.requests) == (0, False, 150, 300 + 150 * (number == 2))
    monitor = pickle.loads(pickle.dumps(monitor))
    assert play(monitor, hacked, 5)
    state = monitor.state
    one.update(hacked)
    assert one.state.alarm_at is not None
    assert state.alarm_at is not None
    # The second pass asks for six times the evidence, and tells it in units of the first promise.
    assert state.alarm_at >= 150 + one.state.alarm_at
    assert state.threshold == one.state.threshold == 100
    assert state.e_value == pytest.approx(one.state.e_value / 6)
    # An alarm stays one.
    play(monitor, clean, 6)
    assert (monitor.state.alarm_at, monitor.state.alarm_of) == (state.alarm_at, state.alarm_of)
    assert monitor.state.counted == 450


def fresh(calibration: np.ndarray) -> Any:
    def make(path: Path | None = None, **settings: Any) -> TrafficMonitor:
        return TrafficMonitor.open(path, calibration, **settings)

    return make


@pytest.mark.parametrize("hacked_in", [0, 1, 2])
def test_a_saved_alarm_goes_on_as_if_it_had_never_stopped(hacked_in: int, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(2), tmp_path / "monitor.json"
    make = fresh(rng.normal(size=400))
    passes = [rng.normal(3.0 * (number == hacked_in), size=150) for number in range(3)]
    flags = rng.random(150) < 0.2
    kept, asked = PassMonitor(make), 0
    for number, scores in enumerate(passes):
        for half in (slice(0, 75), slice(75, 150)):
            kept.save(path, calls=asked)
            other = PassMonitor(make)
            assert other.resume(path) == {"calls": asked}
            told = [
                one.update({"all": scores[half]}, number=number, sessions=KEYS[half], flags=flags[half])
                for one in (kept, other)
            ]
            assert told[0] == told[1]
            # Those of half the pass were seen before.
            assert told[0][1] == 75
            asked += 1
            kept = other
    assert kept.state.alarm
    assert kept.state.counted == 450


def test_what_is_no_saved_alarm_is_refused(tmp_path: Path) -> None:
    calibration = np.random.default_rng(3).normal(size=100)
    monitor = PassMonitor(fresh(calibration))
    with pytest.raises(FileNotFoundError):
        monitor.resume(tmp_path / "none")
    TrafficMonitor(calibration).save(tmp_path / "one")
    with pytest.raises(FormatError, match="not the monitor of a training run"):
        monitor.resume(tmp_path / "one")
    monitor.save(tmp_path / "saved")
    for other in (PassMonitor(fresh(calibration + 1)), PassMonitor(fresh(calibration), lifetime=50)):
        with pytest.raises(MismatchError):
            other.resume(tmp_path / "saved")
        assert other.state.requests == 0


def test_a_lifetime_is_refused_as_it_is_given() -> None:
    for wrong in (0.9, "100"):
        with pytest.raises(InputError, match="lifetime"):
            PassMonitor(partial(TrafficMonitor, np.arange(100.0)), wrong)  # type: ignore[arg-type]
