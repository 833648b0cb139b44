from __future__ import annotations

import numpy as np
import pytest

from rm_ood.traffic import REQUESTS, TrafficCheck


def feed(check: TrafficCheck, scores: np.ndarray, size: int = 100) -> list[str]:
    """Messages of calls of `size` items."""
    messages = (check.update(scores[i : i + size]) for i in range(0, len(scores), size))
    return [m for m in messages if m is not None]


def test_traffic_like_the_calibration_data_is_silent() -> None:
    # At level 1e-3 a hundred repetitions expect a tenth of a message; two have probability .005.
    messages = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        messages += len(feed(TrafficCheck(rng.normal(size=300)), rng.normal(size=REQUESTS)))
    assert messages <= 1


@pytest.mark.parametrize(("shift", "word"), [(0.5, "higher"), (-0.5, "lower")])
def test_shifted_traffic_is_named_once_with_its_side(shift: float, word: str) -> None:
    rng = np.random.default_rng(0)
    check = TrafficCheck(rng.normal(size=300))
    scores = rng.normal(size=3 * REQUESTS) + shift
    (message,) = feed(check, scores)
    assert f"the first {REQUESTS} items score {word} than the calibration data" in message
    assert "call calibrate()" in message
    odds = float(message.split("outscores a calibration prompt ")[1].split(")")[0])
    assert odds == pytest.approx(0.64 if shift > 0 else 0.36, abs=0.05)


def test_nothing_is_said_before_enough_items_came() -> None:
    check = TrafficCheck(np.zeros(300))
    assert check.update(np.ones(REQUESTS - 1)) is None
    assert check.update(np.empty(0)) is None
    message = check.update(np.ones(5))
    assert message is not None
    assert f"the first {REQUESTS + 4} items" in message
    assert check.update(np.ones(REQUESTS)) is None


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_items_that_could_not_be_scored_count_as_the_strangest(value: float) -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=REQUESTS)
    few, many = scores.copy(), scores.copy()
    few[:2], many[:300] = value, value
    calibration = rng.normal(size=300)
    assert feed(TrafficCheck(calibration), few) == []
    (message,) = feed(TrafficCheck(calibration), many)
    assert "score higher" in message
    assert "nan" not in message
