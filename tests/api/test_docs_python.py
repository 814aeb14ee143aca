"""Every block of docs/python.md, run as it stands in the folder that the page describes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from _fixtures import *  # noqa: F403
from _shared import ROOT

sys.path.insert(0, str(ROOT / "tests" / "train"))
from _runs import environment

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


@pytest.mark.slow
@pytest.mark.parametrize(("section", "code"), blocks(), ids=[s for s, _ in blocks()])
def test_a_block_runs(section: str, code: str, workplace: Path) -> None:
    if "accelerate" in code:  # it keeps its settings for the life of the process
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=workplace, env=environment(), capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        exec(compile(code, f"docs/python.md: {section}", "exec"), {"__name__": "__main__"})
    if "finetuned" in code:
        assert (workplace / "runs" / "finetuned" / "checkpoints").is_dir()
