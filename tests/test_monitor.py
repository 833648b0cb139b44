"""`TrafficMonitor`: alarms on a stream, however it is cut, stopped, shared or mixed up."""

from __future__ import annotations

import math
import pickle
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import POISON, preference_rows
from scipy import stats

from rm_ood import InputError, MismatchError, MonitorState, OODGuard, TrafficMonitor
from rm_ood.bets import RATIOS, PolyaBets, tie_keys
from rm_ood.errors import CalibrationError

CALIBRATION = np.random.default_rng(0).normal(size=1000)


def shifted(seed: int = 1, clean: int = 800, odd: int = 200) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(size=clean), rng.normal(size=odd) + 2])


def same(a: MonitorState, b: MonitorState) -> bool:
    """Bit for bit, but for what only the last update says."""
    return {**vars(a), "recurring_alarm": None} == {**vars(b), "recurring_alarm": None}


# -- alarms


def test_clean_traffic_is_quiet_and_a_change_is_told() -> None:
    monitor = TrafficMonitor(CALIBRATION)
    scores = shifted()
    state = monitor.update(scores[:800])
    assert (state.requests, state.counted, state.unscored) == (800, 800, 0)
    assert not state.alarm
    assert state.message is None
    state = monitor.update(scores[800:])
    assert state.alarm
    assert state.recurring_alarm
    assert 800 < state.alarm_at < 830
    assert 800 < state.last_recurring_at <= 1000
    assert state.e_value > 100
    assert state.axes["all"].higher > 100 > state.axes["all"].lower
    assert "scores are larger than the calibration data's: since item 8" in state.message
    assert "items are flagged (95 % band" in state.message
    # What happened stays told when the traffic is clean again; the evidence does not stay.
    later = monitor.update(np.random.default_rng(5).normal(size=3000))
    assert later.alarm
    assert later.alarm_at == state.alarm_at
    assert not later.recurring_alarm
    assert later.recurring_alarms == state.recurring_alarms
    assert later.e_value < state.e_value / 1e6


def test_mode_collapse_is_told_as_smaller_scores() -> None:
    monitor = TrafficMonitor(CALIBRATION)
    rng = np.random.default_rng(2)
    state = monitor.update(np.concatenate([rng.normal(size=500), rng.normal(-1, 0.5, size=150)]))
    assert state.alarm
    assert "scores are smaller" in state.message
    assert state.axes["all"].lower > 100 > state.axes["all"].higher
    assert not state.flag_rate.alarm


def test_a_larger_tolerance_lets_a_small_inflation_pass() -> None:
    rng = np.random.default_rng(3)
    calibration, scores = rng.normal(size=5000), rng.normal(size=15_000) * 1.12
    assert TrafficMonitor(calibration).update(scores).alarm
    assert not TrafficMonitor(calibration, ratios=(4, 8, 16)).update(scores).alarm


def test_workers_multiply_both_thresholds() -> None:
    one, eight = TrafficMonitor(CALIBRATION), TrafficMonitor(CALIBRATION, workers=8)
    assert (eight.state.threshold, eight.state.recurring_threshold) == (800, 8e6)
    scores = shifted()
    first, later = one.update(scores), eight.update(scores)
    assert first.e_value == later.e_value
    assert 800 < first.alarm_at < later.alarm_at
    assert first.recurring_alarms > later.recurring_alarms


