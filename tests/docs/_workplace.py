"""The folder in which the blocks of a page are run: the names that pages use mean the same things on all of them.

``dualenc`` and ``python`` there are those of an environment with the wheel; nothing of the checkout is on their path.

======================================  ============================================================================
``photos/``                             drawings of the quickstart as JPEG, ``cat.jpg``, ``bike.jpg``, ``house.jpg`` …,
                                        a caption beside each; ``captions.jsonl`` lists them
``sounds/``                             tones as WAV, a description beside each
``nuscenes/``                           a scene of nuScenes, where it is below DUALENC_DATA
``recordings/``, ``BasicMotions_*.ts``  series of six channels, 24 of four classes
``clip-vit-base-patch32/``              a small CLIP in transformers' layout
``data/train-{000000..000099}.tar``     shards with an image, a sound and a text a sample; likewise ``data/mine``,
                                        ``data/fashion``, ``data/flickr8k`` and ``train-{000000..000001}.tar``
``runs/quickstart``                     the quickstart's model, untrained
``runs/mine``                           a run of recipes/finetune/source.yaml, two steps long
``runs/tuned``                          the same after two more steps
``runs/teacher``, ``runs/finetune/clip``  a small CLIP
``benchmarks/``                         the repository's, for pages that run it, as they say, in a clone
======================================  ============================================================================

Names of the Hub resolve without a network: small random models of the architectures stand in a cache as
huggingface_hub lays it out (:data:`HUB`). DUALENC_DATA has a few rows of each set that tasks read.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _shared import DATA, ROOT

sys.path.insert(0, str(ROOT / "tests" / "model"))
from test_released_clap import write_clap
from test_released_models import write_hf

SHORT = "budget.steps=2 batch.size=8 batch.micro=null schedule.warmup_samples=0 engine.threads=1 data.workers=0"
"""Added to every line that trains: the pages' own budgets are minutes to days."""
NAMES = ("cat.jpg", "bike.jpg", "house.jpg")
NUSCENES = DATA / "camera_lidar" / "nuscenes_scene-0523"
NEEDS = {"docs/howto/camera_lidar.md": NUSCENES}
"""Pages that need data which cannot be made here: skipped where they are absent."""
ALONE = ("README.md",)
"""Pages that begin in a folder without runs, as they say."""
_QUICKSTART = ROOT / "recipes" / "quickstart" / "data" / "train-000000.tar"


