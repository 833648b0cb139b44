"""The report of a study: it says what the document says, whatever the document lacks."""

from __future__ import annotations

import pytest
from studies import contract_document, full_document

from rm_ood.study.report import html_page, markdown


@pytest.mark.parametrize("doc", [full_document(examples=True), contract_document()], ids=["full", "contract"])
def test_same_document_same_bytes(doc):
    page = html_page(doc)
    assert page == html_page(doc)
    assert "None" not in page
    assert markdown(doc) == markdown(doc)
    page.encode()
