from __future__ import annotations

import json
import sys
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from rm_ood.decision import AxisDecisions, ChannelDecision, ChannelDecisions, Decision, Decisions
from rm_ood.errors import InputError


def make(n: int = 4, *, classes: bool = True) -> Decisions:
    """n decisions whose numbers tell which row they are of; row 1 could not be scored."""
    rows = np.arange(n, dtype=float)
    scores = np.where(rows == 1, np.inf, rows)
    p = np.where(rows == 1, 0.01, 0.1 * (1 + rows))

    def channel(shift: float, k: int | None) -> ChannelDecisions:
        by_class = None if k is None else np.stack([scores + shift + c for c in range(k)], 1)
        return ChannelDecisions(scores + shift, scores - shift, p, by_class)

    return Decisions(
        rewards=np.where(rows == 1, np.nan, rows * 10),
        is_ood=p <= 0.05,
        p_values=p,
        axes={
            "prompt": AxisDecisions(scores, p, p <= 0.05, {"prompt/mean@0.5": channel(2, None)}),
            "response": AxisDecisions(scores + 1, p / 2, p / 2 <= 0.05, {"final": channel(1, 2)}),
        },
        nearest_class=np.where(rows == 1, -1, rows % 2).astype(np.int64) if classes else None,
        class_log_odds=np.where(rows == 1, np.nan, rows / 2) if classes else None,
        reasons=tuple(("non_finite",) if i == 1 else () for i in range(n)),
        truncated=rows == 2,
        prompt_index=np.arange(n) // 2,
        alpha=0.05,
    )


def test_one_item_is_its_row_of_the_arrays() -> None:
    decisions = make()
    one = decisions[2]
    assert isinstance(one, Decision)
    assert (one.reward, one.is_ood, one.reasons, one.truncated) == (20.0, False, (), True)
    assert one.p_value == pytest.approx(0.3)
    assert (one.nearest_class, one.class_log_odds) == ("chosen", 1.0)
    assert one.axes["prompt"].channels["prompt/mean@0.5"] == ChannelDecision(4.0, 0.0, one.p_value, None)
    assert one.axes["response"].channels["final"].class_scores == (3.0, 4.0)
    assert decisions[3].nearest_class == "rejected"
    assert [type(v) for v in (one.reward, one.is_ood, one.p_value, one.truncated)] == [float, bool, float, bool]
    with pytest.raises(FrozenInstanceError):
        one.reward = 0.0  # type: ignore[misc]


def test_an_item_that_could_not_be_scored_has_no_class() -> None:
    one = make()[1]
    assert one.nearest_class is None
    assert one.is_ood
    assert one.reasons == ("non_finite",)
    assert make(classes=False)[2].nearest_class is None
    assert make(classes=False)[2].class_log_odds is None


def test_decisions_are_a_sequence() -> None:
    decisions = make()
    assert len(decisions) == 4
    assert [d.truncated for d in decisions] == [False, False, True, False]
    assert decisions[-1] == decisions[3] == decisions[np.int64(3)]
    for index in (4, -5):
        with pytest.raises(IndexError):
            decisions[index]
    assert list(make(0)) == []


@pytest.mark.parametrize(
    "index",
    [
        slice(1, 3),
        slice(None, None, -1),
        [3, 0],
        np.array([3, 0]),
        np.array([True, False, True, False]),
        [],
        slice(9, 9),
    ],
    ids=str,
)
@pytest.mark.parametrize("classes", [True, False])
def test_a_part_holds_the_same_rows_everywhere(index: Any, classes: bool) -> None:
    decisions = make(classes=classes)
    index = np.array(index, dtype=int) if isinstance(index, list) and not index else index
    rows = np.arange(4)[index].tolist()
    part = decisions[index]
    assert isinstance(part, Decisions)
    assert len(part) == len(rows)
    # repr, as NaN is not equal to itself.
    assert [repr(d) for d in part] == [repr(decisions[i]) for i in rows]
    assert part.prompt_index.tolist() == [i // 2 for i in rows]
    assert part.alpha == 0.05
    assert part.axis("response").channel("final").scores.shape == (len(rows),)


def test_an_axis_or_channel_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"axis 'answer': this guard judges \['prompt', 'response'\]"):
        make().axis("answer")
    with pytest.raises(InputError, match=r"channel 'final': this axis has \['prompt/mean@0.5'\]"):
        make().axis("prompt").channel("final")


def test_a_row_is_valid_json_with_null_for_what_has_no_number() -> None:
    decisions = make()
    rows = [json.loads(json.dumps(d.to_dict(), allow_nan=False)) for d in decisions]
    assert list(rows[0]) == [
        "reward", "is_ood", "p_value", "axes", "nearest_class", "class_log_odds", "reasons", "truncated",
    ]  # fmt: skip
    bad = rows[1]
    assert (bad["reward"], bad["class_log_odds"], bad["nearest_class"], bad["reasons"]) == (
        None,
        None,
        None,
        ["non_finite"],
    )
    assert bad["is_ood"] is True
    final = bad["axes"]["response"]["channels"]["final"]
    assert (final["score"], final["ood_score"], final["class_scores"], final["p_value"]) == (
        None,
        None,
        [None, None],
        0.01,
    )
    assert set(rows[2]["axes"]["prompt"]) == {"ood_score", "p_value", "is_ood", "channels"}
    assert rows[2]["axes"]["prompt"]["channels"]["prompt/mean@0.5"]["class_scores"] is None
    assert rows[2]["axes"]["response"]["channels"]["final"]["class_scores"] == [3.0, 4.0]


def test_columns_hold_the_rows() -> None:
    columns = make().to_dict()
    assert columns["truncated"] == [False, False, True, False]
    assert columns["axes"][2] == make()[2].to_dict()["axes"]
    empty = make(0).to_dict()
    assert set(empty) == set(columns)
    assert not any(empty.values())


def test_pandas_gets_flat_columns() -> None:
    pytest.importorskip("pandas")
    frame = make().to_pandas()
    assert frame.shape[0] == 4
    assert frame["response.final.score"].tolist()[2:] == [3.0, 4.0]
    assert frame["response.is_ood"].tolist() == [True, True, False, False]
    assert frame["nearest_class"].tolist()[0] == "chosen"
    assert frame["nearest_class"].isna().tolist() == [False, True, False, False]
    assert frame["prompt.prompt/mean@0.5.p_value"].tolist() == frame["p_value"].tolist()
    assert {"reward", "class_log_odds", "reasons", "truncated", "prompt_index"} <= set(frame.columns)
    assert not {"nearest_class", "class_log_odds"} & set(make(classes=False).to_pandas().columns)


def test_pandas_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="needs pandas: pip install pandas"):
        make().to_pandas()
