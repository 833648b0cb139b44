"""Figures that live in a page: nothing of another figure, nothing from elsewhere, and the caller's settings stay."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest

from rm_ood.study.svg import INK, SERIES, STYLE, drawing, shortened


def drawn(key: str = "a", name: str = "line") -> str:
    def draw(axes):
        axes.plot([0, 1], [0.125, 1], marker="o", color=SERIES[0], label=name)
        axes.axhline(0.5, color=INK)
        axes.set(xlabel=name, xticks=[0, 0.125])
        axes.legend()

    return drawing(key, f"<{name}>", "a & b", draw)


def test_colours_are_the_pages_variables():
    svg = drawn()
    assert set(re.findall(r"var\(--(\w+)\)", svg)) >= {"s1", "ink", "soft", "line", "paper"}
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert "DejaVu" not in svg
    defined = set(re.findall(r"--(s\d)", STYLE))
    assert len(defined) == len(SERIES)


def test_identifiers_belong_to_the_figure():
    first, second = (set(re.findall(r' id="([^"]+)"', drawn(key))) for key in ("a", "b"))
    assert len(first) > 3
    assert not first & second
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', drawn()))
    assert used
    assert used <= first


def test_well_formed_and_named():
    root = ElementTree.fromstring(drawn())
    assert [(child.tag, child.text) for child in root[:2]] == [("title", "<line>"), ("desc", "a & b")]
    assert root.get("aria-labelledby") == "a-t a-d"
    texts = [t.text for t in root.iter("text")]
    # Tenths of a pixel are for places, not for what is written.
    assert "0.125" in texts
    assert texts.count("line") == 2


def test_same_bytes_whatever_the_callers_settings(monkeypatch: pytest.MonkeyPatch):
    plain = drawn()
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    assert drawn() == plain
    assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize("name", ["中文", "العربية", "עברית", "$\\frac{1}{0}$", "a_b^c", "<&>\"'", "x\ny"])
def test_any_name_can_be_written(name: str):
    root = ElementTree.fromstring(drawn(name=name))
    assert "".join(name.split()) in "".join("".join(t.itertext()) for t in root.iter("text")).replace(" ", "")


def test_long_labels_leave_room():
    assert shortened("short") == "short"
    assert shortened("x" * 40, 10) == "x" * 9 + "…"
