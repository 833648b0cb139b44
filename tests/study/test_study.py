"""A whole study on a real reward model: one forward per text, the numbers, the document, what is written."""

from __future__ import annotations

import gzip
import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import POISON, preference_rows
from sklearn.metrics import roc_auc_score

from rm_ood import InputError, OODGuard
from rm_ood.detectors.baselines import VectorNorm
from rm_ood.study.findings import fall
from rm_ood.study.pairs import Pair, read_pairs
from rm_ood.study.report import html_page, markdown
from rm_ood.study.scorer import Scorer
from rm_ood.study.shifts import Condition, conditions
from rm_ood.study.study import Study, run_study
from rm_ood.study.terminal import table as terminal_table

SHIFTS = ("word noise:response:0.5", "character noise:prompt:0.2", "repeated token:response:1")
FLAGS = ("combined", "prompt", "response")
CHANNELS = {
    "prompt": {"prompt/mean@0.67", "prompt/contrast@0.67"},
    "response": {"final", "response/mean@0.67", "response/contrast@0.67", "reward", "low reward"},
}


@pytest.fixture(scope="module")
def rows() -> list[Pair]:
    """40 rows of 38 prompts; one row has three rejected responses, one a tie, one a reward that is NaN."""
    raw: list[dict[str, Any]] = [
        {"id": f"row {i}", "kind": "ab"[i % 2], **r} for i, r in enumerate(preference_rows(40, seed=3))
    ]
    raw[3]["rejected"] = [raw[3]["rejected"], "something else", "and a third answer"]
    raw[5]["prompt"] = raw[4]["prompt"]
    raw[7]["prompt"] = raw[6]["prompt"]
    raw[9]["rejected"] = f"a {POISON} in the garden"
    # Two texts that the tokenizer reads alike have one reward.
    raw[11]["rejected"] = raw[11]["chosen"].upper()
    return read_pairs(raw, subset="kind")


@pytest.fixture(scope="module")
def study(minilm_guard: OODGuard, rows: list[Pair]) -> Study:
    baselines = {"norm": ("final", VectorNorm().fit(np.zeros((2, 384))))}
    made = conditions(rows, SHIFTS)
    return run_study(minilm_guard, rows, made, baselines=baselines, n_bootstrap=50, n_examples=2, progress=False)


def test_the_document_is_that_of_the_specification(study: Study, rows: list[Pair]) -> None:
    doc = json.loads(json.dumps(study.to_dict(), allow_nan=False))
    assert set(doc) == {
        "title", "model", "channels", "alpha", "confidence", "seed", "versions", "seconds", "command", "calibration",
        "dropped", "threshold", "id", "shifts", "examples",
    }  # fmt: skip
    _check_pairs(doc["id"], paired=True)
    _check_flags(doc["id"])
    assert doc["id"]["false_alarm_rate"] == doc["id"]["flag_rate"]["combined"]
    assert [(r["name"], r["side"], r["severity"], r["paired"]) for r in doc["shifts"]] == [
        ("word noise", "response", 0.5, True),
        ("character noise", "prompt", 0.2, True),
        ("repeated token", "response", 1.0, False),
    ]
    for row in doc["shifts"]:
        assert row["n"] == len(rows)
        _check_pairs(row, paired=row["paired"])
        _check_flags(row)
        _check_detection(row)
        assert set(row["reward_change"]) == {"mean", "raised"}
    assert {example["shift"] for example in doc["examples"]} <= {
        "clean", "word noise 0.5", "character noise 0.2", "repeated token 1",
    }  # fmt: skip
    assert all(set(e) == {"shift", "side", "prompt", "response", "p_value", "reward"} for e in doc["examples"])
    assert all(e["p_value"] <= doc["alpha"] for e in doc["examples"])


