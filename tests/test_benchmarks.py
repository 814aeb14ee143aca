"""``make bench`` and ``make bench-gpu``: what a CPU can check of them, and the page that is made of their numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from _shared import PYTHONPATH, ROOT

from benchmarks import __main__ as bench
from benchmarks import gpu
from benchmarks.pages import put_block
from benchmarks.versus import row
from dualenc.errors import DualencError

DOCS = ROOT / "docs"
ENV = {"PYTHONPATH": PYTHONPATH, "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=ENV, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ratios_are_taken_within_a_round() -> None:
    faster = row("p", "w", "per s", [2.0, 9.0, 40.0], [1.0, 3.0, 10.0])
    assert (faster["ratio"], faster["low"], faster["high"]) == (3, 2, 4)
    smaller = row("p", "w", "MiB", [2.0, 2.0], [4.0, 8.0], more_is_better=False)
    assert (smaller["ratio"], smaller["ours"], smaller["theirs"]) == (3, 2, 6)


def test_the_page_is_made_of_its_numbers(tmp_path: Path) -> None:
    found = json.loads((DOCS / "benchmarks.json").read_text("utf-8"))
    page = (DOCS / "benchmarks.md").read_text("utf-8")
    (tmp_path / "benchmarks.md").write_text(re.sub(r"(<!-- numbers -->\n).*(<!-- /)", r"\1\2", page, flags=re.DOTALL))
    bench.write_page(found, tmp_path)
    for name in ("benchmarks.md", "benchmarks.svg", "benchmarks.json"):
        assert (tmp_path / name).read_text("utf-8") == (DOCS / name).read_text("utf-8"), name
    compared = [r for r in found["rows"] if "ratio" in r]
    drawn = ET.parse(tmp_path / "benchmarks.svg").getroot().findall("{http://www.w3.org/2000/svg}circle")
    assert len(drawn) == len(compared) > 1
    with pytest.raises(DualencError, match="has no block 'other'"):
        put_block(tmp_path / "benchmarks.md", "other", "")


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_a_wrong_gradient_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpu.Device("cpu")
    assert 0 < gpu.loss_cell(device, kind, "tiled", 64, 16, 1, 64)["error"] < 1e-5
    right = gpu.reference
    monkeypatch.setattr(gpu, "reference", lambda *a: [x * 1.01 for x in right(*a)])
    assert gpu.loss_cell(device, kind, "plain", 64, 16, 1, 64)["error"] == pytest.approx(0.0099, rel=0.01)
    assert gpu.loss_cell(device, kind, "plain", 64, 16, 1, 8)["error"] is None


def test_a_cell_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def cells(*_: object) -> object:
        yield "small", lambda: {"cell": "small", "ms": 1.0}
        yield "large", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory\nat all"))
        yield "next", lambda: {"cell": "next", "ms": 2.0}

    monkeypatch.setattr(gpu, "cells", cells)
    rows = list(gpu.measure(gpu.Device("cpu"), 1, True, None))
    assert [r["cell"] for r in rows] == ["small", "large", "next"]
    assert rows[1]["failed"] == "OutOfMemoryError: no memory"
    assert all("the time was used up" in gpu.said(r) for r in gpu.measure(gpu.Device("cpu"), -1, True, None))


def test_half_of_the_batch_where_the_whole_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def cell(device: object, model: str, compiled: bool, batch: int, *_: object) -> dict[str, int]:
        tried.append(batch)
        if batch > 16:
            raise torch.OutOfMemoryError
        return {"batch": batch}

    monkeypatch.setattr(gpu, "tower_cell", cell)
    assert gpu._fitting(gpu.Device("cpu"), "x", False, 64, 1, None) == {"batch": 16}
    assert tried == [64, 32, 16]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    said = run("benchmarks.gpu", "--device", "cpu", "--quick", "--peak-tflops", "0.1", "--out", str(out))
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert len(rows) == len(said.splitlines()) - 1 == 9
    assert not [r for r in rows if "failed" in r]
    assert all(r["error"] < 1e-5 for r in rows[:8])
    assert rows[8]["samples/s"] > 0
    assert 0 < rows[8]["mfu"] < 1
    assert rows[8]["gflops_per_sample"] == pytest.approx(10.2, abs=0.1)  # forward, and twice that backward


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.timeout(900)
def test_every_part_runs(tmp_path: Path) -> None:
    text = re.sub(r"(<!-- numbers -->\n).*(<!-- /)", r"\1\2", (DOCS / "benchmarks.md").read_text("utf-8"), flags=re.S)
    (tmp_path / "benchmarks.md").write_text(text)
    small = ["--quick", "--runs", "1", "--model", "ViT-S-32-alt"]
    run("benchmarks", *small, "--out", str(tmp_path / "out"), "--docs", str(tmp_path), "--write")
    found = json.loads((tmp_path / "benchmarks.json").read_text("utf-8"))
    assert found["parts"] == list(bench.PARTS)
    assert all(r["ratio"] > 0 for r in found["rows"] if "ratio" in r)
    assert "Not measured" not in (tmp_path / "benchmarks.md").read_text("utf-8")
