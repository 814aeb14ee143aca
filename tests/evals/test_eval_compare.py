"""Teacher and student on one page: sizes that are counted, times that are measured, numbers by seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dualenc.config import Recipe
from dualenc.errors import ConfigError
from dualenc.model import build_bundle
from dualenc_evals.studies.compare import compare, markdown, mean_sd


def bundle(folder: Path, width: int, layers: int) -> str:
    raw = {
        "name": "m",
        "modalities": {
            "image": {"input": {"size": 32}, "encoder": {"name": "own/convnet", "widths": [width, width, width]}},
            "text": {
                "input": {"tokenizer": "clip-bpe:600", "context_length": 16},
                "encoder": {"name": "own/transformer", "width": width, "layers": layers, "heads": 2},
            },
        },
        "embed_dim": 16,
        "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
        "batch": {"size": 8},
        "budget": {"steps": 1},
    }
    return str(build_bundle(Recipe.model_validate(raw)).save(folder))


def run_folder(folder: Path, seed: int, r1: float) -> str:
    """A run that evaluated itself at its last step."""
    bundle(folder / "checkpoints" / "step-0000000001" / "model", 8, 1)
    (folder / "checkpoints" / "step-0000000001" / "manifest.json").write_text("{}")
    (folder / "recipe.yaml").write_text(f"name: dcd\nseed: {seed}\n")
    rows = [
        {"step": 1, "samples_seen": 8, "loss": 2.0, "kd_weight/image-text": 0.9, "own_weight_sd/image-text": 0.2},
        {"step": 2, "samples_seen": 16, "loss": 1.0, "kd_weight/image-text": 0.7, "own_weight_sd/image-text": 0.3},
        {"step": 2, "samples_seen": 16, "eval/quickstart_val_style/image_to_text_R@1": r1},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder)


def test_the_page(tmp_path: Path) -> None:
    from dualenc_evals.catalog import load_task

    teacher = bundle(tmp_path / "teacher", 32, 3)
    students = [run_folder(tmp_path / f"s{i}", i, r) for i, r in enumerate((0.1, 0.2))]
    task = load_task("quickstart_val_style")
    result = compare([teacher, *students], [task], tmp_path / "page.html", repeats=3)
    big, small = result["groups"]
    assert (small["name"], len(small["models"])) == ("dcd", 2)
    assert small["metrics"] == {"quickstart_val_style/image_to_text_R@1": [0.1, 0.2]}
    assert 0 <= big["metrics"]["quickstart_val_style/image_to_text_R@1"][0] <= 1  # a bundle is evaluated
    counted = sum(x.numel() for x in torch.nn.ModuleList(build_towers(teacher)).parameters())
    assert big["cost"]["all"]["parameters"] == counted
    assert small["times"]["parameters"] == pytest.approx(counted / small["cost"]["all"]["parameters"])
    assert small["times"]["flops"] > 1
    # the linear layers of a transformer block: 12 · width² multiply-adds a token, 2 FLOPs each
    text = big["cost"]["text"]["flops"] - 2 * 16 * 3 * 12 * 32 * 32
    assert 0 <= text < 0.2 * big["cost"]["text"]["flops"]
    assert "| dcd | 2 | 15.0 ± 7.1 |" in markdown(result).replace("| – ", "")
    page = (tmp_path / "page.html").read_text()
    assert "dcd: Weights by sample" in page
    assert not any(x in page for x in ("src=", "href=", "url("))
    assert json.loads((tmp_path / "page.json").read_text())["groups"][1]["times"]["parameters"] > 1
    with pytest.raises(ConfigError, match="name the teacher first"):
        compare([teacher], [], tmp_path / "x.html")


def build_towers(folder: str) -> list[torch.nn.Module]:
    from dualenc.model import load_model

    return list(load_model(folder).model.towers.values())


def test_mean_and_deviation() -> None:
    assert mean_sd([0.1]) == "10.0"
    assert mean_sd([0.1, 0.2, 0.3]) == "20.0 ± 10.0"