def _check_pairs(found: dict[str, Any], *, paired: bool) -> None:
    assert set(found["subsets"]) == {"a", "b"}
    for subset in found["subsets"].values():
        assert set(subset) == {"n", "accuracy", "ece", "flag_rate"}
        assert (subset["accuracy"] is None) == (not paired)
    several = ("metrics", "reliability", "risk_coverage", "margins", "selective")
    assert all((found[name] is None) == (not paired) for name in ("accuracy", "accuracy_all", "ece", *several))
    if not paired:
        assert found["intervals"]["accuracy"] is None
        return
    assert set(found["metrics"]) == {
        "n_pairs", "accuracy", "ties", "confidence", "ece", "ece_equal_mass", "ece_debiased", "mce", "brier", "nll",
        "temperature", "ece_at_id_temperature", "length_reward_correlation",
    }  # fmt: skip
    assert found["accuracy"] == found["metrics"]["accuracy"]
    n, rel = found["metrics"]["n_pairs"], found["reliability"]
    assert len(rel["edges"]) - 1 == len(rel["confidence"]) == len(rel["accuracy"]) == len(rel["count"])
    assert sum(rel["count"]) == sum(found["margins"]["count"]) == n
    assert found["risk_coverage"]["coverage"][-1] == 1
    assert found["risk_coverage"]["accuracy"][-1] == pytest.approx(found["accuracy"], abs=1e-5)
    assert found["selective"]["flagged"]["n"] + found["selective"]["unflagged"]["n"] == n
    for name in ("accuracy", "ece"):
        low, high = found["intervals"][name]
        assert 0 <= low <= high <= 1


def _check_flags(found: dict[str, Any]) -> None:
    assert set(found["flag_rate"]) == set(FLAGS)
    for name in FLAGS:
        low, high = found["intervals"]["flag_rate"][name]
        assert 0 <= low <= high <= 1
    edges, count = found["ood_scores"]["edges"], found["ood_scores"]["count"]
    assert len(edges) == len(count) + 1
    assert all(a < b for a, b in pairwise(edges))
    # One response of each of the 38 prompts.
    assert sum(count) == found["n_judged"] == 38


def _check_detection(row: dict[str, Any]) -> None:
    expected = {
        "combined": {"default"},
        "prompt": {"default", *CHANNELS["prompt"]},
        "response": {"default", "norm", *CHANNELS["response"]},
        "pair": {"energy", "max softmax"},
    }
    spans = row["intervals"]
    tables = [row["auroc"], row["fpr95"]["id_positive"], row["fpr95"]["ood_positive"]]
    tables += [spans["auroc"], spans["fpr95_id_positive"], spans["fpr95_ood_positive"]]
    for table in tables:
        assert {axis: set(by) for axis, by in table.items()} == expected
    assert set(row["roc"]) == {f"{axis}/{name}" for axis, names in expected.items() for name in names}
    for name, curve in row["roc"].items():
        assert 2 <= len(curve["fpr"]) == len(curve["tpr"]) <= 100
        axis, _, detector = name.partition("/")
        low, high = spans["auroc"][axis][detector]
        assert low - 0.1 <= row["auroc"][axis][detector] <= high + 0.1


def test_numbers_are_those_of_a_brute_force_check(study: Study, minilm_guard: OODGuard, rows: list[Pair]) -> None:
    """Everything again from `guard.check`, pair by pair."""
    doc = study.to_dict()
    table = study.frame()
    shifted = list(conditions(rows, SHIFTS))
    found_of = [*((c.name, c.rows, r) for c, r in zip(shifted, doc["shifts"], strict=True))]
    for name, made, found in [("clean", rows, doc["id"]), *found_of]:
        decisions = minilm_guard.check([r.prompt for r in made], [[r.chosen, *r.rejected] for r in made])
        own = table[table.condition == name]
        np.testing.assert_allclose(own.reward.astype(float), decisions.rewards, atol=1e-5)
        np.testing.assert_allclose(own.p_value, decisions.p_values, atol=1 / 60)
        rewards = [decisions.rewards[decisions.prompt_index == i] for i in range(len(made))]
        wins = [
            0.5 if row[0] == other else float(row[0] > other)
            for row in own.groupby("id", sort=False).reward.apply(lambda v: v.astype(float).tolist())
            for other in row[1:]
            if not math.isnan(row[0]) and not math.isnan(other)
        ]
        scored = [np.isfinite(r[0]) & np.isfinite(other) for r in rewards for other in r[1:]]
        assert found["unscored_pairs"] == len(scored) - sum(scored) >= (name != "repeated token")
        if found.get("paired", True):
            assert found["accuracy"] == pytest.approx(np.mean(wins))
            assert found["metrics"]["n_pairs"] == len(wins)
            whole = [r for r in rewards if np.isfinite(r).all()]
            beats = [float(r[0] > r[1:].max() + 1e-6) + 0.5 * (abs(r[0] - r[1:].max()) <= 1e-6) for r in whole]
            assert found["accuracy_all"] == pytest.approx(np.mean(beats))


