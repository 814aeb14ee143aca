"""Every shipped recipe trains a few steps on the data that its head says how to make (recipes/pretrain: their twins,
test_pretrain_recipes.py). The commands in the heads run as they stand, with the folder of the real data for ``…``."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _shared import DATA, ROOT

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from _runs import losses
from test_released_clap import write_clap
from test_released_models import write_hf

from benchmarks import streets
from benchmarks.methods import prepared
from dualenc.cli import main
from dualenc.config import load_recipe
from dualenc.model.start_from import completed
from dualenc.shipped import shipped_recipes
from dualenc.train.loop import run_folder
from dualenc.train.phases import timeline

pytestmark = [pytest.mark.slow, pytest.mark.extra, pytest.mark.timeout(600)]

RECIPES = shipped_recipes()
WHERE = {
    "esc10_folds123": "audio_text", "tuxpaint": "audio_text", "fsdd": "audio_text", "asterisk": "audio_text",
    "fashion": "image_text", "flickr8k": "image_text",
}  # fmt: skip
"""The folder of ../shared/data that the … of a head's command stands for, by the folder after it."""
RENAMED = {"…/nuscenes": "camera_lidar/nuscenes_scene-0523", "…/kitti": "camera_lidar/kitti_object"}
QUICKSTART = "recipes/quickstart/data/train-*.tar"
CACHED = (
    "embed runs/distill/{0}_teacher --recipe recipes/distill/{0}.yaml --views 4 {1} --out runs/distill/{0}_features"
)
FEATURES = ["train quickstart", f"embed runs/quickstart {QUICKSTART} --out features"]
BEFORE = {
    "camera_lidar/rad": ["train camera_lidar/prc"],
    "distill/fashion_": ["train distill/fashion_teacher", CACHED.format("fashion", "--plain text")],
    "distill/flickr8k_": ["train distill/flickr8k_teacher", CACHED.format("flickr8k", "")],
    "finetune/fashion_": ["train finetune/source name=finetune/source_0"],
    "phases/bag_curriculum": [*FEATURES, "mine neighbors features -k 32 --out neighbors.safetensors"],
    "phases/clusters": [
        *FEATURES,
        "mine clusters features --modalities image --clusters 10 --out clusters0.safetensors",
    ],
    "phases/lit_then_unlock": ["train quickstart"],
}
"""Beginning of a recipe's name → commands, each of which runs once: what it starts from or learns from."""
HEADS = ("finetune/class_incremental",)
"""Recipes whose heads have the train and mine commands that come first."""
OVERRIDES = {
    "finetune/clip": ["checkpoint.init_from=clip"],
    "finetune/clip_lora": ["checkpoint.init_from=clip"],
    "finetune/clip_prompts": ["checkpoint.init_from=clip"],
    "finetune/siglip": ["checkpoint.init_from=siglip"],
    "finetune/clap": ["checkpoint.init_from=clap"],
    "phases/clusters": ["checkpoint.init_from=runs/quickstart"],
    "phases/lit_then_unlock": ["modalities.image.init_from=runs/quickstart#image"],
    "photos": [f"data.sources.0.shards={QUICKSTART}"],
}
"""What a recipe needs to be told: random weights in the layout of released ones stand for these."""


def commands(recipe: Path) -> Iterator[list[str]]:
    """The ``dualenc`` commands of a recipe's head: a line, and those indented further or after a backslash."""
    lines = [x[1:] for x in recipe.read_text(encoding="utf-8").splitlines() if x.startswith("#")]
    at = 0
    while at < len(lines):
        found = re.match(r"( +)dualenc (.*)", lines[at])
        at += 1
        if found is None:
            continue
        text = found[2].split("   ")[0].removesuffix("\\")
        while at < len(lines) and lines[at].startswith(found[1] + "  "):
            text += " " + lines[at].strip().removesuffix("\\")
            at += 1
        yield shlex.split(text, comments=True)


