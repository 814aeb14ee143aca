"""Real pictures and captions; absent data skips, offline is enforced."""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from _shared import DATA as SHARED_DATA

DATA = SHARED_DATA / "image_text"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def coco() -> list[tuple[bytes, list[str]]]:
    """Eight photos with their captions."""
    folder = DATA / "coco_cc"
    if not folder.is_dir():
        pytest.skip(f"needs the COCO photos under {folder}")
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    return [((folder / r["image"]).read_bytes(), r["captions"]) for r in rows[:8]]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were skipped because the data they read is not there."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if str(SHARED_DATA) in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} tests were skipped: their data is not below {SHARED_DATA} (set DUALENC_DATA)"
        )