def test_detection_is_that_of_one_response_per_prompt(study: Study, rows: list[Pair]) -> None:
    table = study.frame()
    prompts = {row.id: row.cluster for row in rows}
    table["cluster"] = table.id.map(prompts)
    for name, found in [("word noise", study.doc["shifts"][0]), ("character noise", study.doc["shifts"][1])]:
        both = table[table.condition.isin(["clean", name])]
        # The draw: which of the rows' responses give the flag rate of the document is not told, but the same in both.
        draws = _draws(study, rows)
        drawn = both[[(row.id, row.which) in draws for row in both.itertuples()]]
        assert (drawn.groupby(["condition", "cluster"]).size() == 1).all()
        is_ood = drawn.condition == name
        for axis, column, detector in [
            ("response", "final.ood_score", "final"),
            ("prompt", "prompt.ood_score", "default"),
            ("response", "response.ood_score", "default"),
            ("response", "baseline.norm", "norm"),
        ]:
            # What cannot be scored is as far out as can be.
            score = drawn[column].astype(float).fillna(1e9)
            assert found["auroc"][axis][detector] == pytest.approx(roc_auc_score(is_ood, score), abs=1e-9)
        assert found["flag_rate"]["combined"] == pytest.approx(drawn[is_ood].is_ood.mean())
        assert study.doc["id"]["false_alarm_rate"] == pytest.approx(drawn[~is_ood].is_ood.mean())


def _draws(study: Study, rows: list[Pair]) -> set[tuple[str, str]]:
    """(id, which) of the responses drawn, by the rule of the documentation: coin and row from hashes of the prompt."""
    from rm_ood.preferences import stable_hash

    chosen: dict[int, Pair] = {}
    for row in rows:
        other = chosen.get(row.cluster)
        if other is None or stable_hash(row.id, 0) < stable_hash(other.id, 0):
            chosen[row.cluster] = row
    drawn = set()
    for cluster, row in chosen.items():
        coin = stable_hash(f"study {cluster:016x}", 0)
        which = f"rejected[{(coin >> 1) % len(row.rejected)}]" if coin & 1 else "chosen"
        drawn.add((row.id, which))
    return drawn


def test_the_coin_is_not_that_of_the_split() -> None:
    """Prompts that a fit held out are on one side of its own hash; half of them still are judged by their chosen response."""
    from rm_ood.preferences import hash_fraction, prompt_key
    from rm_ood.study.judged import Judged

    raw = [row for row in preference_rows(600, seed=5) if hash_fraction(prompt_key(row["prompt"]), 0) < 0.3]
    made = read_pairs(raw)
    judged = Judged(Condition("clean", "none", None, made), None, None, {}, 0)  # type: ignore[arg-type]
    share = float(np.mean(judged.draw.items % 2 == 0))
    assert 0.4 < share < 0.6


