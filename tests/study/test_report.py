"""The report of a study: it says what the document says, whatever the document lacks."""

from __future__ import annotations

import copy
import html
import json
import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from studies import DOCUMENTS, contract_document, page_of

from rm_ood.errors import InputError
from rm_ood.study import findings
from rm_ood.study.report import html_page, markdown

HOSTILE = "<img src=x onerror=alert(1)>\"'&$\\frac{1}{0}$ | `x` 中文"


class Page(HTMLParser):
    """Words of the page, its identifiers, and its tables as rows of cell texts; what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words = ""
        self.ids: list[str] = []
        self.links: set[str] = set()
        self.tags: set[str] = set()
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links |= {value for name, value in attrs if name in ("href", "src", "xlink:href")}
        assert not any(name.startswith("on") for name in found)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "small":
            self.tables[-1][-1][-1] += " | "
        if tag == "th":
            assert found["scope"] in ("row", "col", "colgroup")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data


def whole(doc: dict[str, Any], text: str | None = None) -> Page:
    """A report in its two forms, checked for what every report must be."""
    text = html_page(json.loads(json.dumps(doc))) if text is None else text
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "style "} & page.tags
    assert len(page.ids) == len(set(page.ids))
    assert page.links <= {f"#{name}" for name in page.ids}
    outside = re.findall(r"url\((?!#)|@import|https?:|//", text)
    assert outside == []
    flat = markdown(doc)
    assert not re.search(r"\b(None|nan|inf)\b", page.words + flat)
    for block in re.findall(r"(?:^\|.*\n)+", flat, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    return page


@pytest.fixture(scope="module")
def doc() -> dict[str, Any]:
    return DOCUMENTS["full"]()


@pytest.fixture(scope="module")
def page(doc: dict[str, Any]) -> Page:
    return whole(doc, page_of("full"))


@pytest.fixture(scope="module")
def few(doc: dict[str, Any]) -> dict[str, Any]:
    """The same with one shift of each kind, so that its page is quickly made."""
    return {**doc, "shifts": [doc["shifts"][i] for i in (0, 5, -3, -1)]}


def row_of(table: list[list[str]], *start: str) -> list[str]:
    (found,) = (row for row in table if row[: len(start)] == list(start))
    return found


def test_the_first_table_holds_the_documents_numbers(doc: dict[str, Any], page: Page) -> None:
    overview = page.tables[0]
    assert overview[0] == ["", "reward model", "AUROC against clean", "error rate at 95 % (FPR95), either",
                           "flagged at alpha 5 %"]  # fmt: skip
    clean = row_of(overview, "clean")
    assert clean[3].startswith(f"{doc['id']['accuracy']:.3f} | ")
    assert clean[10].startswith(f"{100 * doc['id']['false_alarm_rate']:.1f} %")
    row = next(r for r in doc["shifts"] if (r["name"], r["severity"], r["side"]) == ("word noise", 0.9, "response"))
    found = row_of(overview, "word noise 0.9", "response")
    low, high = row["intervals"]["ece"]
    assert found[4] == f"{row['ece']:.3f} | {low:.3f}–{high:.3f}"
    axes = ("combined", "prompt", "response")
    assert [cell[:5] for cell in found[5:8]] == [f"{row['auroc'][axis]['default']:.3f}" for axis in axes]
    assert overview[1][8] == "clean flagged where 95 % of shifted are caught"
    assert found[8] == f"{row['fpr95']['ood_positive']['combined']['default']:.3f}"
    assert overview[1][9] == "shifted let through where 95 % of clean are kept"
    assert found[9] == f"{row['fpr95']['id_positive']['combined']['default']:.3f}"
    assert [cell.split(" ")[0] for cell in found[10:]] == [f"{100 * row['flag_rate'][axis]:.1f}" for axis in axes]
    # What has no preference has no accuracy.
    assert row_of(overview, "random pair", "response")[3:5] == ["–", "–"]


def test_every_detector_is_in_its_tables(doc: dict[str, Any], page: Page) -> None:
    auroc, caught, kept = (t for t in page.tables if len(t[0]) > 1 and t[0][-1] == "pair of rewards")
    row = next(r for r in doc["shifts"] if (r["name"], r["side"]) == ("es", "both"))
    for table, values in (
        (auroc, row["auroc"]),
        (caught, row["fpr95"]["ood_positive"]),
        (kept, row["fpr95"]["id_positive"]),
    ):
        assert table[1][2:] == ["default", "default", "default", "final", "reward", "knn", "energy"]
        shown = [cell[:5] for cell in row_of(table, "es", "both")[2:]]
        response = [values["response"][name] for name in ("default", "final", "reward", "knn")]
        expected = [values["combined"]["default"], values["prompt"]["default"], *response, values["pair"]["energy"]]
        assert shown == [f"{value:.3f}" for value in expected]


def test_figures_say_what_they_show(page: Page) -> None:
    assert {"svg", "title", "desc"} <= page.tags
    for words in ("Reliability: es, both", "OOD score: es, both", "ROC: es, both", "ECE against severity: word noise",
                  "Risk and coverage: response", "Prompt flag and response flag"):  # fmt: skip
        assert words in page.words


def test_a_document_of_the_contract_alone_has_its_page() -> None:
    found = whole(contract_document(), page_of("contract"))
    assert "Reliability" not in found.words
    assert "against severity" in found.words
    assert "small print" not in found.words


@pytest.mark.parametrize("field", ["shifts", "versions", "calibration", "command", "confidence"])
def test_a_page_without(field: str, few: dict[str, Any]) -> None:
    whole({**few, field: type(few[field])() if field in ("shifts", "versions") else None})


@pytest.mark.parametrize(
    "fields",
    [
        ("metrics", "reliability", "risk_coverage", "margins", "selective", "accuracy", "ece"),
        ("flag_rate", "auroc", "fpr95", "roc", "ood_scores"),
        ("intervals", "subsets", "reward_change"),
    ],
    ids=["no preferences", "no guard", "no intervals"],
)
def test_a_page_where_every_shift_lacks(fields: tuple[str, ...], few: dict[str, Any]) -> None:
    whole({**few, "shifts": [{**row, **dict.fromkeys(fields)} for row in few["shifts"]]})
    optional = [name for name in fields if name not in ("accuracy", "ece", "flag_rate", "auroc", "fpr95")]
    whole({**few, "shifts": [{k: v for k, v in row.items() if k not in optional} for row in few["shifts"]]})


def test_the_same_document_gives_the_same_bytes(few: dict[str, Any]) -> None:
    assert html_page(few) == html_page(copy.deepcopy(few))


def test_everything_is_escaped(few: dict[str, Any]) -> None:
    bad = copy.deepcopy(few)
    bad |= {
        "title": HOSTILE,
        "model": HOSTILE,
        "command": HOSTILE,
        "channels": [HOSTILE],
        "versions": {HOSTILE: HOSTILE},
    }
    for row in bad["shifts"]:
        row |= {"name": HOSTILE, "side": HOSTILE, "subsets": {HOSTILE: row["subsets"]["chat"]}}
        row["auroc"][HOSTILE] = {HOSTILE: 0.5}
        row["roc"] = {f"{HOSTILE}/{HOSTILE}": row["roc"]["combined/default"]}
        row["flag_rate"][HOSTILE] = 0.5
    bad["examples"] = [
        {**bad["examples"][0], "shift": HOSTILE, "prompt": HOSTILE, "response": "</blockquote>" + HOSTILE}
    ]
    found = whole(bad)
    assert found.words.count(HOSTILE) > 10
    assert "<img" not in markdown(bad).replace("\\<img", "")


def test_examples_are_shown_only_when_they_are_in_the_document(
    doc: dict[str, Any], few: dict[str, Any], page: Page
) -> None:
    assert "alert(1)" in page.words
    assert "may offend" in page.words
    assert "may offend" in markdown(doc)
    without = {**few, "examples": []}
    assert "may offend" not in html_page(without) + markdown(without)


def test_a_large_study_shows_the_conditions_that_tell_and_stays_small() -> None:
    many, text = DOCUMENTS["many"](), page_of("many")
    assert len(text) < 3_000_000
    assert text.count("<svg") < 70
    assert "9 of 51 conditions" in text
    kept = findings.telling(many, [row for row in many["shifts"] if row["paired"]], 9)
    assert [row["side"] for row in kept].count("prompt") == 3
    lost = {side: [findings.fall(many, r) for r in kept if r["side"] == side] for side in ("prompt", "both")}
    for side, falls in lost.items():
        every = sorted(
            (findings.fall(many, r) for r in many["shifts"] if r["side"] == side and r["paired"]), reverse=True
        )
        assert sorted(falls, reverse=True) == every[:3]


def small(*rows: tuple[str, float | None, float], alpha: float = 0.05) -> dict[str, Any]:
    """A document of shifts of the response: name, accuracy, share flagged."""
    return {
        "alpha": alpha,
        "id": {"n": 200, "accuracy": 0.9, "ece": 0.02, "false_alarm_rate": 0.04},
        "shifts": [
            {"name": name, "side": "response", "severity": None, "n": 200, "accuracy": accuracy,
             "ece": None if accuracy is None else 0.1, "flag_rate": {"combined": rate}}
            for name, accuracy, rate in rows
        ],
    }  # fmt: skip


def test_the_summary_says_how_far_to_trust_and_whether_the_flag_tells() -> None:
    first, second, *_ = findings.summary(small(("a", 0.5, 0.9), ("b", 0.8, 0.02), ("c", 0.88, 0.01), ("d", None, 0.9)))
    assert first == (
        "The reward model is right in 90.0 % of 200 clean pairs; under 2 of 3 shifted conditions it loses more than 5 points, "
        "down to 50.0 % (a, response)."
    )
    assert second == (
        "The flag marks at least half of the items in 1 of these 2, and fewer than a tenth in 1: there it gives no warning "
        "(b, response)."
    )
    alone = findings.summary(small(("b", 0.8, 0.02)))[1]
    assert alone == "There the flag marks 2.0 % of the items: it gives no warning."
    assert "no more than 5 points worse under any of 1" in findings.summary(small(("c", 0.88, 0.01)))[0]
    assert "under no shift" in findings.summary(small(("d", None, 0.9)))[0]


def test_pooled_parts_weigh_each_condition_by_its_pairs() -> None:
    doc = small(("a", 0.5, 0.9), ("b", 0.8, 0.02))
    for row, (n, accuracy) in zip(doc["shifts"], ((10, 0.9), (30, 0.5)), strict=True):
        row["selective"] = {"flagged": {"n": n, "accuracy": accuracy}, "unflagged": {"n": 20, "accuracy": 1.0}}
    assert findings.summary(doc)[-1].endswith(
        "right in 100.0 % of those that are not flagged and in 60.0 % of those that are."
    )


def test_markdown_has_the_same_numbers(doc: dict[str, Any], page: Page) -> None:
    flat = markdown(doc)
    found = next(line for line in flat.splitlines() if line.startswith("| word noise 0.9 | response |"))
    cells = [html.unescape(cell.strip()) for cell in found.strip("|").split(" | ")]
    shown = row_of(page.tables[0], "word noise 0.9", "response")
    assert cells == [re.sub(r" \| (.*)", r" (\1)", cell) for cell in shown]


def test_without_matplotlib_the_error_says_what_to_install(
    doc: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'rm_ood\[study\]'"):
        html_page(doc)
    assert markdown(doc)
