"""Where the tests find real data that is not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("DUALENC_DATA") or ROOT.parent / "shared" / "data")
"""DUALENC_DATA, else ../shared/data; tests that need something below it skip where it is absent."""

PYTHONPATH = os.pathsep.join(str(ROOT / p) for p in (".", "evals", "data_tools", "tests", "tests/distributed"))
"""What a process that a test starts needs to import this checkout, wherever the environment's installation points."""