def test_rows_that_a_condition_lacks_are_no_part_of_its_baseline(minilm_guard: OODGuard, tmp_path: Path) -> None:
    """A language with some of the ids alone has the numbers of a study of these rows, whatever the other rows are."""
    common = [{"id": f"q{i}", "lang": "en", **row} for i, row in enumerate(preference_rows(24, seed=3))]
    # Rows whose preference is the wrong way round, and far out.
    extra = [
        {
            **row,
            "id": f"x{i}",
            "prompt": f"{i} какой сегодня день",
            "chosen": row["rejected"],
            "rejected": row["chosen"],
        }
        for i, row in enumerate(common)
    ]
    other = [
        {**row, "lang": lang, "prompt": f"{lang} {row['prompt']} pregunta", "chosen": f"que {row['chosen']}"}
        for lang, n in (("es", 24), ("ca", 24), ("de", 12))
        for row in common[:n]
    ]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in other), encoding="utf-8")
    studies = []
    for rows in (read_pairs([*extra, *common]), read_pairs(common)):
        made = conditions(rows, [f"aligned={path}:common"])
        # One cache: batches of other rows would move the scores by a rounding.
        cache = tmp_path / "scores.sqlite"
        studies.append(run_study(minilm_guard, rows, made, cache=cache, n_bootstrap=20, progress=False).to_dict())
    mixed, alone = studies
    assert [(r["name"], r["n"]) for r in mixed["shifts"][::3]] == [("ca", 24), ("de", 12), ("es", 24)]
    names = ("accuracy", "ece", "auroc", "fpr95", "roc", "flag_rate", "intervals", "reward_change", "n_judged")
    for one, two in zip(mixed["shifts"], alone["shifts"], strict=True):
        for name in names:
            assert one[name] == two[name], (one["name"], one["side"], name)
    de, es = mixed["shifts"][3], mixed["shifts"][6]
    assert alone["shifts"][6]["baseline"] is None
    assert es["baseline"]["n"] == 24
    assert de["baseline"]["n"] == 12
    for name in ("accuracy", "ece", "flag_rate", "false_alarm_rate", "reliability", "intervals"):
        assert es["baseline"][name] == alone["id"][name]
    assert fall(mixed, es) == fall(alone, alone["shifts"][6])
    for text in (terminal_table(mixed), markdown(mixed), html_page(mixed)):
        assert "clean rows of ca, es" in text
        assert "clean rows of de" in text
    assert "clean rows of es" not in terminal_table(alone)


def test_what_cannot_be_scored_counts_as_flagged(minilm_guard: OODGuard, rows: list[Pair]) -> None:
    rows = [row for row in rows if row.id != "row 9"]
    poisoned = [
        replace(row, chosen=f"a {POISON}", rejected=tuple(f"{r} {POISON}" for r in row.rejected)) for row in rows
    ]
    unread = [replace(row, chosen="\ud800", rejected=("\udfff",)) for row in rows]
    made = [Condition("nan", "response", None, poisoned), Condition("unread", "response", None, unread)]
    found = run_study(minilm_guard, rows, made, n_bootstrap=0, progress=False).to_dict()
    json.dumps(found, allow_nan=False)
    for row, reason in zip(found["shifts"], ("non_finite", "unreadable_input"), strict=True):
        assert row["flag_rate"] == dict.fromkeys(FLAGS, 1.0)
        assert row["auroc"]["combined"]["default"] == row["auroc"]["pair"]["energy"] == 1
        assert row["accuracy"] is None
        assert row["metrics"] is None
        assert row["reasons"][reason] == row["n_judged"] == 37
        assert row["unscored_pairs"] == sum(len(r.rejected) for r in (poisoned if reason == "non_finite" else unread))
        assert row["reward_change"] is None
        assert row["intervals"]["auroc"]["combined"]["default"] is None
    with pytest.raises(InputError, match=r"rows\[2\]\.chosen: lone surrogate"):
        run_study(minilm_guard, [*rows[:2], unread[2]], [], progress=False)


def test_a_study_reads_each_distinct_text_once(minilm_guard: OODGuard, rows: list[Pair], read: Any) -> None:
    with Scorer(minilm_guard) as scorer:
        made = conditions(rows[:9], ["best of n:response:4", *SHIFTS], reward=scorer.rewards)
        found = run_study(minilm_guard, rows[:9], made, scorer=scorer, n_bootstrap=0, progress=False)
    assert set(read.values()) == {1}
    assert found.n_forwarded == read.total() <= found.n_texts
    best = found.doc["shifts"][0]
    assert best["name"] == "best of n"
    assert best["reward_change"]["mean"] > 0


def test_an_interrupted_study_goes_on_and_ends_the_same(
    minilm_guard: OODGuard, rows: list[Pair], read: Any, tmp_path: Path
) -> None:
    def once() -> dict[str, Any]:
        made = conditions(rows, SHIFTS)
        found = run_study(minilm_guard, rows, made, cache=tmp_path / "c.sqlite", n_bootstrap=20, progress=False)
        return {name: value for name, value in found.to_dict().items() if name != "seconds"}

    read.stop_after = 100
    with pytest.raises(KeyboardInterrupt):
        once()
    assert 100 <= read.total() < 132
    read.stop_after = None
    resumed = once()
    assert set(read.values()) == {1}
    read.clear()
    (tmp_path / "c.sqlite").unlink()
    assert once() == resumed
    assert once() == resumed
    assert set(read.values()) == {1}


