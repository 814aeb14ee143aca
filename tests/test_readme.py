"""README is short and its links lead somewhere; tests/docs/test_docs.py runs its blocks."""

from __future__ import annotations

import re

from _shared import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert README.count("\n") <= 150
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