def played(scores: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Evidence and recent evidence after each item, by the bets alone."""
    return PolyaBets(CALIBRATION, RATIOS, 0).advance(scores, tie_keys(scores.size, 0, 1), limit)


def test_workers_alarm_at_their_own_thresholds() -> None:
    scores = shifted()
    evidence, recent = played(scores, 300 * 8)
    monitor = TrafficMonitor(CALIBRATION, lifetime=5, recurring=300, workers=8)
    state = monitor.update(scores)
    assert state.alarm_at == np.flatnonzero(evidence >= 5 * 8)[0] + 1 > np.flatnonzero(evidence >= 5)[0] + 1
    at = np.flatnonzero(recent >= 300 * 8)
    assert (state.recurring_alarms, state.last_recurring_at) == (at.size, at[-1] + 1)
    assert at.size != (played(scores, 300)[1] >= 300).sum()


def test_axes_are_joined_by_the_largest_and_not_by_the_mean() -> None:
    rng = np.random.default_rng(4)
    monitor = TrafficMonitor({"response": CALIBRATION, "prompt": CALIBRATION[:500]}, recurring=1e4)
    state = monitor.update({"prompt": rng.normal(size=400), "response": rng.normal(size=400)})
    assert not state.alarm
    assert state.message is None
    state = monitor.update({"prompt": rng.normal(size=60), "response": rng.normal(size=60) + 2})
    assert state.alarm
    assert "response scores are larger" in state.message
    assert state.axes["response"].e_value / 2 == state.e_value
    assert max(axis.recurring_value for axis in state.axes.values()) / 4 == state.recurring_value
    assert state.recurring_alarms > 0
    assert list(monitor.calibration) == ["prompt", "response"]
    assert state.flag_rate is None


def test_axes_alarm_at_thresholds_times_their_number() -> None:
    rng = np.random.default_rng(8)
    scores, quiet = rng.normal(size=1000), rng.normal(size=1000)
    scores[800:] += 0.9
    # The recurring alarm of two axes: a mean time of A / 2 is all that a union bound leaves.
    evidence, _ = played(scores, 300 * 4)
    monitor = TrafficMonitor({"prompt": CALIBRATION, "response": CALIBRATION}, lifetime=20, recurring=300)
    state = monitor.update({"prompt": quiet, "response": scores})
    assert state.alarm_at == np.flatnonzero(evidence >= 20 * 2)[0] + 1 > np.flatnonzero(evidence >= 20)[0] + 1

    def fired(factor: int) -> np.ndarray:
        either = np.maximum(played(scores, 300 * factor)[1], played(quiet, 300 * factor)[1])
        return np.flatnonzero(either >= 300 * factor)

    assert (state.recurring_alarms, state.last_recurring_at) == (fired(4).size, fired(4)[-1] + 1)
    assert fired(4).size not in (fired(1).size, fired(2).size)


def test_the_message_tells_what_had_changed_at_the_alarm() -> None:
    """First larger on one axis, then smaller on the other: today's evidence is not the alarm's."""
    rng = np.random.default_rng(11)
    monitor = TrafficMonitor({"prompt": CALIBRATION, "response": CALIBRATION})
    monitor.update({"prompt": rng.normal(size=100) + 3, "response": rng.normal(size=100)})
    for _ in range(20):
        state = monitor.update({"prompt": rng.normal(size=300), "response": rng.normal(size=300) * 0.1 - 1.5})
    assert state.axes["response"].e_value > state.axes["prompt"].e_value
    assert state.axes["response"].lower > state.axes["response"].higher
    assert state.alarm_of == ("prompt", "larger")
    assert state.last_recurring_of == ("response", "smaller")
    assert f"prompt scores are larger than the calibration data's: since item {state.alarm_at}" in state.message
    assert "response scores are smaller than the calibration data's: recurring alarm" in state.message


# -- one stream, however it comes


def test_how_a_stream_is_cut_changes_nothing() -> None:
    # Rounded, so that ties have to be broken alike.
    scores = np.round(shifted(), 1)
    scores[[3, 400]] = np.nan
    keys = [f"user {i % 700}" for i in range(1000)]
    whole, pieces = TrafficMonitor(np.round(CALIBRATION, 1)), TrafficMonitor(np.round(CALIBRATION, 1))
    whole.update(scores, sessions=keys)
    for start, stop in ((0, 1), (1, 1), (1, 2), (2, 333), (333, 900), (900, 1000)):
        pieces.update(scores[start:stop], sessions=keys[start:stop])
    assert same(whole.state, pieces.state)
    assert same(whole.update(0.3), pieces.update([0.3]))


@pytest.mark.parametrize("at", [0, 1, 500, 830])
def test_saved_in_the_middle_it_goes_on_bit_for_bit(tmp_path: Path, at: int) -> None:
    scores, keys = shifted(), [i // 2 if i % 3 else None for i in range(1000)]
    monitor = TrafficMonitor(CALIBRATION, recurring=500, budget=0.02, seed=7)
    monitor.update(scores[:at], sessions=keys[:at])
    monitor.save(tmp_path / "state.json")
    again = TrafficMonitor.load(tmp_path / "state.json", np.random.default_rng(9).permutation(CALIBRATION))
    copied = pickle.loads(pickle.dumps(monitor))
    for other in (again, copied):
        assert same(monitor.state, other.state)
    expected = monitor.update(scores[at:], sessions=keys[at:])
    for other in (again, copied):
        assert other.update(scores[at:], sessions=keys[at:]) == expected
    assert expected.alarm
    assert expected.recurring_alarms > 1


def test_the_seed_moves_ties_only() -> None:
    scores = np.round(shifted(), 1)
    calibration = np.round(CALIBRATION, 1)
    states = [TrafficMonitor(calibration, seed=seed).update(scores) for seed in (0, 0, 1)]
    assert states[0] == states[1] != states[2]
    plain = [TrafficMonitor(CALIBRATION, seed=seed).update(shifted()) for seed in (0, 1)]
    assert plain[0] == plain[1]


def test_threads_lose_nothing() -> None:
    monitor = TrafficMonitor(CALIBRATION)

    def feed() -> None:
        for score in np.random.default_rng(0).normal(size=200):
            monitor.update(score)

    threads = [threading.Thread(target=feed) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.state.counted == monitor.state.flag_rate.n == 800


def test_memory_does_not_grow() -> None:
    rng = np.random.default_rng(0)
    monitor = TrafficMonitor(CALIBRATION, session_memory=100)

    def play(rounds: int) -> None:
        for i in range(rounds):
            monitor.update(rng.normal(size=50), sessions=[f"{i} {j}" for j in range(50)])

    play(20)
    tracemalloc.start()
    try:
        play(20)
        before = tracemalloc.get_traced_memory()[0]
        play(100)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 20_000
    assert len(monitor._content()["sessions"]) == 100


# -- sessions


def test_one_of_each_session_is_betted_on() -> None:
    monitor = TrafficMonitor(CALIBRATION)
    state = monitor.update([0.1, 9.0, 9.0, 0.2, 9.0], sessions=["a", "a", "a", None, "a"])
    assert (state.requests, state.counted) == (5, 2)
    assert same(
        TrafficMonitor(CALIBRATION).update([0.1, 0.2]),
        MonitorState(**{**vars(state), "requests": 2}),
    )
    assert monitor.update([5.0], sessions=["a"]).counted == 2
    assert monitor.update([5.0], sessions=[b"a"]).counted == 2
    assert monitor.update([5.0, 5.0], sessions=[7, "7"]).counted == 3
    assert monitor.update([5.0, 5.0], sessions=[("u", 1), ("u", np.int64(1))]).counted == 4


def test_sessions_of_alike_items_do_not_alarm() -> None:
    """Ten alike items a session: betted on one by one they alarm on most clean streams."""
    counted, every = 0, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        calibration = rng.normal(size=1000)
        scores = np.repeat(rng.normal(size=300), 10) + 0.3 * rng.normal(size=3000)
        scores /= math.sqrt(1.09)
        keys = [str(i // 10) for i in range(3000)]
        counted += TrafficMonitor(calibration, lifetime=20).update(scores, sessions=keys).alarm
        every += TrafficMonitor(calibration, lifetime=20).update(scores).alarm
    assert counted <= stats.binom.ppf(0.999, 40, 1 / 20)
    assert every >= 15


def test_a_session_is_forgotten_after_so_many_others() -> None:
    monitor = TrafficMonitor(CALIBRATION, session_memory=3)
    monitor.update([0.0] * 4, sessions=["a", "b", "a", "c"])
    assert monitor.update(0.0, sessions=["a"]).counted == 3
    # b is the one not seen for longest.
    assert monitor.update([0.0], sessions=["d"]).counted == 4
    assert monitor.update([0.0, 0.0], sessions=["a", "b"]).counted == 5


# -- flags


def test_the_monitor_s_own_flags_are_the_calibrator_s() -> None:
    from rm_ood import ConformalCalibrator

    scores = shifted()
    scores[5] = np.nan
    p = ConformalCalibrator(alpha=0.05).fit(CALIBRATION).p_value(scores)
    state = TrafficMonitor(CALIBRATION, alpha=0.05).update(scores)
    assert state.flag_rate.flagged == (p <= 0.05).sum()
    assert state.flag_rate.n == 1000
    assert state.flag_rate.budget == 0.05
    assert state.flag_rate.rate == pytest.approx(state.flag_rate.flagged / 1000)
    low, high = state.flag_rate.band()
    assert low < state.flag_rate.rate < high


def test_given_flags_are_those_that_count() -> None:
    monitor = TrafficMonitor({"prompt": CALIBRATION, "response": CALIBRATION}, budget=0.1)
    zeros = np.zeros(60)
    state = monitor.update({"prompt": zeros, "response": zeros}, flags=np.arange(60) % 2 == 0)
    assert (state.flag_rate.flagged, state.flag_rate.n) == (30, 60)
    assert state.flag_rate.alarm
    assert "50 % of 60 items are flagged" in state.message


def test_without_scores_enough_there_are_no_own_flags() -> None:
    state = TrafficMonitor(CALIBRATION[:200]).update(shifted())
    assert state.alarm
    assert state.flag_rate is None
    assert TrafficMonitor(CALIBRATION[:200], alpha=0.05).update(0.0).flag_rate.n == 1


def test_without_a_confidence_the_budget_is_what_the_rate_may_come_to() -> None:
    def budget(calibration: Any, **options: Any) -> float:
        return float(
            TrafficMonitor(calibration, alpha=0.05, **options)
            .update(dict.fromkeys(calibration, 0.0) if isinstance(calibration, dict) else 0.0, flags=[False])
            .flag_rate.budget
        )

    assert budget(CALIBRATION, confidence=None) == pytest.approx(stats.beta.ppf(0.95, 50, 951))
    two = {"prompt": CALIBRATION, "response": CALIBRATION[:400]}
    assert budget(two, confidence=None) == pytest.approx(stats.beta.ppf(0.95, 20, 381))
    assert budget(CALIBRATION) == 0.05
    assert budget(CALIBRATION, confidence=None, budget=0.03) == 0.03


# -- what cannot be used


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_has_no_score_is_never_normal(value: float | None) -> None:
    monitor = TrafficMonitor(CALIBRATION)
    monitor.update(np.random.default_rng(6).normal(size=200))
    state = monitor.update([value] * 12)
    assert state.unscored == 12
    assert state.alarm
    assert state.flag_rate.flagged >= 12
    assert state.axes["all"].higher > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lifetime": 1}, "above 1"),
        ({"recurring": math.inf}, "above 1"),
        ({"lifetime": math.nan}, "above 1"),
        ({"alpha": 0.0}, "alpha"),
        ({"confidence": 1.0}, "confidence"),
        ({"budget": 1.0}, "budget"),
        ({"workers": 0}, "workers"),
        ({"workers": 1.5}, "whole numbers"),
        ({"session_memory": 0}, "session_memory"),
        ({"ratios": ()}, "ratios"),
        ({"ratios": (1.0, 2.0)}, "ratios"),
        ({"ratios": (5.0,)}, "ratios"),
        ({"ratios": ("2",)}, "ratios='2': expected a number"),
        ({"alpha": None}, "alpha=None: expected a number"),
        ({"lifetime": "100"}, "lifetime='100': expected a number"),
        ({"budget": True}, "budget=True: expected a number"),
        ({"seed": "0"}, "seed='0': expected a whole number"),
        ({"seed": 1.5}, "seed=1.5: expected a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrafficMonitor(CALIBRATION, **options)


def test_calibrations_that_carry_no_bet_are_refused() -> None:
    with pytest.raises(InputError, match="no axis"):
        TrafficMonitor({})
    with pytest.raises(CalibrationError, match="need 4"):
        TrafficMonitor(CALIBRATION[:3])
    with pytest.raises(CalibrationError, match="NaN"):
        TrafficMonitor([*CALIBRATION, math.nan])


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({"response": [0.0]}, {}, "calibrated on"),
        (["high"], {}, "expected numbers"),
        ([[0.0], [1.0]], {}, r"got shape \(2, 1\)"),
        ([0.0, 0.0], {"sessions": ["a"]}, "lengths differ"),
        ([0.0, 0.0], {"flags": [True]}, "lengths differ"),
        ([0.0, 0.0], {"flags": [0.01, 0.3]}, "expected bool"),
        ([0.0, 0.0], {"sessions": ["a", 0.5]}, "sessions"),
        ([0.0, 0.0], {"sessions": ["a", ["b"]]}, "sessions"),
        ([0.0, 0.0], {"sessions": ["a", ("b", 0.5)]}, "sessions"),
        ([0.0, 0.0], {"sessions": "ab"}, "a list of keys, one per item, got str"),
    ],
)
def test_a_refused_update_counts_nothing(scores: Any, options: dict[str, Any], message: str) -> None:
    monitor = TrafficMonitor(CALIBRATION)
    before = monitor._content()
    with pytest.raises(InputError, match=message):
        monitor.update(scores, **options)
    assert monitor._content() == before
    assert monitor.update(0.0, sessions=["a"]).counted == 1


def test_an_empty_update_is_nothing() -> None:
    monitor = TrafficMonitor(CALIBRATION)
    before = monitor.state
    assert monitor.update([], flags=[], sessions=[]) == before
    assert "0 items, e_value=1, alarm=False" in repr(monitor)


# -- on a guard


def test_a_guard_s_monitor_reads_its_verdicts(minilm_guard: OODGuard, tmp_path: Path) -> None:
    monitor = minilm_guard.monitor(tmp_path / "monitor.json")
    profile = minilm_guard.state.profile(minilm_guard.config.joined)
    assert list(monitor.calibration) == ["prompt", "response"]
    assert all(scores.size == minilm_guard.state.table.n_b for scores in monitor.calibration.values())
    rows = preference_rows(12, seed=3)
    decisions = minilm_guard.check([r["prompt"] for r in rows], [[r["chosen"], r["rejected"]] for r in rows])
    state = monitor.watch(decisions)
    # One of the answers to each prompt.
    assert (state.counted, state.flag_rate.n) == (12, 12)
    assert state.flag_rate.flagged == decisions.is_ood[::2].sum()
    direct = TrafficMonitor(profile.axis_scores(), alpha=0.05)
    scores = {axis: decisions.axis(axis).ood_scores[::2] for axis in ("prompt", "response")}
    assert same(direct.update(scores, flags=decisions.is_ood[::2]), state)

    monitor.save(tmp_path / "monitor.json")
    assert minilm_guard.monitor(tmp_path / "monitor.json").state.counted == 12
    assert monitor.watch(decisions, sessions=["one"] * 24).counted == 13
    response = minilm_guard.monitor(axes=["response"])
    assert list(response.calibration) == ["response"]
    assert response.watch(decisions).counted == 12
    with pytest.raises(InputError, match="judges"):
        minilm_guard.monitor(axes=["reward"])
    with pytest.raises(MismatchError, match="lifetime"):
        minilm_guard.monitor(tmp_path / "monitor.json", lifetime=20)
    with pytest.raises(InputError, match="watches"):
        TrafficMonitor({"response_given_prompt": CALIBRATION}).watch(decisions)


def test_vectors_from_elsewhere_have_a_monitor_of_their_channels(minilm_guard: OODGuard) -> None:
    """Without span lengths scores are standardised otherwise: the calibration scores that are compared with must be, too."""
    rng = np.random.default_rng(0)
    detector = minilm_guard.state.detectors["final"]
    decisions = minilm_guard.check_embeddings(rng.normal(size=(5, detector.n_features_in_)))
    monitor = minilm_guard.monitor(channels=["final"], with_lengths=False)
    assert list(monitor.calibration) == ["response"]
    assert monitor.watch(decisions).counted == 5
    p = [(1 + np.sum(monitor.calibration["response"] >= s)) for s in decisions.axis("response").ood_scores]
    n = minilm_guard.state.table.n_b
    assert decisions.axis("response").p_values == pytest.approx(
        stats.beta.ppf(0.95, p, n + 1 - np.array(p)), nan_ok=True
    )
    assert not np.array_equal(monitor.calibration["response"], minilm_guard.monitor().calibration["response"])


def test_items_that_a_guard_cannot_score_alarm(minilm_guard: OODGuard) -> None:
    monitor = minilm_guard.monitor()
    rows = preference_rows(20, seed=4)
    decisions = minilm_guard.check([r["prompt"] for r in rows], [f"{r['chosen']} {POISON}" for r in rows])
    state = monitor.watch(decisions)
    assert state.unscored == 20
    assert state.alarm
    assert state.flag_rate.flagged == 20


def test_answers_listed_flat_count_as_one_prompt(minilm_guard: OODGuard) -> None:
    rows = preference_rows(6, seed=3)
    prompts, answers = [r["prompt"] for r in rows], [[r["chosen"], r["rejected"]] for r in rows]
    before = len(minilm_guard._traffic._scores)
    flat = minilm_guard.check([p for p in prompts for _ in range(2)], [a for pair in answers for a in pair])
    assert len(minilm_guard._traffic._scores) == before + 6, "the first look takes one answer per prompt too"
    assert minilm_guard.monitor().watch(flat).counted == 6
    assert minilm_guard.monitor().watch(minilm_guard.check(prompts, answers)).counted == 6


def test_a_guard_that_was_calibrated_anew_is_noticed(minilm_guard: OODGuard, tmp_path: Path) -> None:
    guard = OODGuard.__new__(OODGuard)
    guard._bind(None, None, minilm_guard.config, minilm_guard.state)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5, guard.state.detectors["final"].n_features_in_))

    def judged() -> Any:
        return guard.check_embeddings(vectors)

    bound = guard.monitor(channels=["final"], with_lengths=False)
    other = TrafficMonitor({"response": CALIBRATION})
    assert bound.watch(judged()).counted == other.watch(judged()).counted == 5
    other.save(tmp_path / "monitor.json")
    table = guard.state.table
    moved = replace(table, scores=table.scores * 1.5)
    guard._swap(guard.state.with_table(moved, {}))
    for monitor in (bound, other, TrafficMonitor.load(tmp_path / "monitor.json", {"response": CALIBRATION})):
        with pytest.raises(MismatchError, match="made on another calibration"):
            monitor.watch(judged())
        assert monitor.state.counted == 5
    assert guard.monitor(channels=["final"], with_lengths=False).watch(judged()).counted == 5
