"""The report in a real browser: quiet, whole, and legible at any width, on light and dark ground and on paper."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser
from studies import DOCUMENTS, page_of

WIDTHS = (1280, 390)
# Least ratio of contrast of text and of graphics (WCAG 2.2, 1.4.3 and 1.4.11).
TEXT, GRAPHICS = 4.5, 3.0

MISPLACED = """
const found = [], width = document.documentElement.clientWidth;
const name = e => e.tagName + ' ' + (e.querySelector('caption, figcaption, title') || e).textContent.slice(0, 40);
for (const e of document.querySelectorAll('table, figure, svg, summary, p, h2')) {
  const own = e.getBoundingClientRect(), shown = (e.closest('.wide') || e).getBoundingClientRect();
  if (own.width < 30 || own.height < 14) found.push('no size: ' + name(e));
  if (shown.left < -0.5 || shown.right > width + 0.5) found.push('outside: ' + name(e));
}
if (document.documentElement.scrollWidth > width) found.push('wider than the window');
return found;
"""
# Text of a figure may lie neither on other text nor outside, and a figure shows data.
CROWDED = """
const found = [];
for (const svg of document.querySelectorAll('svg')) {
  const title = svg.querySelector('title').textContent, all = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  boxes.forEach(([text, b], i) => {
    if (b.left < all.left - 1 || b.right > all.right + 1 || b.top < all.top - 1 || b.bottom > all.bottom + 1)
      found.push(`${title}: outside ${text}`);
    for (const [other, c] of boxes.slice(i + 1)) {
      const across = Math.min(b.right, c.right) - Math.max(b.left, c.left);
      const down = Math.min(b.bottom, c.bottom) - Math.max(b.top, c.top);
      if (across > 1 && down > 3) found.push(`${title}: ${text} on ${other}`);
    }
  });
  if (!svg.innerHTML.match(/var\\(--s\\d\\)/)) found.push(`${title}: no data`);
}
return found;
"""
CONTRASTS = """
const rgb = c => c.match(/[\\d.]+/g).map(Number);
const light = c => rgb(c).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = e => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor, parts = rgb(c);
    if (parts.length < 4 || parts[3] > 0) return c;
  }
  return 'rgb(255, 255, 255)';
};
const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
const texts = [], lines = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const style = getComputedStyle(e), inside = e.closest('svg');
  if (own && !['TITLE', 'DESC', 'title', 'desc'].includes(e.tagName))
    texts.push([ratio(inside ? style.fill : style.color, ground(e)), e.textContent.slice(0, 30)]);
  const stroke = (e.getAttribute('style') || '').match(/stroke: (var\\(--s\\d\\))/);
  if (inside && stroke) lines.push([ratio(style.stroke, ground(e)), stroke[1]]);
}
return {texts: texts.sort((a, b) => a[0] - b[0]).slice(0, 5), lines: lines.sort((a, b) => a[0] - b[0]).slice(0, 5),
        count: texts.length, paper: light(getComputedStyle(document.body).backgroundColor)};
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(chromium: Browser, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports by name. They need the browser first: without one they would be made in vain."""
    folder = tmp_path_factory.mktemp("pages")
    found = {name: folder / f"{name}.html" for name in DOCUMENTS}
    for name, path in found.items():
        path.write_bytes(page_of(name).encode())
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", DOCUMENTS)
def test_all_is_there_and_in_its_place(name: str, width: int, chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages[name], width)
    assert chromium.console() == []
    assert chromium.requests() == {pages[name].as_uri()}
    assert chromium.run("return document.querySelectorAll('svg').length") > 5
    assert chromium.run("return document.querySelectorAll('table').length") > 4
    assert chromium.run(MISPLACED) == []
    assert chromium.run(CROWDED) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out(scheme: str, chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["full"], 1280, scheme)
    found: dict[str, Any] = chromium.run(CONTRASTS)
    assert found["paper"] > 0.8 if scheme == "light" else found["paper"] < 0.05
    assert found["count"] > 500
    assert found["texts"][0][0] >= TEXT, found["texts"]
    assert found["lines"][0][0] >= GRAPHICS, found["lines"]


@pytest.mark.parametrize(("name", "most"), [("full", 25), ("contract", 8), ("many", 40)])
def test_it_prints(name: str, most: int, chromium: Browser, pages: dict[str, Path]) -> None:
    # What is left of an A4 or Letter sheet, lying, between the margins.
    chromium.open(pages[name], 960, media="print")
    assert chromium.run("return document.documentElement.scrollWidth") <= 960
    assert 2 <= chromium.printed_pages() <= most


def test_a_page_at_fault_would_be_seen(chromium: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    text = pages["contract"].read_text(encoding="utf-8")
    bad = text.replace(
        "<body>", '<body><script>console.error("x")</script><img src="other.png"><table><tr></tr></table>'
    )
    bad = bad.replace("--soft:#5b6472", "--soft:#c0c4ca").replace("width:100%;height:auto", "width:2000px")
    bad = re.sub(r"var\(--s\d\)", "red", re.sub(r"font-size: [\d.]+px", "font-size: 24px", bad))
    (tmp_path / "bad.html").write_text(bad, encoding="utf-8")
    chromium.open(tmp_path / "bad.html", 390)
    assert any('"x"' in line for line in chromium.console())
    assert any(url.endswith("/other.png") for url in chromium.requests())
    found = chromium.run(MISPLACED)
    assert {line.split(":")[0] for line in found} == {"no size", "outside", "wider than the window"}
    crowded = " ".join(chromium.run(CROWDED))
    assert all(
        words in crowded for words in ("word noise 0.1 on word noise 0.5", "outside word noise 0.1", ": no data")
    )
    assert chromium.run(CONTRASTS)["texts"][0][0] < TEXT
