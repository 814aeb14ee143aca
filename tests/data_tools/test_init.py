"""``dualenc init``: a recipe for what is in the shards, which loads, holds out what it says, and trains."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _shared import DATA, ROOT
from typer.testing import CliRunner

from dualenc.cli import app
from dualenc.config import load_recipe
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.build import build
from dualenc_data_tools.survey import splits_of
from dualenc_data_tools.writer import ShardWriter


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def init(*arguments: str) -> Any:
    done = CliRunner().invoke(app, ["init", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


def jpeg(i: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (160, 120), (i % 256, 90, 40)).save(out, "JPEG")
    return out.getvalue()


def shards(folder: str, samples: int, per: int, split: str = "train", caption: str = "picture number {i}") -> None:
    writer = ShardWriter(Path(folder), max_samples=per, split=split)
    for i in range(samples):
        writer.write(f"{split}{i:05}", {"jpg": jpeg(i), "txt": caption.format(i=i).encode()})
    writer.close()


def test_images_with_texts_and_a_held_out_split() -> None:
    shards("data", 120, 100)
    shards("data", 12, 100, split="val")
    init("data", "--out", "mine.yaml")
    recipe = load_recipe("mine.yaml")
    text = Path("mine.yaml").read_text(encoding="utf-8")
    assert recipe.data.sources[0].shards == "data/train-*.tar"
    assert "shards: ./data/train-*.tar" in text
    assert recipe.data.sources[0].members == {"image": ["jpg"], "text": ["txt"]}
    assert recipe.data.sources[0].same is None
    assert recipe.batch.size == 16
    assert recipe.modalities["text"].input["context_length"] % 8 == 0
    assert "shorter side above 120 px" in text
    assert recipe.modalities["image"].input["augment"]["flip"] is True
    assert recipe.eval.tasks == ["mine.task.yaml"]
    assert "./data/val-*.tar" in Path("mine.task.yaml").read_text(encoding="utf-8")
    done = CliRunner().invoke(
        app, ["train", "mine.yaml", "budget.steps=2", "data.workers=0", "schedule.warmup_samples=0"]
    )
    assert done.exit_code == 0, (done.output, done.exception)
    lines = [json.loads(x) for x in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert any("mine_held_out" in key for line in lines for key in line), lines


def test_many_shards_hold_out_the_last_and_few_say_how() -> None:
    shards("many", 60, 5)
    init("many", "--out", "a.yaml")
    recipe = load_recipe("a.yaml")
    assert len(recipe.data.sources[0].shards) == 11
    assert "train-000011.tar" in Path("a.task.yaml").read_text(encoding="utf-8")
    shards("one", 20, 100)
    assert "val_every=10" in init("one", "--out", "b.yaml").stderr
    assert load_recipe("b.yaml").eval.tasks == []
    with pytest.raises(ConfigError, match="exists"):
        init("one", "--out", "b.yaml")


def test_captions_decide_flip_and_equal_captions_are_positives() -> None:
    shards("data", 40, 100, caption="a cat on the left")
    init("data")
    recipe = load_recipe("recipe.yaml")
    assert recipe.modalities["image"].input["augment"]["flip"] is False
    assert recipe.data.sources[0].same == "txt"


def test_audio_takes_its_length_and_rate_from_the_clips(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    folder = tmp_path / "clips"
    folder.mkdir()
    for i in range(24):
        with wave.open(str(folder / f"{i}.wav"), "wb") as w:
            w.setnchannels(1)
            w.setsampwidth(2)
            w.setframerate(8000)
            w.writeframes((1000 * np.sin(np.arange(8000 * 2) * 0.01 * (i + 1))).astype("<i2").tobytes())
        (folder / f"{i}.txt").write_text(f"tone {i}")
    report = build("folder", "shards", {"path": str(folder), "val_every": 4})
    assert report.written == {"val": 6, "train": 18}
    init("shards")
    recipe = load_recipe("recipe.yaml")
    assert recipe.pairs == [("audio", "text")]
    assert (recipe.modalities["audio"].input["rate"], recipe.modalities["audio"].input["max_s"]) == (8000, 2.0)
    done = CliRunner().invoke(
        app, ["train", "recipe.yaml", "budget.steps=1", "data.workers=0", "schedule.warmup_samples=0"]
    )
    assert done.exit_code == 0, (done.output, done.exception)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["cameras", "keyframes", "objects"])
def test_camera_and_lidar(unit: str) -> None:
    scenes = DATA / "camera_lidar" / "kitti_object" / "training"
    if not scenes.is_dir():
        pytest.skip(f"needs {scenes}")
    build("kitti", "shards", {"path": str(scenes), "unit": unit, "limit": 6})
    init("shards")
    recipe = load_recipe("recipe.yaml")
    assert recipe.pairs == [("camera", "lidar")]
    done = CliRunner().invoke(
        app, ["train", "recipe.yaml", "budget.steps=1", "data.workers=0", "schedule.warmup_samples=0"]
    )
    assert done.exit_code == 0, (done.output, done.exception)


def test_large_sets_get_released_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualenc_data_tools import first_recipe

    shards("data", 30, 100)
    seen = first_recipe.survey(splits_of("data").train)
    for total, encoder, batch in (
        (300_000, "ViT-S-32-alt", 1024),
        (5_000_000, "ViT-B-32", 4096),
        (10**9, "ViT-L-14", 32768),
    ):
        seen.total = total
        monkeypatch.setattr(first_recipe, "survey", lambda urls: seen)
        Path("big.yaml").write_text(first_recipe.first_recipe("data", Path("big.yaml")).recipe, encoding="utf-8")
        recipe = load_recipe("big.yaml")
        assert recipe.modalities["image"].encoder.name == f"open_clip/{encoder}"
        assert (recipe.batch.size, recipe.engine.precision) == (batch, "bf16")


def test_without_shards_or_without_a_pair_it_says_what_to_do() -> None:
    Path("empty").mkdir()
    with pytest.raises(DataError, match="dualenc shards build"):
        init("empty")
    writer = ShardWriter(Path("only"), max_samples=10, split="train")
    writer.write("a", {"jpg": jpeg(1)})
    writer.close()
    with pytest.raises(ConfigError, match="no two modalities"):
        init("only")


def test_the_photos_recipe_is_what_init_resembles() -> None:
    recipe = load_recipe("photos")
    shards("shards", 30, 100)
    init("shards")
    made = load_recipe("recipe.yaml")
    assert recipe.modalities["image"].encoder == made.modalities["image"].encoder
    assert recipe.modalities["text"].encoder == made.modalities["text"].encoder
    assert recipe.embed_dim == made.embed_dim
    assert (ROOT / "recipes" / "photos.yaml").is_file()
