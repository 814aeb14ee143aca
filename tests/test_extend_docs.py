"""The pages of docs/extend are all in its index; tests/docs/test_docs.py runs their blocks."""

from __future__ import annotations

from _shared import ROOT

PAGES = sorted((ROOT / "docs" / "extend").glob("*.md"))


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "extend" / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in PAGES if p.name != "README.md" and f"({p.name})" not in index] == []
