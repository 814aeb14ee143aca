"""Two sources with different modalities in one run: real pictures and real sounds that share only text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
from _audio_runs import train
from _runs import order, rows
from _shared import DATA as SHARED_DATA
from _spawn import spawn

from dualenc.distributed.world import World
from dualenc_data_tools.build import build

HERE = Path(__file__).parent
FSDD = SHARED_DATA / "audio_text" / "fsdd" / "captions.jsonl"

pytestmark = pytest.mark.skipif(not FSDD.is_file(), reason=f"the spoken digits are not at {FSDD}")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("fsdd")
    build("jsonl", out, path=str(FSDD), limit=40, template=["{label}", "the digit {label}"], progress=False)
    return str(out / "train-*.tar")


def curve(run: Path) -> list[list[float]]:
    found = [r for r in rows(run / "metrics.jsonl") if "loss" in r]
    return [[r["loss"], r["loss/image-text"], r["loss/audio-text"]] for r in found]


@pytest.mark.dist
@pytest.mark.slow
def test_two_pairs_from_two_sources_on_one_and_two_ranks(sounds: str, tmp_path: Path) -> None:
    """The loss curve of both pairs is that of one process, also at steps where a rank drew no sound."""
    for world in (1, 2):
        moved = spawn(
            HERE / "_audio_runs.py",
            "train",
            world,
            {"recipe": "image_audio_text", "sounds": sounds, "overrides": [f"out={tmp_path / str(world)}"]},
        )[0]
        assert all(moved[f"towers.{m}.head.weight"] > 0 for m in ("image", "audio", "text"))
        assert moved["logit_scale.audio-text"] > 0
    one, two = curve(tmp_path / "1"), curve(tmp_path / "2")
    assert len(one) == 4
    assert all(image > 0 for _, image, _ in one)
    assert any(audio > 0 for *_, audio in one)  # one sound alone has nothing to be told from
    assert all(a == pytest.approx(b, rel=2e-4) for a, b in zip(one, two, strict=True))
    drawn = order(tmp_path / "2")
    assert drawn == order(tmp_path / "1")
    without = [[not any("sounds/" in x for x in step[r::2]) for r in range(2)] for step in drawn]
    assert any(any(w) for w in without), "every rank drew a sound at every step: the test shows nothing"


def test_cwcl_trains_the_audio_tower_and_leaves_the_locked_text_tower(sounds: str, tmp_path: Path) -> None:
    overrides = [
        f"out={tmp_path / 'run'}",
        "loss={name: cwcl}",
        "modalities.text.lock=trunk",
        "batch.micro=4",
        "budget.steps=2",
    ]
    moved = train(World(), "image_audio_text", sounds, overrides)
    assert moved["towers.audio.head.weight"] > 0
    assert moved["towers.text.head.weight"] > 0
    assert moved["towers.text.tokens.weight"] == 0
    found = [r for r in rows(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert all(r["excess/text-to-audio"] > 0 for r in found)
    assert "excess/audio-to-text" not in found[0]
