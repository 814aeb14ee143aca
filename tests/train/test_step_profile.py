"""Where a step's time goes, and how many operations it takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _runs import RECIPE, SMALL, losses, rows

from dualenc.config import load_recipe
from dualenc.data.batch import Batch
from dualenc.model import build_bundle
from dualenc.train.flops import FlopCount, peak_of
from dualenc.train.loop import train
from dualenc.train.step_profile import WARM_UP

QUICK = [*SMALL, "data.workers=0", "batch.size=16", "budget.steps=7"]


def test_a_profile_names_every_part_and_changes_no_number(tmp_path: Path) -> None:
    for name, steps in (("plain", None), ("profiled", 3)):
        train(load_recipe(RECIPE, [*QUICK, f"out={tmp_path}/{name}"]), profile=steps)
    run = tmp_path / "profiled"
    assert losses(run) == losses(tmp_path / "plain")
    found = json.loads((run / "profile.json").read_text())
    assert (found["steps"], found["after_steps"], found["world_size"]) == (3, WARM_UP, 1)
    parts = found["seconds_a_step"]
    whole = parts.pop("whole")
    assert sum(parts.values()) == pytest.approx(whole)
    for part in ("forward of image", "forward of text", "loss, with its gathers", "backward", "optimizer"):
        assert 0 < parts[part] < whole, part
    assert "| forward of image |" in (run / "profile.md").read_text()
    events = json.loads((run / "profile-trace-rank0.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "optimizer" for e in events) >= 3
    assert not (tmp_path / "plain" / "profile.json").exists()
    logged = rows(run / "metrics.jsonl")[-1]
    assert logged["tflops_per_s"] > 0
    assert logged["peak_memory"] > 2**27
    assert "mfu" not in logged  # a CPU has no peak here


def test_operations_are_counted_from_the_towers_shapes() -> None:
    """Twice the towers, twice the operations; a locked tower has no backward; nothing of the model is copied."""
    found = []
    for more in ([], ["modalities.text.lock=true"]):
        bundle = build_bundle(load_recipe(RECIPE, [*QUICK, *more]))
        inputs = {m: x.collate([x.dummy()] * 4) for m, x in bundle.inputs.items()}
        count = FlopCount(bundle.model)
        at = {m: torch.arange(4) for m in inputs}
        count.note(Batch(4, inputs, at, torch.arange(4), ["a"] * 4))
        assert count.per_sample is not None
        found.append(count.per_sample)
        own = count.per_sample
        count.note(Batch(4, inputs, at, torch.arange(4), ["a"] * 4))
        assert count.per_sample == own
    text = [p.numel() for p in bundle.model.tower("text").parameters() if p.ndim == 2]
    assert 0 < found[0] - found[1] < 6 * sum(text) * 77
    assert found[0] > found[1] > 0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla T4", 65),
        ("NVIDIA A10G", None),
    ],
)
def test_the_peak_of_a_card(name: str, tflops: float | None) -> None:
    assert peak_of(name) == (None if tflops is None else pytest.approx(tflops * 1e12))
