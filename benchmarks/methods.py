"""Methods under one budget, with several seeds: the studies behind the tables of docs/methods.md.

    python -m benchmarks.methods STUDY [--aeon FOLDER] [options of dualenc compare]

STUDY is a file of ``benchmarks/studies`` by its name: quickstart, image_towers, flickr8k, audio, audio_pretraining,
series or batches. The data that it names is made first, where it is missing: the quickstart's samples with what its
metadata says of them as json (for losses that need labels); Flickr8k's photos as features of a released tower beside
their captions; the sounds of the audio recipe; the series of two sets that come with the wheel of aeon (``--aeon`` is
the folder it was unpacked to); for batch plans a trained model, its clusters and neighbours. Then ``dualenc compare``
runs, which goes on where it was stopped and writes the table and its page.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualenc.compare.study import read_comparison
from dualenc.config import load_recipe
from dualenc.data.shards.reader import SampleError, iter_samples
from dualenc.model import build_bundle
from dualenc.model.start_from import completed
from dualenc.shipped import recipes_folder
from dualenc_data_tools.build import build
from dualenc_data_tools.writer import ShardWriter

STUDIES = Path(__file__).with_name("studies")


def of_quickstart(out: Path, _: Path) -> None:
    """The quickstart's training samples with their metadata as json."""
    data = recipes_folder() / "quickstart" / "data"
    with gzip.open(data / "metadata.jsonl.gz", "rt", encoding="utf-8") as f:
        about = {row["key"]: row for row in map(json.loads, f)}
    wanted = {"image": ["webp"], "text": ["txt"]}
    with ShardWriter(out, max_samples=978, overwrite=True) as writer:
        for key, found in iter_samples(str(data / "train-{000000..000003}.tar"), wanted):
            if isinstance(found, SampleError):
                raise found
            name = key.rsplit("/", 1)[1]
            doc = about[name]
            group = doc.get("group", "")
            # Emoji: group, then the emoji, which both styles share; clip art: its folder, then the drawing.
            path = [group, doc["codepoints"]] if group else [doc["file"].rpartition("/")[0], name]
            doc |= {"length": len(doc["caption"]), "clusters": [group, doc["source"]], "path": path}
            image, text = found.values["image"], found.values["text"]
            writer.write(name, {"webp": image, "txt": text, "json": json.dumps(doc).encode()})


@torch.no_grad()
def of_flickr8k(out: Path, sets: Path) -> None:
    """What a frozen EfficientNet-Lite0 says of each photo at 224 px [1280], beside the captions."""
    folder = sets / "image_text" / "flickr8k"
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    recipe = load_recipe(
        "finetune/released_lit", ["modalities.image.lock=trunk", "modalities.image.input.size=224"], completed
    )
    embedder = build_bundle(recipe).embedder()
    (out / "dev").mkdir(parents=True, exist_ok=True)
    with ShardWriter(out, max_samples=1000, overwrite=True) as writer, (out / "dev.jsonl").open("w") as dev:
        for at in range(0, len(rows), 64):
            some = rows[at : at + 64]
            photos = [(folder / r["image"]).read_bytes() for r in some]
            (batch,) = embedder.batches("image", photos, 64)
            for row, vector in zip(some, embedder.bundle.model({"image": batch})["frozen"]["image"], strict=True):
                name, npy = Path(row["image"]).stem, io.BytesIO()
                np.save(npy, vector.numpy().astype(np.float16), allow_pickle=False)
                captions = {"captions": row["captions"]}
                if row["split"] == "train":
                    writer.write(name, {"vector.npy": npy.getvalue(), "json": json.dumps(captions).encode()})
                else:
                    (out / "dev" / f"{name}.npy").write_bytes(npy.getvalue())
                    dev.write(json.dumps(captions | {"vector": f"dev/{name}.npy"}) + "\n")


