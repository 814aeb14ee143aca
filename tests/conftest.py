"""Real pictures and captions; absent data skips, offline is enforced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from _shared import DATA as SHARED_DATA
from _wheel import build_wheel, install_wheel

from dualenc import plugins

DATA = SHARED_DATA / "image_text"

torch.set_num_threads(1)
LONG = (
    "docs/test_docs.py", "test_plugins.py", "train/test_elastic.py", "train/test_sharded.py", "train/test_engines.py",
    "distributed/test_exact.py",
)  # fmt: skip
"""Files that take longest, which begin first: ``make test`` runs two files at a time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {Path(__file__).parent / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def coco() -> list[tuple[bytes, list[str]]]:
    """Eight photos with their captions."""
    folder = DATA / "coco_cc"
    if not folder.is_dir():
        pytest.skip(f"needs the COCO photos under {folder}")
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    return [((folder / r["image"]).read_bytes(), r["captions"]) for r in rows[:8]]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's wheel."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel; ``dualenc`` is beside it."""
    return install_wheel(wheel, tmp_path_factory.mktemp("venv"))


@pytest.fixture(autouse=True)
def no_plugins_left() -> Iterator[None]:
    """What a test imported as a plugin is not named to the processes that later tests start."""
    before = os.environ.get(plugins.ENV)
    yield
    os.environ.pop(plugins.ENV, None)
    if before is not None:
        os.environ[plugins.ENV] = before


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were skipped because the data they read is not there."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if str(SHARED_DATA) in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} tests were skipped: their data is not below {SHARED_DATA} (set DUALENC_DATA)"
        )
