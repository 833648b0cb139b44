"""The same verdicts: of SmolLM2 and MiniLM compiled and eager, LoRA-wrapped and merged; and by every way to ask."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import preference_rows
from test_ways import assert_same, lora

from rm_ood import Decisions, OODGuard
from rm_ood.cli import main
from rm_ood.ray_data import Scorer
from rm_ood.reward_model import load_reward_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::rm_ood.CalibrationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning"),
]
ROWS = [{"prompt": f"say {i}?", "chosen": f"it is {i}", "rejected": f"no, {i + 1}"} for i in range(120)]
PROMPTS = [row["prompt"] for row in preference_rows(6, seed=5)]
RESPONSES = [row["chosen"] for row in preference_rows(6, seed=5)]
ITEMS = [*zip(PROMPTS, RESPONSES, strict=True), *((f"say {i}?", f"it is {i}") for i in range(200, 220))]
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


@pytest.fixture(scope="module")
def place(minilm: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MiniLM, a guard on it, and items as JSON Lines and Parquet."""
    folder = tmp_path_factory.mktemp("ways")
    model, tokenizer = copy.deepcopy(minilm[0]), minilm[1]
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    fitted(model, tokenizer).save_pretrained(folder / "guard")
    # Unlike the fit data, like them, and one without an answer.
    items = [{"id": f"item {i}", "prompt": p, "response": r} for i, (p, r) in enumerate(ITEMS)]
    items.append({"id": "none", "prompt": "hi", "response": ""})
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    pq.write_table(pa.Table.from_pylist(items), folder / "items.parquet")
    return folder


def test_python_command_line_and_ray_data_agree(place: Path, tmp_path: Path) -> None:
    items = [json.loads(line) for line in (place / "items.jsonl").read_text().splitlines()]
    guard = OODGuard.from_pretrained(place / "guard", *load_reward_model(str(place / "model")))
    decisions = guard.check([item["prompt"] for item in items], [item["response"] for item in items])
    expected = [{"id": item["id"], **d.to_dict()} for item, d in zip(items, decisions, strict=True)]
    assert 0 < sum(row["is_ood"] for row in expected) < len(items)

    paths = ["--guard", str(place / "guard"), "--model", str(place / "model"), "--no-progress"]
    jsonl = str(place / "items.jsonl")
    assert main(["check", *paths, "--data", jsonl, "--output", str(tmp_path / "rows.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == expected

    # What each actor runs, on batches as Ray may cut them; test_ray_data.py has a pool of them.
    actor = Scorer(str(place / "guard"), str(place / "model"), {}, "id", {})
    table = pq.read_table(place / "items.parquet")
    for start, length in ((0, 3), (3, 16), (19, 8)):
        rows = actor(table.slice(start, length)).to_pylist()
        for row, same in zip(rows, expected[start : start + length], strict=True):
            assert_same_row(row, same)


def assert_same_row(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal verdicts; numbers up to the rounding of float32 forwards of other batches."""
    exact = ("id", "is_ood", "p_value", "nearest_class", "reasons", "truncated")
    assert {name: one[name] for name in exact} == {name: other[name] for name in exact}
    assert one["reward"] == pytest.approx(other["reward"], rel=1e-4, abs=1e-5)
    for axis, verdict in other["axes"].items():
        assert {n: one["axes"][axis][n] for n in ("p_value", "is_ood")} == {
            n: verdict[n] for n in ("p_value", "is_ood")
        }
        for name, channel in verdict["channels"].items():
            assert one["axes"][axis]["channels"][name]["score"] == pytest.approx(channel["score"], rel=1e-3)