def of_audio(out: Path, sets: Path) -> None:
    """The shards of recipes/audio_text/sounds.yaml, as its head says."""
    folder = sets / "audio_text"
    titles = ["{label}", "{freesound_title}", "{label}: {freesound_title}"]
    esc = {"path": str(folder / "esc10_folds123" / "captions.jsonl"), "where": {"fold": [1, 2]}, "template": titles}
    build("jsonl", out / "esc10", {**esc, "rate": 16000, "overwrite": True}, progress=False)
    art = {"path": str(folder / "tuxpaint" / "captions.jsonl"), "hold_out": 5}
    build("jsonl", out / "tuxpaint", {**art, "rate": 16000, "overwrite": True}, progress=False)


def of_series(out: Path, sets: Path) -> None:
    """The shards of recipes/series_text, as their heads say; ``sets`` holds aeon's files."""
    acts = {"Standing": "standing still", "Running": "running", "Walking": "walking", "Badminton": "playing badminton"}
    said: dict[str, tuple[str, dict[str, Any]]] = {
        "BasicMotions": ("motions", {"names": acts, "caption": "a person who is {class}"}),
        "JapaneseVowels": ("vowels", {"caption": "speaker {class}"}),
    }
    for name, (short, how) in said.items():
        for part, split in (("TRAIN", "train"), ("TEST", "test")):
            found = next(sets.rglob(f"{name}_{part}.ts"), None)
            if found is None:
                raise SystemExit(
                    f"{sets} has no {name}_{part}.ts: pip download --no-deps aeon, unzip the wheel, --aeon FOLDER"
                )
            build("ts", out / short, {"path": str(found), "name": split, **how, "overwrite": True}, progress=False)


def of_batches(out: Path, sets: Path) -> None:
    """A model trained in the plain order (the quickstart study's control), its clusters and its neighbours."""
    shards = str(prepared("quickstart", sets) / "train-*.tar")
    control = read_comparison(STUDIES / "quickstart.yaml")
    features = str(out / "features")
    for command in (
        ["train", control.recipe, *control.overrides, f"out={out / 'start'}"],
        ["embed", str(out / "start"), shards, "--out", features],
        ["mine", "clusters", features, "--clusters", "10", "--out", str(out / "clusters.safetensors")],
        ["mine", "neighbors", features, "-k", "32", "--out", str(out / "neighbors.safetensors")],
    ):
        subprocess.run([sys.executable, "-m", "dualenc", *command], check=True, env=os.environ | {"COLUMNS": "200"})


MAKERS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "quickstart": ("runs/methods/data/quickstart", of_quickstart),
    "image_towers": ("runs/methods/data/quickstart", of_quickstart),
    "flickr8k": ("runs/methods/data/flickr8k", of_flickr8k),
    "audio": ("data/audio_text", of_audio),
    "audio_pretraining": ("data/audio_text", of_audio),
    "series": ("data/series_text", of_series),
    "batches": ("runs/methods/data/batches", of_batches),
}
"""Study → the folder below the working folder where its recipe looks for data, and what makes it."""


def prepared(study: str, sets: Path) -> Path:
    """The folder of a study's data, made unless it is there; ``sets`` has what it is made from."""
    where, make = MAKERS[study]
    done = Path(where) / "complete"
    if not done.is_file():
        make(done.parent, sets)
        done.touch()
    return done.parent


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="Methods under one budget, with several seeds.")
    parser.add_argument("study", choices=sorted(MAKERS))
    parser.add_argument("--aeon", type=Path, default=Path("aeon"), help="where the wheel of aeon was unpacked (series)")
    given, options = parser.parse_known_args(argv)
    sets = given.aeon if given.study == "series" else Path(os.environ.get("DUALENC_DATA", "../shared/data"))
    prepared(given.study, sets)
    command = [sys.executable, "-m", "dualenc", "compare", str(STUDIES / f"{given.study}.yaml"), *options]
    return subprocess.run(command, env=os.environ | {"DUALENC_DATA": str(sets.resolve())}).returncode


if __name__ == "__main__":
    raise SystemExit(main())
