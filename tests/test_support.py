from __future__ import annotations

from pathlib import Path

import support

README = Path(support.__file__).resolve().parents[1] / "README.md"


def test_the_readmes_table_is_the_suites() -> None:
    text = README.read_text(encoding="utf-8")
    assert support.BEGIN in text
    assert text == support.readme(text), "run python tests/support.py"


def test_every_row_of_the_suites_is_in_the_table() -> None:
    import test_readers
    import test_ways
    from families import FAMILIES

    table = support.table()
    assert all(f.name in table for f in FAMILIES)
    assert all(row.name in table for row in test_readers.ROWS)
    assert "| DataParallel | refused by name |" in table
    assert "| eight threads | supported |" in table
    assert callable(test_ways.row)