def _write_open_clip(folder: Path) -> None:
    """The real ViT-B-32: open_clip knows its architecture by the name. Half precision, 300 MB."""
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32")
    folder.mkdir(parents=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


HUB: dict[str, Callable[[Path], object]] = {
    "openai/clip-vit-base-patch32": lambda folder: write_hf(folder, "clip"),
    "google/siglip-base-patch16-224": lambda folder: write_hf(folder, "siglip"),
    "laion/clap-htsat-unfused": lambda folder: write_clap(folder, fused=False),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": _write_open_clip,
}
"""Repository → what writes a model of its kind."""
_SAID = {"laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "laion2b_s34b_b79k"}
"""How pages name a repository, where that is not its own name."""


def samples(count: int) -> list[tuple[bytes, bytes]]:
    """(JPEG, caption) of the first drawings of the quickstart."""
    from PIL import Image

    from dualenc.data.shards.reader import SampleError, iter_samples

    out = []
    for _, found in iter_samples(str(_QUICKSTART), {"image": ["webp", "png"], "text": ["txt"]}):
        assert not isinstance(found, SampleError)
        jpeg = io.BytesIO()
        Image.open(io.BytesIO(found.values["image"])).convert("RGB").save(jpeg, "JPEG", quality=95)
        out.append((jpeg.getvalue(), found.values["text"]))
        if len(out) == count:
            return out
    raise AssertionError(f"the quickstart has {len(out)} samples")


def _wav(seed: int) -> bytes:
    import soundfile

    raw = io.BytesIO()
    soundfile.write(raw, np.random.default_rng(seed).normal(0, 0.1, 8000), 16000, format="WAV")
    return raw.getvalue()


def _shard(path: Path, drawn: list[tuple[bytes, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, (jpeg, caption) in enumerate(drawn):
            captions = json.dumps({"captions": [caption.decode()]}).encode()
            for ending, raw in {"jpg": jpeg, "wav": _wav(i), "txt": caption, "json": captions}.items():
                info = tarfile.TarInfo(f"{path.stem}-{i:03d}.{ending}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))


def _task_data(folder: Path, drawn: list[tuple[bytes, bytes]]) -> None:
    """A few rows of the sets that built-in tasks read from DUALENC_DATA."""
    types = ("Tshirts", "Shirts", "Watches")
    sets: dict[str, list[dict[str, object]]] = {"flickr8k": [], "fashion": [], "coco_cc": [], "cifar10": []}
    for i, (jpeg, caption) in enumerate(drawn):
        said, image = caption.decode(), f"images/{i}.jpg"
        sets["flickr8k"].append({"image": image, "split": "dev" if i % 2 else "train", "captions": [said]})
        sets["fashion"].append({"image": image, "caption": said, "type": types[i // 6 % 3]})
        sets["coco_cc"].append({"image": image, "captions": [said]})
        sets["cifar10"].append({"image": image, "label": ("cat", "dog", "ship")[i % 3]})
        for name in sets:
            (folder / "image_text" / name / "images").mkdir(parents=True, exist_ok=True)
            (folder / "image_text" / name / image).write_bytes(jpeg)
    for name, rows in sets.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "image_text" / name / ("labels.jsonl" if name == "cifar10" else "captions.jsonl")).write_text(text)


class Workplace:
    """Made once; :meth:`copy` gives every page its own."""

    def __init__(self, root: Path, python: Path) -> None:
        self.root = root
        self.python = python
        self.template = root / "template"
        self.template.mkdir()
        drawn = samples(40)
        self._photos(drawn)
        self._sounds()
        self._series()
        if NUSCENES.is_dir():
            (self.template / "nuscenes").mkdir()
            (self.template / "nuscenes" / "samples").symlink_to(NUSCENES / "samples")
            (self.template / "nuscenes" / "v1.0-mini").symlink_to(NUSCENES / "v1.0-mini-extract")
        for i in range(100):
            if i < 2:
                _shard(self.template / "data" / f"train-{i:06d}.tar", drawn[20 * i : 20 * i + 20])
            else:
                os.link(
                    self.template / "data" / f"train-{i % 2:06d}.tar", self.template / "data" / f"train-{i:06d}.tar"
                )
        for folder in ("data/mine", "data/fashion", "data/flickr8k", "."):
            (self.template / folder).mkdir(exist_ok=True)
            for i in range(2):
                name = f"train-{i:06d}.tar"
                os.link(self.template / "data" / name, self.template / folder / name)
        _task_data(root / "task_data", drawn)
        self._programs()
        write_hf(self.template / "clip-vit-base-patch32", "clip")
        self._runs()

    def _photos(self, drawn: list[tuple[bytes, bytes]]) -> None:
        photos, rows = self.template / "photos", []
        photos.mkdir()
        for i, (jpeg, caption) in enumerate(drawn):
            path = photos / (NAMES[i] if i < len(NAMES) else f"{i}.jpg")
            path.write_bytes(jpeg)
            path.with_suffix(".txt").write_bytes(caption)
            rows.append(json.dumps({"image": f"photos/{path.name}", "caption": caption.decode()}) + "\n")
        (self.template / "captions.jsonl").write_text("".join(rows))

    def _sounds(self) -> None:
        (self.template / "sounds").mkdir()
        for i in range(16):
            path = self.template / "sounds" / f"{i}.wav"
            path.write_bytes(_wav(i))
            path.with_suffix(".txt").write_text(f"noise number {i}")

    def _series(self) -> None:
        """Six channels of noise about a level that depends on the class."""
        draw = np.random.default_rng(0)
        header = (
            "@problemName BasicMotions\n@timeStamps false\n@classLabel true Standing Running Walking Badminton\n@data\n"
        )
        for split in ("TRAIN", "TEST"):
            lines = []
            for i in range(24):
                label = ("Standing", "Running", "Walking", "Badminton")[i % 4]
                x = draw.normal(i % 4, 1, (6, 100)).astype(np.float32)
                lines.append(":".join(",".join(f"{v:.4f}" for v in channel) for channel in x) + f":{label}\n")
                if split == "TRAIN":
                    folder = self.template / "recordings" / label
                    folder.mkdir(parents=True, exist_ok=True)
                    np.save(folder / f"{i}.npy", x)
            (self.template / f"BasicMotions_{split}.ts").write_text(header + "".join(lines))

    def _programs(self) -> None:
        """``dualenc`` of the wheel, whose training lines get :data:`SHORT`; it stands before the environment's own."""
        self.bin = self.root / "bin"
        self.bin.mkdir()
        short = f'case " $* " in *" train "*) set -- "$@" {SHORT};; esac\n'
        (self.bin / "dualenc").write_text(f'#!/bin/bash\n{short}exec "{self.python.parent / "dualenc"}" "$@"\n')
        (self.bin / "dualenc").chmod(0o755)

    def _runs(self) -> None:
        from dualenc.config import load_recipe
        from dualenc.model import build_bundle, load_model

        runs = self.template / "runs"
        build_bundle(load_recipe("quickstart")).save(runs / "quickstart")
        clip = load_model(str(self.template / "clip-vit-base-patch32"))
        clip.save(runs / "teacher")
        clip.save(runs / "finetune" / "clip")
        train = "dualenc train finetune/source eval.tasks=[] out=runs/mine"
        done = self.run(["bash", "-c", train], self.template)
        assert done.returncode == 0, done.stderr
        build_bundle(load_recipe("finetune/source", ["seed=1"])).save(runs / "tuned")

    def copy(self, page: str, text: str) -> Path:
        """A fresh folder for a page, and the repositories that it names."""
        for repository, write in HUB.items():
            if _SAID.get(repository, repository) in text:
                self._hub(repository, write)
        folder = self.root / page.replace("/", "-")
        left_out = shutil.ignore_patterns("runs") if page in ALONE else None
        shutil.copytree(self.template, folder, symlinks=True, ignore=left_out, copy_function=os.link)
        if "python -m benchmarks" in text:
            (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
        return folder

    def _hub(self, repository: str, write: Callable[[Path], object]) -> None:
        """``models--OWNER--NAME/{refs/main, snapshots/REVISION/…}``, as huggingface_hub lays it out."""
        home = self.root / "hf" / "hub" / f"models--{repository.replace('/', '--')}"
        if home.is_dir():
            return
        revision = "0" * 40
        write(home / "snapshots" / revision)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(revision)

    def run(self, command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run a command as a person would in ``cwd``, without a network."""
        around = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        programs = (self.bin, self.python.parent, Path(sys.executable).parent, os.environ["PATH"])
        env = around | {
            "PATH": os.pathsep.join(map(str, programs)),
            "HF_HOME": str(self.root / "hf"),
            "HF_HUB_OFFLINE": "1",
            "DUALENC_DATA": str(self.root / "task_data"),
            "DUALENC_CACHE": str(self.root / "cache"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        if cwd.name.startswith("docs-extend-"):
            env["PYTHONPATH"] = "."  # as these pages say
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900, check=False)
