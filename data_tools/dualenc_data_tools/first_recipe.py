"""A commented recipe for some shards, chosen by what is in them: ``dualenc init``.

The choices are rules of thumb, each written into the file with its reason; nothing here trains or asks.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualenc.config import Recipe, parse
from dualenc.config.commented import commented_yaml
from dualenc.data.modalities.text import TextConfig, TextInput
from dualenc.data.shards.remote import is_local, local_path
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.survey import Splits, Survey, percentile, splits_of, survey

MOST_SHARDS_HELD_OUT = 0.1


@dataclass(frozen=True)
class Proposal:
    """What suits a number of samples.

    Attributes:
        below: number of samples up to which it is chosen.
        name: for the comment.
        encoder: open_clip architecture; "": dualenc's own small towers.
        dim: of the shared space.
        batch: largest global batch.
        lr: learning rate at that batch.
        epochs: passes over the data.
    """

    below: float
    name: str
    encoder: str
    dim: int
    batch: int
    lr: float
    epochs: int


SIZES = (
    Proposal(20_000, "small towers of dualenc's own", "", 192, 256, 1e-3, 30),
    Proposal(1_000_000, "ViT-S/32", "ViT-S-32-alt", 256, 1024, 1e-3, 30),
    Proposal(20_000_000, "ViT-B/32", "ViT-B-32", 512, 4096, 1e-3, 30),
    Proposal(200_000_000, "ViT-B/16", "ViT-B-16", 512, 16384, 1e-3, 20),
    Proposal(math.inf, "ViT-L/14", "ViT-L-14", 768, 32768, 5e-4, 10),
)
STEPS_OF_WARMUP = 2000


@dataclass
class FirstRecipe:
    """A recipe and, where items are held out, the task that evaluates on them; both as YAML."""

    recipe: str
    task: str | None
    said: list[str]


def first_recipe(shards: str, out: Path) -> FirstRecipe:
    """Look at shards and write what suits them.

    Args:
        shards: a folder, a pattern or a URL.
        out: where the recipe will be, for paths relative to it; the task is beside it, ``NAME.task.yaml``.

    Raises:
        DataError: no shards, or no two modalities in them.
    """
    splits = splits_of(shards)
    seen = survey(splits.train)
    writer = _Writer(shards, out, splits, seen)
    writer.write()
    parse(Recipe, writer.raw, {}, "dualenc init")
    return FirstRecipe(writer.text(), writer.task_text(), writer.said)


def task_file(out: Path) -> Path:
    """Where the task of a recipe is written."""
    return out.with_name(f"{out.stem}.task.yaml")


class _Writer:
    """Fills ``raw`` and ``why`` section by section."""

    def __init__(self, shards: str, out: Path, splits: Splits, seen: Survey) -> None:
        self.shards, self.out, self.splits, self.seen = shards, out, splits, seen
        self.raw: dict[str, Any] = {}
        self.why: dict[str, str] = {}
        self.said: list[str] = []
        self.held_out: list[str] = []
        self.pairs = _pairs(seen)
        self.modalities = list(dict.fromkeys(m for p in self.pairs for m in p))
        self.total = seen.total
        self._hold_out()
        self.size = next(s for s in SIZES if self.total < s.below)
        if "lidar" in self.modalities or "audio" in self.modalities:
            self.size = SIZES[0]

    def write(self) -> None:
        """All sections."""
        self.raw["name"] = self.out.stem
        self.raw["seed"] = 0
        self.raw["modalities"] = {m: getattr(self, f"_{m}")() for m in self.modalities}
        self.why["modalities"] = self._size_why()
        if len(self.modalities) > 2:
            self.raw["pairs"] = [list(p) for p in self.pairs]
        self.raw["embed_dim"] = self.size.dim if "lidar" not in self.modalities else 128
        self.raw["loss"] = {"name": "info_nce"}
        self._data()
        self._length()
        self._rest()

    # --- data ---------------------------------------------------------------------------------------------------

    def _hold_out(self) -> None:
        """Held-out shards: those named so, else the last of many."""
        train = self.splits.train
        self.held_out = list(self.splits.held_out)
        if not self.held_out and len(train) >= 1 / MOST_SHARDS_HELD_OUT and all(map(is_local, train)):
            count = max(len(train) // 20, 1)
            self.held_out, self.splits = train[-count:], Splits(train[:-count], [])
            self.total = round(self.total * (1 - count / len(train)))
            self.why["data.sources.0.shards"] = f"The last {count} of {len(train)} shards are held out for evaluation."

    def _paths(self, urls: Sequence[str]) -> str | list[str]:
        """Shards as a recipe names them: relative to the recipe where they are on this machine."""
        if not all(map(is_local, urls)):
            return self.shards if urls == self.splits.train else list(urls)
        base = self.out.resolve().parent
        named = [_relative(Path(local_path(u)), base) for u in urls]
        folders = {str(Path(n).parent) for n in named}
        stems = {re.sub(r"-\d+\.tar$", "", Path(n).name) for n in named}
        if len(folders) == len(stems) == 1:
            folder, stem = Path(local_path(urls[0])).parent, stems.pop()
            if {p.name for p in folder.glob(f"{stem}-*.tar")} == {Path(n).name for n in named}:
                where = folders.pop()
                return f"{'' if where.startswith(('/', '..')) else './'}{where}/{stem}-*.tar"
        return [n if n.startswith(("/", "..")) else f"./{n}" for n in named]

    def _data(self) -> None:
        members = {m: self.seen.endings(m)[:4] for m in self.modalities}
        source: dict[str, Any] = {"name": self.out.stem, "shards": self._paths(self.splits.train), "members": members}
        about = f"{self.total:,} samples; {self.seen.looked:,} were looked at."
        before = self.why.get("data.sources.0.shards", "")
        self.why["data.sources.0.shards"] = f"{about} {before}".strip()
        if "text" in members and self.seen.repeated > 0.02:
            source["same"] = members["text"][0] if not self.seen.several else None
            if source["same"] is None:
                del source["same"]
            else:
                self.why["data.sources.0.same"] = (
                    f"{100 * self.seen.repeated:.0f} % of the captions occur more than once: equal captions are right "
                    "for each other, not negatives."
                )
        self.raw["data"] = {"sources": [source], "workers": 2}
        self.why["data.workers"] = "Processes per rank that decode. More where the log's share of waiting is above 0.1."

    # --- length -------------------------------------------------------------------------------------------------

    def _length(self) -> None:
        size, total = self.size, self.total
        most = 64 if "audio" in self.modalities else 24 if "lidar" in self.modalities else size.batch
        batch = max(min(2 ** int(math.log2(max(total / 6, 1))), most), 2)
        self.raw["batch"] = {"size": batch}
        why = "Over all GPUs. Every other item of the batch is a negative, so larger is better while it fits;"
        self.why["batch.size"] = f"{why} where memory ends, batch.micro: N bounds it and changes no number."
        epochs = size.epochs if total >= 1000 else min(max(size.epochs, round(6000 / max(total, 1))), 100)
        self.raw["budget"] = {"epochs": epochs}
        steps = max(epochs * total // batch, 1)
        self.why["budget.epochs"] = f"{steps:,} steps, {epochs * total:,} samples. Twice as long is worth a try."
        warmup = min(STEPS_OF_WARMUP, max(steps // 10, 1))
        self.raw["optim"] = {"lr": size.lr, "weight_decay": 0.2 if not size.encoder or size.dim < 768 else 0.1}
        self.why["optim.lr"] = "If the loss does not fall below ln(batch.size), or jumps, try a third of it."
        self.raw["schedule"] = {"name": "cosine", "warmup_samples": warmup * batch if steps > 1 else 0}
        self.why["schedule.warmup_samples"] = (
            f"{warmup:,} steps, a tenth of the run (at most {STEPS_OF_WARMUP:,} steps)."
        )
        self.steps, self.batch = steps, batch

    def _rest(self) -> None:
        if self.held_out:
            self.raw["eval"] = {"tasks": [f"./{task_file(self.out).name}"]}
            if self.steps >= 40:
                self.raw["eval"]["every_steps"] = max(self.steps // 5, 1)
            held = ", ".join(Path(local_path(u)).name for u in self.held_out[:3])
            self.why["eval"] = f"Retrieval on what is held out: {held}{' …' if len(self.held_out) > 3 else ''}."
        else:
            how = (
                "pack again with val_every=10, which puts every tenth sample into val-*.tar, and run dualenc init again"
            )
            self.raw["eval"] = {"tasks": []}
            self.why["eval"] = f"Nothing is held out. For numbers on unseen items {how}."
            self.said.append(f"nothing is held out for evaluation: {how}")
        large = bool(self.size.encoder)
        self.raw["engine"] = {"precision": "bf16" if large else "fp32"}
        self.why["engine.precision"] = (
            "bf16 autocast: twice as fast on GPUs from Ampere on; weights and loss stay fp32."
            if large
            else "Small towers gain nothing from bf16."
        )
        self.raw["checkpoint"] = {"every_minutes": 15, "keep": 2}
        self.raw["tracking"] = {"log_every": max(min(self.steps // 50, 50), 1)}

    # --- modalities ---------------------------------------------------------------------------------------------

    def _size_why(self) -> str:
        large = self.size.encoder
        few = (
            f"{self.total:,} samples teach small towers; larger ones would learn them by heart. Better than from "
            "scratch: "
            "fine-tune a released CLIP on them, dualenc train finetune/clip checkpoint.init_from=hf:REPO "
            "data.sources.0.shards=…"
        )
        return f"{self.size.name}, which suits {self.total:,} samples from scratch." if large else few

    def _image(self) -> dict[str, Any]:
        side = percentile(self.seen.shorter, 0.5) if self.seen.shorter else 224
        flip = not _mentions_sides(self.seen.captions)
        if self.size.encoder:
            px, scale = 224, [0.9, 1.0] if self.total > 2e7 else [0.6, 1.0]
            encoder: dict[str, Any] = {"name": f"open_clip/{self.size.encoder}"}
        else:
            px = 64 if self.total < 5_000 or side < 96 else 96
            scale = [0.6, 1.0]
            encoder = {"name": "own/convnet", "widths": [48, 96, 192], "depths": [1, 1, 2], "grid": 1}
        self.why["modalities.image.input.size"] = (
            f"Half of the images have a shorter side above {side:,} px. Larger sees more, and costs the square of it."
        )
        self.why["modalities.image.input.augment"] = (
            "A random crop of at least that share of the area"
            + (", mirrored half the time." if flip else "; not mirrored, as captions speak of left and right.")
            + " For drawings or text in images crop less: scale: [0.9, 1.0]."
        )
        return {"input": {"size": px, "augment": {"scale": scale, "flip": flip}}, "encoder": encoder}

    def _text(self) -> dict[str, Any]:
        tokenizer = f"open_clip:{self.size.encoder}" if self.size.encoder else "clip-bpe:8192"
        longest = TextInput(TextConfig(tokenizer=tokenizer, context_length=77))
        lengths = [len(longest.eval(longest.decode(c))) for c in self.seen.captions] or [16]
        p99 = percentile(lengths, 0.99)
        context = 77 if self.size.encoder else min(max(8 * math.ceil((p99 + 1) / 8), 8), 77)
        self.why["modalities.text.input.context_length"] = (
            f"99 % of the captions have at most {p99:.0f} tokens; longer ones are cut."
        )
        encoder: dict[str, Any] = {"name": f"open_clip/{self.size.encoder}"}
        if not self.size.encoder:
            encoder = {"name": "own/transformer", "width": 128, "layers": 2, "heads": 4}
        return {"input": {"tokenizer": tokenizer, "context_length": context}, "encoder": encoder}

    def _audio(self) -> dict[str, Any]:
        if not self.seen.seconds:
            raise DataError("none of the audio clips that were looked at could be read; see dualenc shards check")
        p90, rate = percentile(self.seen.seconds, 0.9), self.seen.rates.most_common(1)[0][0]
        seconds, used = min(max(math.ceil(p90), 1), 10), min(rate, 16_000)
        self.why["modalities.audio.input.max_s"] = (
            f"90 % of the clips have at most {p90:.1f} s; of longer ones a random part is heard (10 s at most)."
        )
        self.why["modalities.audio.input.rate"] = (
            f"Most clips have {rate:,} Hz. 16 kHz keep speech and most sounds; for birds or music keep more."
        )
        return {
            "input": {
                "rate": used,
                "max_s": float(seconds),
                "features": {"hop": 512},
                "augment": {"gain_db": [-6.0, 6.0], "spec": {}},
            },
            "encoder": {"name": "own/audio_cnn", "widths": [32, 64, 128]},
        }

    def _camera(self) -> dict[str, Any]:
        if any("*" in e for e in self.seen.endings("camera")):
            self.why["modalities.camera.encoder"] = "Every camera lifted into one bird's-eye-view map (lift-splat)."
            return {
                "input": {
                    "size": [128, 352],
                    "augment": {"zoom": [1.0, 1.15], "flip": True, "scene": {"rotate_deg": 20, "flip_y": True}},
                },
                "encoder": {
                    "name": "own/lift_splat",
                    "image": {"name": "own/convnet", "widths": [24, 48, 96], "stem": 4},
                    "range": _RANGE,
                    "cell": 0.8,
                    "widths": [32, 64, 128],
                },
            }
        self.why["modalities.camera.encoder"] = (
            "Better: a released tower, locked; see dualenc train camera_lidar/lidarclip."
        )
        encoder = {"name": "own/convnet", "widths": [48, 96, 192], "depths": [1, 1, 2], "grid": 2}
        return {"kind": "image", "input": {"size": 128, "resize": "squash"}, "encoder": encoder}

    def _lidar(self) -> dict[str, Any]:
        whole = any("*" in e for e in self.seen.members.get("camera", {}))
        ahead = [0, -40, -4, 80, 40, 8]
        self.why["modalities.lidar.input.range"] = "Metres: [x, y, z] from and to, " + (
            "around the car." if whole else "in front of the camera."
        )
        turned: dict[str, Any] = {"rotate_deg": 20, "flip_y": True} if whole else {"rotate_deg": 5}
        return {
            "input": {
                "range": _RANGE if whole else ahead,
                "min_distance": 2.0 if whole else 1.0,
                "max_points": 40000 if whole else 20000,
                "augment": {**turned, "scale": [0.95, 1.05], "drop": 0.2},
            },
            "encoder": {
                "name": "own/pillars",
                "cell": 0.8 if whole else 1.0,
                "pillar_width": 32,
                "widths": [32, 64, 128],
            },
        }

    # --- as text ------------------------------------------------------------------------------------------------

    def text(self) -> str:
        """The recipe."""
        head = (
            f"Written by dualenc init {self.shards}. Change what you like; every key is checked.\n"
            f"    dualenc train {self.out}\n"
            f"    dualenc report runs/{self.out.stem}"
        )
        return commented_yaml(self.raw, self.why, head)

    def task_text(self) -> str | None:
        """The task on the held-out shards."""
        if not self.held_out:
            return None
        a, b = self.pairs[0]
        paths = self._paths(self.held_out)
        members = {m: self.seen.endings(m)[:4] for m in (a, b)}
        raw: dict[str, Any] = {
            "name": f"{self.out.stem}_held_out",
            "kind": "retrieval",
            "description": f"held-out samples of {self.out.stem}",
            "modalities": [a, b],
            "source": {"kind": "shards", "path": paths, "members": members},
        }
        why = {"source": "Training does not read these shards."}
        if "text" in (a, b) and self.seen.repeated > 0.02:
            raw["identical"] = "merge"
            why["identical"] = "Equal captions are one, right for every item that has it."
        return commented_yaml(raw, why, f"Written by dualenc init. dualenc eval MODEL --task {task_file(self.out)}")


_RANGE = [-48, -48, -5, 48, 48, 3]


def _pairs(seen: Survey) -> list[tuple[str, str]]:
    """What to contrast: everything with text, else two modalities that come together.

    Raises:
        ConfigError: there are no two.
    """
    there = [m for m in ("image", "camera", "audio", "lidar", "text") if seen.share(m) >= 0.25]
    if "lidar" in there and ("camera" in there or "image" in there):
        return [("camera" if "camera" in there else "image", "lidar")]
    if "text" in there and len(there) > 1:
        return [(m, "text") for m in there if m != "text"]
    if len(there) == 2:
        return [(there[0], there[1])]
    found = ", ".join(f"{m} ({100 * seen.share(m):.0f} %)" for m in seen.members) or "none"
    raise ConfigError(
        f"dualenc init: the samples have no two modalities to contrast; found: {found}. If members have other endings, "
        "start from a recipe (dualenc list recipes) and name them in data.sources.0.members"
    )


def _mentions_sides(captions: Sequence[str]) -> bool:
    sides = sum(bool(re.search(r"\b(left|right)\b", c.lower())) for c in captions)
    return sides > 0.01 * len(captions)


def _relative(path: Path, base: Path) -> str:
    """Relative to ``base`` where that does not lead far up; else absolute."""
    inside = os.path.relpath(path.resolve(), base)
    return str(path.resolve()) if inside.startswith("../../..") else inside
