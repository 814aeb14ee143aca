"""The commands of docs/loading.md run; their numbers are the machine's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from _shared import PYTHONPATH, ROOT

SMALL = {
    "loader": ["--samples", "64", "--batch", "8", "--batches", "1", "--runs", "1"],
    "remote": ["--workers", "1", "--runs", "1", "--batches", "2", "--samples", "200", "--kb", "2", "--latency-ms", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_benchmark_runs(name: str, tmp_path: Path) -> None:
    assert f"python -m benchmarks.{name}" in (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
    out = tmp_path / "numbers.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALL[name], "--json", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": PYTHONPATH, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert rows
    if name == "loader":
        assert rows[0]["side"] == "open_clip + webdataset"
        assert all(r["samples_per_cpu_s"] > 0 for r in rows)
    else:
        assert all(rate > 0 for rate in rows[0].values())
