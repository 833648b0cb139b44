"""The table of a study for a terminal: a line per condition, its numbers where the document has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from studies import full_document

from rm_ood.study.findings import label
from rm_ood.study.terminal import table


@pytest.fixture(scope="module")
def doc() -> dict[str, Any]:
    return full_document()


def test_a_line_per_condition_holds_its_numbers(doc: dict[str, Any]) -> None:
    lines = table(doc, "rows of ours", ["And one more thing."]).splitlines()
    assert lines[0].startswith(f"Reward model on {doc['id']['n']} rows of ours: accuracy {doc['id']['accuracy']:.3f}")
    assert f"n = {doc['calibration']['n']} prompts, rank k = {doc['calibration']['k']}" in lines[1]
    for row in doc["shifts"]:
        (line,) = (line for line in lines if line.startswith(f"{label(row)} "))
        cells = line.removeprefix(label(row)).split()
        expected = [row["accuracy"], row["ece"]]
        expected += [row["auroc"][a]["default"] for a in ("combined", "prompt", "response")]
        expected += [row["auroc"]["response"][name] for name in ("final", "reward")]
        expected += [row["auroc"]["pair"]["energy"], *(row["flag_rate"][f] for f in ("combined", "prompt", "response"))]
        assert cells == [str(row["n"]), *("-" if x is None else f"{x:.3f}" for x in expected)]
    assert max(map(len, lines[2:])) <= 112
    assert lines[-1] == "And one more thing."


def test_what_a_document_lacks_is_a_dash(doc: dict[str, Any]) -> None:
    bare = copy.deepcopy(doc)
    bare["id"]["accuracy"] = bare["id"]["ece"] = None
    bare["calibration"]["by_group"] = [{}, {}]
    bare["shifts"] = bare["shifts"][:1]
    bare["shifts"][0] |= {"name": "a shift of a name so long that it would push every number off the edge"}
    del bare["shifts"][0]["auroc"]["prompt"]
    lines = table(bare).splitlines()
    assert lines[0].endswith("clean rows: no pair has two finite rewards.")
    assert "calibrated in 2 groups" in lines[1]
    (line,) = (line for line in lines if line.startswith("a shift of a name"))
    assert line[44 - 3 : 44] == "..."
    assert line.split()[-8] == "-"


def test_the_axis_of_the_response_given_the_prompt_has_columns_where_it_is_judged(doc: dict[str, Any]) -> None:
    assert "given  " not in table(doc).split("AUROC against")[0]
    third = copy.deepcopy(doc)
    third["id"]["flag_rate"]["response_given_prompt"] = 0.011
    for i, row in enumerate(third["shifts"]):
        row["flag_rate"]["response_given_prompt"] = 0.5 + i / 1000
        row["auroc"]["response_given_prompt"] = {"default": 0.6 + i / 1000}
    lines = table(third).splitlines()
    head = next(line for line in lines if line.startswith("shift, side")).split()
    assert head[2:].count("given") == 2
    (clean,) = (line for line in lines if line.startswith("clean "))
    assert clean.split()[-1] == "0.011"
    for i, row in enumerate(third["shifts"]):
        (line,) = (line for line in lines if line.startswith(f"{label(row)} "))
        cells = dict(zip(head[2:], line.removeprefix(label(row)).split(), strict=True))
        assert cells["given"] == f"{0.5 + i / 1000:.3f}"
        assert line.split().count(f"{0.6 + i / 1000:.3f}") >= 1
    assert max(map(len, lines[2:])) <= 126
