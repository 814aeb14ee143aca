"""docs/python.md has a short block for every job; tests/docs/test_docs.py runs them."""

from __future__ import annotations

import re

from _shared import ROOT

BLOCKS = re.findall(r"^## (.+?)$|^```python\n(.*?)^```$", (ROOT / "docs" / "python.md").read_text(), re.M | re.S)


def blocks() -> list[tuple[str, str]]:
    """(section, code) of every block."""
    out, section = [], ""
    for heading, code in BLOCKS:
        if heading:
            section = heading
        else:
            out.append((section, code))
    return out


def test_there_is_a_block_for_every_job_and_none_is_long() -> None:
    assert {s for s, _ in blocks()} == {"Encode", "Classify", "Search", "Fine-tune", "A loop of your own"}
    for section in {s for s, _ in blocks()}:
        lines = [x for x in next(c for s, c in blocks() if s == section).splitlines() if x.strip()]
        assert len(lines) <= 10, section
