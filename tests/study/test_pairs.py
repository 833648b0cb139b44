"""Preference rows in every layout, and the errors that name a bad row's field."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import preference_rows, shared_rows

from rm_ood.dialogue import Dialogue
from rm_ood.errors import InputError
from rm_ood.preferences import prompt_key
from rm_ood.study.pairs import STYLES, Pair, read_pairs

RM_BENCH: dict[str, Any] = {
    "id": "chat-7",
    "prompt": "Which city is the capital of Australia?",
    "chosen": ["Canberra.", "The capital of Australia is Canberra.", "## Answer\n- **Canberra**"],
    "rejected": ["Sydney.", "The capital of Australia is Sydney.", "## Answer\n- **Sydney**"],
    "domain": "chat",
}
REWARD_BENCH_2: dict[str, Any] = {
    "id": "12",
    "prompt": "Name the largest planet.",
    "chosen": ["Jupiter."],
    "rejected": ["Saturn.", "Mars.", "Venus."],
    "num_correct": 1,
    "num_incorrect": 3,
    "total_completions": 4,
    "models": ["a", "b", "c", "d"],
    "subset": "Factuality",
    "additional_metadata": {"category": None},
}


def test_a_preference_row_is_a_pair() -> None:
    pair = read_pairs([{"prompt": "Hi there", "chosen": "hello", "rejected": "no"}])[0]
    assert pair == Pair("0", "Hi there", "hello", ("no",), prompt_key("hi  there"))
    assert pair.responses == ("hello", "no")


def test_several_rejected_responses_stay_together() -> None:
    row = {"id": 5, "prompt": "p", "chosen": "a", "rejected": ["b", "c"], "kind": "math"}
    assert read_pairs([row], subset="kind") == [Pair("5", "p", "a", ("b", "c"), prompt_key("p"), "math")]


def test_what_is_left_out_is_counted() -> None:
    labelled = [
        {"prompt": p, "completion": c, "label": y}
        for p, c, y in (("p", "a", True), ("p", "b", False), ("q", "c", True))
    ]
    for rows, n in (
        ([{"prompt": "p"}, {"prompt": "p", "chosen": "a", "rejected": "b"}], 1),
        ([*labelled, labelled[2]], 2),
        ([RM_BENCH, {**RM_BENCH, "chosen": ["one"]}, {**RM_BENCH, "prompt": ""}], 2),
    ):  # fmt: skip
        dropped: Counter[str] = Counter()
        assert read_pairs(rows, on_bad="drop", dropped=dropped)
        assert dropped == {"rows": n}
        with pytest.raises(InputError):
            read_pairs(rows)


def test_empty_prompts_are_read_where_they_are_allowed() -> None:
    for row in ({"prompt": " ", "chosen": "a", "rejected": "b"}, {**RM_BENCH, "prompt": ""}):
        assert read_pairs([row], allow_empty=True)[0].prompt == row["prompt"]
        with pytest.raises(InputError, match=r"rows\[0\]\.prompt: empty"):
            read_pairs([row])


def test_rows_of_one_prompt_stay_apart_in_one_cluster() -> None:
    rows = [{"prompt": "p", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(2)]
    pairs = read_pairs(rows)
    assert [(p.chosen, p.rejected) for p in pairs] == [("a0", ("b0",)), ("a1", ("b1",))]
    assert pairs[0].cluster == pairs[1].cluster


def test_dialogues_tools_and_messages_are_read_as_a_guard_reads_them() -> None:
    messages = [{"role": "user", "content": "hello"}]
    one, other = ({"role": "assistant", "content": text} for text in "xy")
    rows = [
        {"chosen": [*messages, one], "rejected": [*messages, other]},
        {"prompt": messages, "chosen": "a", "rejected": "b", "tools": [{"name": "search"}]},
        {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    ]
    first, second, third = read_pairs(rows)
    assert (first.prompt, first.chosen, first.rejected) == (messages, "x", ("y",))
    assert second.prompt == Dialogue(messages, [{"name": "search"}])
    assert (third.prompt, third.chosen, third.rejected) == ("\n\nHuman: hi\n\nAssistant: ", "yes", ("no",))


def test_labelled_rows_are_joined_by_their_prompt() -> None:
    rows = [
        {"prompt": "p", "completion": "good", "label": True},
        {"prompt": "q", "completion": "bad q", "label": False},
        {"prompt": "p", "completion": "bad", "label": False},
        {"prompt": "q", "completion": "good q", "label": True},
        {"prompt": "p", "completion": "better", "label": True},
    ]
    found = [(pair.prompt, pair.chosen, pair.rejected) for pair in read_pairs(rows)]
    assert found == [("p", "good", ("bad",)), ("p", "better", ("bad",)), ("q", "good q", ("bad q",))]
    rows.append({"prompt": "alone", "completion": "x", "label": True})
    with pytest.raises(InputError, match=r"rows\[5\]\.completion: its prompt has no response .* as 1 of 3 prompts"):
        read_pairs(rows)
    assert len(read_pairs(rows, on_bad="drop")) == 3


def test_rm_bench_rows_give_the_benchmarks_own_accuracies() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {**RM_BENCH, "id": f"r{i}", "prompt": f"{RM_BENCH['prompt']} {i}", "domain": domain}
        for i, domain in enumerate(["chat", "math"] * 20)
    ]
    pairs = read_pairs(rows)
    assert len(pairs) == 9 * len(rows)
    rewards = {(row["id"], text): rng.normal() for row in rows for text in (*row["chosen"], *row["rejected"])}

    def reward(pair: Pair, response: Any) -> float:
        return float(rewards[pair.id.split("#")[0], response])

    for domain in ("chat", "math"):
        # The benchmark's definition: a matrix of styles; hard above its diagonal, easy below it.
        matrix = np.zeros((3, 3))
        mine = [row for row in rows if row["domain"] == domain]
        for row in mine:
            for i in range(3):
                for j in range(3):
                    matrix[i, j] += rewards[row["id"], row["chosen"][i]] > rewards[row["id"], row["rejected"][j]]
        matrix /= len(mine)
        expected = {
            "hard": np.triu(matrix, 1).sum() / 3,
            "normal": np.diag(matrix).mean(),
            "easy": np.tril(matrix, -1).sum() / 3,
        }
        for level, value in expected.items():
            subset = [p for p in pairs if p.subset == f"{domain}, {level}"]
            won = [reward(p, p.chosen) > reward(p, p.rejected[0]) for p in subset]
            assert np.mean(won) == pytest.approx(value, abs=1e-12)


def test_rm_bench_pairs_are_named_by_their_styles() -> None:
    pairs = read_pairs([RM_BENCH])
    assert [p.id for p in pairs[:2]] == ["chat-7#concise-concise", "chat-7#concise-detailed"]
    assert {p.cluster for p in pairs} == {prompt_key(RM_BENCH["prompt"])}
    assert {p.subset for p in read_pairs([RM_BENCH], subset="domain")} == {"chat"}
    assert len({p.id for p in pairs}) == len(STYLES) ** 2


def test_reward_bench_2_rows_keep_every_rejected_response() -> None:
    ties = {**REWARD_BENCH_2, "id": "ties:1", "chosen": ["red", "blue"], "num_correct": 2, "subset": "Ties"}
    factual, red, blue = read_pairs([REWARD_BENCH_2, ties])
    assert (factual.id, factual.chosen, factual.subset) == ("12", "Jupiter.", "Factuality")
    assert factual.rejected == ("Saturn.", "Mars.", "Venus.")
    assert [(p.id, p.chosen, p.subset) for p in (red, blue)] == [
        ("ties:1#0", "red", "Ties"),
        ("ties:1#1", "blue", "Ties"),
    ]


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (RM_BENCH, {"rejected": ["one", "two"]}, r"rows\[1\]\.rejected: expected 3 styles .*, got 2 responses"),
        (RM_BENCH, {"chosen": ["a", 2, "c"]}, r"rows\[1\]\.chosen\[1\]: expected str, got int"),
        (RM_BENCH, {"rejected": "text"}, r"rows\[1\]\.rejected: expected a list of responses, got str"),
        (RM_BENCH, {"chosen": []}, r"rows\[1\]\.chosen: expected a list of responses"),
        (RM_BENCH, {"domain": None}, r"rows\[1\]\.domain: no value\. Columns found"),
        (RM_BENCH, {"prompt": " "}, r"rows\[1\]\.prompt: empty"),
        (RM_BENCH, {"chosen": ["Sydney.", "b", "c"]}, r"rows\[1\]: a text is both chosen and rejected"),
        (REWARD_BENCH_2, {"num_correct": 2}, r"rows\[1\]\.num_correct: says 2, but chosen holds 1"),
        (REWARD_BENCH_2, {"num_incorrect": 2}, r"rows\[1\]\.num_incorrect: says 2, but rejected holds 3"),
        (REWARD_BENCH_2, {"subset": None}, r"rows\[1\]\.subset: no value"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"rejected": "a"}, r"rows\[1\]: chosen and rejected are the same"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"chosen": 3}, r"rows\[1\]\.chosen: expected str"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_or_dropped(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    rows = [base, {**base, **change}]
    with pytest.raises(InputError, match=message):
        read_pairs(rows)
    assert read_pairs(rows, on_bad="drop") == read_pairs([base])


def test_options_are_checked() -> None:
    rows = preference_rows(2)
    with pytest.raises(InputError, match=r"layout='x': expected 'auto' or one of \['preferences'"):
        read_pairs(rows, layout="x")
    with pytest.raises(InputError, match="on_bad='skip'"):
        read_pairs(rows, on_bad="skip")
    with pytest.raises(InputError, match="no rows with lang='de'"):
        read_pairs(rows, lang="de")
    with pytest.raises(InputError, match=r"no rows$"):
        read_pairs([])
    with pytest.raises(InputError, match="none of 1 rows can be used"):
        read_pairs([{"prompt": "p"}], on_bad="drop")
    with pytest.raises(InputError, match="no value in the grouping column 'kind'"):
        read_pairs(rows, subset="kind")
    with pytest.raises(InputError, match=r"characters; the limit is max_chars=5"):
        read_pairs(rows, max_chars=5)


def test_one_language_of_several_is_read() -> None:
    rows = [{**row, "id": row["prompt"], "lang": lang} for row in preference_rows(3) for lang in ("en", "de")]
    assert [p.id for p in read_pairs(rows, lang="de")] == [row["prompt"] for row in preference_rows(3)]


def test_files_are_read(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list([RM_BENCH])
    dataset.to_parquet(tmp_path / "rm.parquet")
    dataset.to_json(tmp_path / "rm.jsonl")
    assert read_pairs(tmp_path / "rm.parquet") == read_pairs(tmp_path / "rm.jsonl") == read_pairs([RM_BENCH])
    (tmp_path / "rm.json").write_text("[" + (tmp_path / "rm.jsonl").read_text().strip() + "]", encoding="utf-8")
    assert read_pairs(tmp_path / "rm.json") == read_pairs([RM_BENCH])


@pytest.mark.shared
def test_real_rows_are_read() -> None:
    rows = shared_rows("preference/hh_helpful_en", 200)
    pairs = read_pairs(rows, subset="subset")
    assert [p.id for p in pairs] == [row["id"] for row in rows]
    assert {p.subset for p in pairs} == {row["subset"] for row in rows}
