"""The same verdicts: of SmolLM2 and MiniLM compiled and eager, LoRA-wrapped and merged. By every way to ask: test_ray_serve."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import preference_rows
from test_ways import assert_same, lora

from rm_ood import Decisions, OODGuard

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
]
ROWS = [{"prompt": f"say {i}?", "chosen": f"it is {i}", "rejected": f"no, {i + 1}"} for i in range(120)]
PROMPTS = [row["prompt"] for row in preference_rows(6, seed=5)]
RESPONSES = [row["chosen"] for row in preference_rows(6, seed=5)]
# float32 in both; compiled kernels reorder sums over 30 layers (NOTES 4.1 allow 1e-4 on vectors).
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(params=["MiniLM", pytest.param("SmolLM2", marks=pytest.mark.smollm2)])
def real(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    model, tokenizer = request.getfixturevalue(request.param.lower())
    yield copy.deepcopy(model), tokenizer
    torch._dynamo.reset()


def fitted(model: Any, tokenizer: Any) -> OODGuard:
    return OODGuard(model, tokenizer, alpha=0.2, max_length=64).fit(ROWS, calibration=0.7, progress=False)


def verdicts(guard: OODGuard) -> Decisions:
    return guard.check(PROMPTS, RESPONSES)


def test_compiled_and_eager_agree(real: tuple[Any, Any]) -> None:
    model, tokenizer = real
    guard = fitted(model, tokenizer)
    eager = verdicts(guard)
    guard.detach()
    compiled = OODGuard(torch.compile(model, backend="aot_eager", dynamic=True), tokenizer, alpha=0.2, max_length=64)
    compiled._swap(guard._fitted())
    assert_same(verdicts(compiled), eager, **TOLERANCE)


def test_lora_wrapped_and_merged_agree(real: tuple[Any, Any]) -> None:
    model, tokenizer = real
    wrapped = lora(model, spread=0.02)
    guard = fitted(wrapped, tokenizer)
    before = verdicts(guard)
    merged = wrapped.merge_and_unload()
    other = OODGuard(merged, tokenizer, alpha=0.2, max_length=64)
    other._swap(guard._fitted())
    assert_same(verdicts(other), before, **TOLERANCE)


def assert_same_row(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal verdicts; numbers up to the rounding of float32 forwards of other batches."""

    def near(value: float | None, **tolerance: float) -> Any:
        return value if value is None else pytest.approx(value, **tolerance)

    exact = ("id", "is_ood", "p_value", "nearest_class", "reasons", "truncated")
    assert {name: one[name] for name in exact} == {name: other[name] for name in exact}
    assert one["reward"] == near(other["reward"], rel=1e-4, abs=1e-5)
    for axis, verdict in other["axes"].items():
        assert {n: one["axes"][axis][n] for n in ("p_value", "is_ood")} == {
            n: verdict[n] for n in ("p_value", "is_ood")
        }
        for name, channel in verdict["channels"].items():
            assert one["axes"][axis]["channels"][name]["score"] == near(channel["score"], rel=1e-3)
