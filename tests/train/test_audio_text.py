"""Two sources with different modalities in one run: real pictures and real sounds that share only text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
from _audio_runs import RECIPES, train
from _runs import order, rows
from _shared import DATA as SHARED_DATA
from _spawn import spawn

from dualenc.config import load_recipe
from dualenc.distributed.world import World
from dualenc.model import load_model
from dualenc.train.loop import run_phases
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


@pytest.mark.slow
def test_pretraining_on_masked_units_resumes_and_leads_to_pairs(sounds: str, tmp_path: Path) -> None:
    """The same numbers with a stop in between; then the recipe's two phases, whose model keeps no head of the loss."""
    source = f"data.sources=[{{name: digits, shards: '{sounds}', members: {{audio: [wav], text: ['json:captions']}}}}]"
    small = "modalities.audio.encoder={name: own/audio_transformer, width: 16, layers: 2, span: 2, masked: true}"
    text = "modalities.text.encoder={name: own/transformer, width: 16, layers: 1, heads: 2}"
    given = [source, small, text, "modalities.text.input={tokenizer: 'clip-bpe:1024'}", "embed_dim=16", "batch.size=8"]
    given += ["eval.tasks=[]", "engine.threads=1", "data.workers=0", "tracking.log_every=1", "schedule.name=constant"]

    def run(name: str, steps: int, *more: str) -> list[dict[str, float]]:
        overrides = [*given, f"out={tmp_path / name}", f"budget.steps={steps}", "schedule.warmup_samples=0", *more]
        loaded = load_recipe(RECIPES / "masked_units.yaml", overrides)
        (tmp_path / name).mkdir(exist_ok=True)
        run_phases(loaded, tmp_path / name, World())
        return [r for r in rows(tmp_path / name / "metrics.jsonl") if "loss" in r]

    whole = run("whole", 4, "phases=[]")
    run("cut", 2, "phases=[]")
    again = run("cut", 4, "phases=[]")
    told = ("loss", "units_contrast/audio-text", "units_perplexity/audio-text")
    assert [[r[k] for k in told] for r in again] == [[r[k] for k in told] for r in whole]
    phased = run("phased", 4)
    assert ["units_contrast/audio-text" in r for r in phased] == [True, True, False, False]
    assert (
        "masked_heads.masked_target.weight" in load_model(str(tmp_path / "phased")).model.towers["audio"].state_dict()
    )