def test_files_hold_the_same_numbers(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    folder = tmp_path / "new" / "study"
    files = study.save(folder)
    assert [f.name for f in files] == ["study.json", "report.html", "report.md", "scores.parquet"]
    assert json.loads((folder / "study.json").read_text()) == json.loads(json.dumps(study.to_dict()))
    table = pandas.read_parquet(folder / "scores.parquet")
    pandas.testing.assert_frame_equal(table, study.frame(), check_dtype=False)
    assert len(table) == 4 * (2 * 40 + 2)
    assert list(table.columns[:10]) == [
        "condition", "side", "severity", "id", "subset", "which", "reward", "is_ood", "p_value", "reasons",
    ]  # fmt: skip
    for name in ("prompt.p_value", "response.ood_score", "final.score", "response/mean@0.67.p_value", "reward.score"):
        assert name in table.columns
    assert sorted(set(table.which)) == ["chosen", "rejected[0]", "rejected[1]", "rejected[2]"]
    assert table.reward.isna().sum() == study.doc["shifts"][0]["unscored_pairs"] + 2
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert study.save(folder)[-1].name == "scores.jsonl.gz"
    with gzip.open(folder / "scores.jsonl.gz", "rt", encoding="utf-8") as lines:
        first = json.loads(next(lines))
        assert 1 + sum(1 for _ in lines) == len(table)
    assert first["id"] == "row 0"
    assert first["final.score"] == table["final.score"][0]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        study.frame()


def test_a_guard_with_one_axis_and_one_channel(minilm_guard: OODGuard, rows: list[Pair]) -> None:
    state = minilm_guard.state
    minilm_guard._swap(state.with_settings({"axes": ("response",), "channels": ("final",)}))
    try:
        made = conditions(rows, SHIFTS[:1])
        found = run_study(minilm_guard, rows, made, n_bootstrap=0, progress=False).to_dict()
    finally:
        minilm_guard._swap(state)
    assert found["channels"] == ["final"]
    assert found["shifts"][0]["flag_rate"]["prompt"] is None
    assert set(found["shifts"][0]["auroc"]) == {"combined", "response", "pair"}


def test_bad_calls_are_told_before_any_forward(minilm_guard: OODGuard, rows: list[Pair], read: Any) -> None:
    with pytest.raises(InputError, match="rows: none"):
        run_study(minilm_guard, [], [])
    with pytest.raises(InputError, match=r"no rows in \['odd, prompt'\]"):
        run_study(minilm_guard, rows, [Condition("odd", "prompt", None, [])])
    with Scorer(minilm_guard) as scorer, pytest.raises(InputError, match="pass those to Scorer"):
        run_study(minilm_guard, rows, [], scorer=scorer, baselines={"n": ("final", VectorNorm())})
    assert not read


def test_a_guard_by_column_ranks_rows_in_their_subset(minilm_guard: OODGuard, rows: list[Pair]) -> None:
    guard = OODGuard(minilm_guard.model, minilm_guard.tokenizer, alpha=0.2, max_length=64, groups="kind")
    calibration = [{"kind": "ab"[i % 2], **row} for i, row in enumerate(preference_rows(115, seed=1))]
    fit = [{"kind": "a", **row} for row in preference_rows(60)]
    with pytest.warns(match="fewer than 10"):
        guard.fit(fit, calibration=calibration, progress=False)
    found = run_study(guard, rows, [], n_bootstrap=0, progress=False).to_dict()
    assert found["threshold"] is None
    responses = [row.responses for row in rows]
    groups = [str(row.subset) for row in rows for _ in row.responses]
    whole = guard.check([row.prompt for row in rows], responses, groups=groups)
    assert found["id"]["subsets"]["a"]["n"] == 20
    table = run_study(guard, rows, [], n_bootstrap=0, progress=False).frame()
    assert (table.is_ood == whole.is_ood).mean() > 0.97
    with pytest.raises(InputError, match="read the rows with subset='kind'"):
        run_study(guard, [replace(row, subset=None) for row in rows], [])
    guard.detach()
