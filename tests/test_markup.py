"""Parts of pages: everything is escaped, words stand left, and sections are linked on request."""

from __future__ import annotations

import pytest

from rm_ood.markup import Markup, Text, bullets, escaped, fact_table, table, whole_page


def test_all_but_markup_is_escaped():
    assert escaped("<b>") == "&lt;b&gt;"
    assert escaped(Markup("<b>")) == "<b>"
    for part in (
        table(("<b>",), [["<b>", "<b>"]], "<b>", [("<b>", 1)]),
        fact_table([("<b>", "<b>")]),
        bullets(["<b>"]),
        whole_page("<b>", "<b>", "", [("<b>", "x")], contents=True),
    ):
        assert "<b>" not in part
        assert "&lt;b&gt;" in part


def test_words_stand_left_and_heads_say_what_they_head():
    found = table(("a", Text("b"), "c"), [["x", Text("y"), 3]], "", [("", 1), ("both", 2)])
    assert '<td colspan="1"></td><th scope="colgroup" colspan="2">both</th>' in found
    assert '<th scope="col" class="t">b</th><th scope="col">c</th>' in found
    assert '<th scope="row">x</th><td class="t">y</td><td>3</td>' in found
    assert "<caption>" not in found


@pytest.mark.parametrize("contents", [True, False])
def test_a_section_without_content_is_left_out(contents: bool):
    page = whole_page("t", "h", "", [("one", "x"), ("two", ""), ("three", "y")], contents=contents)
    assert page.count("<section") == 2
    assert ('<a href="#section-1">three</a>' in page) == contents
    assert ('id="section-1"' in page) == contents


def test_no_notes_no_list():
    assert bullets([]) == ""
