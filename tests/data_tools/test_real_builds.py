"""Every real set built by its YAML in data_tools/builds, read back by webdataset and by open_clip, trained on."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import webdataset
from _shared import DATA, ROOT
from typer.testing import CliRunner

from dualenc.cli import app
from dualenc.data.shards.index import load_index
from dualenc_data_tools.build import build, of_file

SETS: dict[str, tuple[str, int, int]] = {
    # Name → path below DATA, samples of the build, pairs of an image and a text that open_clip sees.
    "flickr8k": ("image_text/flickr8k/captions.jsonl", 4500, 4500),
    "fashion": ("image_text/fashion/captions.jsonl", 6000, 6000),
    "cifar10": ("image_text/cifar10", 1000, 1000),
    "coco_cc": ("image_text/coco_cc/captions.jsonl", 81, 81),
    "tuxpaint_pictures": ("image_text/tuxpaint/captions.jsonl", 950, 950),
    "esc10": ("audio_text/esc10_folds123/captions.jsonl", 240, 0),
    "fsdd": ("audio_text/fsdd/captions.jsonl", 400, 0),
    "asterisk": ("audio_text/asterisk/captions.jsonl", 300, 0),
    "tuxpaint_sounds": ("audio_text/tuxpaint/captions.jsonl", 200, 0),
    "nuscenes": ("camera_lidar/nuscenes_scene-0523", 120, 0),
    "kitti": ("camera_lidar/kitti_object/training", 11, 0),
}


def seen_by_open_clip(urls: list[str]) -> int:
    """Pairs that open_clip's own evaluation pipeline hands over."""
    from open_clip_train import data

    args = Namespace(
        train_data=None, val_data="::".join(urls), val_num_samples=None, batch_size=64, workers=0, world_size=1, seed=0,
        train_num_samples=None, train_data_upsampling_factors=None,
    )  # fmt: skip

    def tokens(text: str) -> list[int]:
        assert text
        return [len(text)]

    from torchvision.transforms import Compose, Resize, ToTensor

    to_tensor = Compose([Resize((8, 8)), ToTensor()])
    loader = data.get_wds_dataset(args, to_tensor, is_train=False, tokenizer=tokens).dataloader
    return sum(len(images) for images, _ in loader)


def test_every_yaml_is_in_the_table() -> None:
    assert {p.stem for p in (ROOT / "data_tools" / "builds").glob("*.yaml")} == set(SETS)


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SETS)
def test_a_real_set_is_built_read_back_and_trained_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    path, samples, pairs = SETS[name]
    if not (DATA / path).exists():
        pytest.skip(f"needs {DATA / path}")
    source, settings = of_file(ROOT / "data_tools" / "builds" / f"{name}.yaml")
    if name == "nuscenes":
        pytest.importorskip("numpy")
    report = build(source, tmp_path / "shards", settings, path=str(DATA / path), processes=2, progress=False)
    dropped = sum(report.dropped.values())
    assert report.samples + dropped == samples
    assert dropped <= 0.4 * samples
    urls = [str(p) for p in report.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(read) == report.samples == load_index(str(tmp_path / "shards" / "index.json")).total
    assert len({(s["__url__"], s["__key__"]) for s in read}) == report.samples
    if pairs:
        assert seen_by_open_clip(urls) == report.samples
    again = build(source, tmp_path / "again", settings, path=str(DATA / path), progress=False)
    assert [p.read_bytes() for p in again.shards] == [p.read_bytes() for p in report.shards]

    os.chdir(tmp_path)
    out = CliRunner().invoke(app, ["init", "shards", "--out", "recipe.yaml"])
    assert out.exit_code == 0, out.output
    short = ["budget.steps=2", "batch.size=8", "data.workers=0", "schedule.warmup_samples=0", "eval.tasks=[]"]
    out = CliRunner().invoke(app, ["train", "recipe.yaml", *short, "engine.threads=1", "batch.micro=null"])
    assert out.exit_code == 0, (out.output, out.exception)
    found = re.findall(r'"loss": ([\d.]+)', next(Path("runs").glob("*/metrics.jsonl")).read_text())
    assert found
    print(f"{name}: {report.samples} samples, {dropped} dropped, {len(urls)} shards, loss {found[-1]}")