def builds() -> dict[str, list[str]]:
    """Folder of shards → the command that a head gives for it."""
    out = {}
    for path in RECIPES.values():
        for command in commands(path):
            if command[:2] == ["shards", "build"] and re.search("…|path=documents", " ".join(command)):
                out[command[command.index("--out") + 1]] = command
    return out


def located(word: str) -> str:
    """An argument with the real folder in place of …."""
    for short, real in RENAMED.items():
        if f"={short}" in word:
            return word.replace(short, str(DATA / real))
    found = re.search(r"…/(\w+)", word)
    return word.replace("…", str(DATA / WHERE[found[1]])) if found else word.replace("tables=v1.0-mini", TABLES)


TABLES = "tables=v1.0-mini-extract"  # the name of the extract in ../shared/data


def run(patch: pytest.MonkeyPatch, *command: str) -> None:
    patch.setattr(sys, "argv", ["dualenc", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, " ".join(command)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes and small models as transformers saves them; what recipes make in it others use."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "documents").mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        shutil.copy(page, folder / "documents" / f"{page.stem}.txt")
    for kind in ("clip", "siglip"):
        write_hf(folder / kind, kind)
    write_clap(folder / "clap", fused=False)
    return folder


def make_data(patch: pytest.MonkeyPatch, name: str, overrides: list[str]) -> None:
    """Build the shards of a recipe that no other has built yet."""
    known = builds()
    for span in timeline(load_recipe(name, overrides, completed)):
        for source in span.recipe.data.sources:
            folder = Path(source.shards).parent.as_posix()
            if Path(folder).is_dir():
                continue
            if folder.startswith("runs/methods"):
                prepared("flickr8k", DATA)
            elif folder.startswith("build/streets") and DATA.is_dir():
                streets.make_data(DATA, Path("build/streets/data"))
            elif not DATA.is_dir() or "series_text" in folder:
                pytest.skip(f"needs {DATA}, and recipes/series_text the wheel of aeon")
            else:
                run(patch, *[located(w) for w in known[folder]])


def train(patch: pytest.MonkeyPatch, name: str, overrides: list[str]) -> Path:
    """Train 2 steps, 10 where a recipe has phases, of at most 16 samples; returns the folder of the run."""
    make_data(patch, name, overrides)
    recipe = load_recipe(name, overrides, completed)
    quick = [
        f"budget={{steps: {10 if recipe.phases else 2}}}", f"batch.size={min(recipe.batch.size, 16)}", "eval.tasks=[]",
        "engine.threads=1", "data.workers=0", "tracking.log_every=1", "schedule.warmup_samples=16",
    ]  # fmt: skip
    run(patch, "train", name, *quick, *overrides)
    return run_folder(load_recipe(name, overrides, completed))


done: set[str] = set()


@pytest.mark.parametrize("name", [n for n in RECIPES if not n.startswith("pretrain/")])
def test_a_recipe_trains_on_what_its_head_makes(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    before = [c for begins, some in BEFORE.items() if name.startswith(begins) for c in some]
    if name in HEADS:
        before += [shlex.join(c) for c in commands(RECIPES[name]) if c[0] in ("train", "mine") and c[1:] != [name]]
    for command in before:
        if command not in done and command != f"train {name}":
            kind, *words = shlex.split(command)
            if kind == "train":
                train(monkeypatch, words[0], words[1:])
            else:
                run(monkeypatch, kind, *words)
            done.add(command)
    overrides = OVERRIDES.get(name, [])
    if name.startswith("finetune/") and overrides:
        audio = "data/audio_text/tuxpaint/train-*.tar"
        overrides = [*overrides, f"data.sources.0.shards={audio if name == 'finetune/clap' else QUICKSTART}"]
    values = losses(train(monkeypatch, name, overrides))
    assert len(values) >= 2
    assert all(math.isfinite(v) for v in values), values
