"""The pages of docs/: every block runs in the order it stands in, in a folder like the one the pages speak of."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from _shared import DATA, PYTHONPATH, ROOT

DOCS = ROOT / "docs"
PAGES = [
    *("start.md", "open_clip.md"),
    *(
        f"howto/{p}.md"
        for p in ("photos", "audio", "camera_lidar", "lora", "distil", "evaluate", "embed_search", "resume")
    ),
    *(f"cluster/{p}.md" for p in ("launch", "engines", "data")),
]
FENCE = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORT = ("budget.steps=2", "batch.size=8", "schedule.warmup_samples=0", "data.workers=0")
"""Added to every line that trains, but for keys that it sets itself: the pages' own budgets are minutes to hours."""
NUSCENES = DATA / "camera_lidar" / "nuscenes_scene-0523"

SHELL = """
dualenc() {{ "{python}" -m dualenc "$@"; }}
python() {{ "{python}" "$@"; }}
{lines}
"""


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, file it is written to, text) of every block of a page."""
    return FENCE.findall((DOCS / page).read_text(encoding="utf-8"))


def shortened(line: str) -> str:
    trains = re.match(r"dualenc (launch .* )?train ", line)
    more = [s for s in SHORT if s.partition("=")[0] + "=" not in line] if trains else []
    return " ".join([line, *more])


def photos(folder: Path) -> None:
    """Drawings of the quickstart as JPEG, with their names beside them."""
    from PIL import Image

    from dualenc.data.shards.reader import SampleError, iter_samples

    folder.mkdir()
    shard = str(ROOT / "recipes" / "quickstart" / "data" / "train-000000.tar")
    for i, (_, found) in enumerate(iter_samples(shard, {"image": ["webp", "png"], "text": ["txt"]})):
        if i == 40:
            return
        assert not isinstance(found, SampleError)
        path = folder / ("cat.jpg", "bike.jpg", "house.jpg", f"{i}.jpg")[min(i, 3)]
        Image.open(io.BytesIO(found.values["image"])).convert("RGB").save(path, quality=95)
        path.with_suffix(".txt").write_bytes(found.values["text"])


def sounds(folder: Path) -> None:
    """Tones with their names beside them."""
    import soundfile

    folder.mkdir()
    for i in range(16):
        time = np.arange(8000) / 16_000
        soundfile.write(folder / f"{i}.wav", 0.3 * np.sin(2 * np.pi * (200 + 40 * i) * time), 16_000)
        (folder / f"{i}.txt").write_text(f"a tone of {200 + 40 * i} hertz")


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(ROOT / "tests" / "model"))
    from test_released_models import write_hf

    folder = tmp_path_factory.mktemp("materials")
    photos(folder / "photos")
    sounds(folder / "sounds")
    write_hf(folder / "clip-vit-base-patch32", "clip")
    return folder


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page(page: str, materials: Path, tmp_path: Path) -> None:
    for name in materials.iterdir():
        (tmp_path / name.name).symlink_to(name)
    if "path=nuscenes" in (DOCS / page).read_text(encoding="utf-8"):
        if not NUSCENES.is_dir():
            pytest.skip("nuScenes is not here")
        (tmp_path / "nuscenes").symlink_to(NUSCENES)
    env = os.environ | {
        "PYTHONPATH": PYTHONPATH,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    env["DUALENC_CACHE"] = str(tmp_path / "cache")
    ran = 0
    for language, file, text in blocks(page):
        if file:
            (tmp_path / file).write_text(text, encoding="utf-8")
            continue
        if language == "bash":
            lines = "\n".join(map(shortened, text.splitlines()))
            command = ["bash", "-ec", SHELL.format(python=sys.executable, lines=lines)]
        else:
            assert language == "python", f"{page}: a block in {language!r} runs nowhere"
            command = [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        ran += 1
    assert ran


def test_every_page_with_blocks_is_run() -> None:
    elsewhere = ("python.md", "features.md", "evaluation.md", "finetune.md", "checkpoints.md", "extend/")
    found = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md") if FENCE.search(p.read_text(encoding="utf-8"))}
    assert {p for p in found if not p.startswith(elsewhere)} == set(PAGES)


def test_the_sentences_of_the_troubleshooting_page_are_in_the_code() -> None:
    """Word for word, in pieces between what is filled in: a sentence that was reworded is found here."""
    rooms = ("dualenc", "evals/dualenc_evals", "data_tools/dualenc_data_tools")
    code = "\n".join(p.read_text(encoding="utf-8") for room in rooms for p in sorted((ROOT / room).rglob("*.py")))
    code = re.sub(r"\"\s*\n\s*f?\"", "", code)  # strings that go on in the next line
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("## It trains, but badly")[0]
    cells = [row.split(" | ")[0] for row in page.splitlines() if row.startswith("| `")]
    assert len(cells) > 20
    for sentence in [s for cell in cells for s in re.findall(r"`([^`]+)`", cell)]:
        if sentence.startswith("torch."):
            continue
        for piece in [p.strip(" :") for p in sentence.split("…")]:
            assert piece in code, (sentence, piece)


def test_the_manifest_for_kubernetes() -> None:
    raw = yaml.safe_load((ROOT / "recipes" / "launch" / "pytorchjob.yaml").read_text(encoding="utf-8"))
    replicas = raw["spec"]["pytorchReplicaSpecs"]
    assert [replicas[k]["replicas"] for k in ("Master", "Worker")] == [1, 3]
    for part in replicas.values():
        (container,) = part["template"]["spec"]["containers"]
        assert container["command"][:4] == ["torchrun", "-m", "dualenc", "train"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(raw["spec"]["nprocPerNode"])
