"""What training looks for in shards: members by modality and pairs; and what to write where it finds none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dualenc.config import Recipe
from dualenc.data.dataset import members_of
from dualenc.data.modalities import modalities
from dualenc.data.modalities.camera import CameraConfig, CameraInput
from dualenc.data.modalities.image import ImageInput
from dualenc.data.modalities.lidar import LidarConfig, LidarInput
from dualenc.data.modalities.modality import ModalityInput, build_inputs

IMAGE = tuple(modalities["image"].default_members)
AUDIO = tuple(modalities["audio"].default_members)
TEXT = tuple(modalities["text"].default_members)
MAX_PIXELS: int = ImageInput.Config.model_fields["max_pixels"].default
"""What the trainer accepts by default; larger images are dropped, or resized where ``size`` is set."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What training looks for in a shard.

    Attributes:
        members: modality → endings tried in turn.
        kinds: modality → kind, where it differs from the name.
        pairs: the pairs of which a sample needs one; None: any two modalities.
        inputs: modality → what decodes it, for kinds other than images, audio and text.
        max_pixels: larger images are rejected by their header.
    """

    members: Mapping[str, Sequence[str]]
    kinds: Mapping[str, str] = field(default_factory=dict)
    pairs: Sequence[tuple[str, str]] | None = None
    inputs: Mapping[str, ModalityInput] = field(default_factory=dict)
    max_pixels: int = MAX_PIXELS

    def kind(self, modality: str) -> str:
        """The kind of a modality."""
        return self.kinds.get(modality, modality)

    def paired(self, found: set[str]) -> bool:
        """Whether training can use a sample that has these modalities."""
        if self.pairs is None:
            return len(found) > 1
        return any(a in found and b in found for a, b in self.pairs)


def usual(max_pixels: int = MAX_PIXELS) -> Wanted:
    """What a recipe without ``members`` looks for, whatever its modalities."""
    sensors: dict[str, ModalityInput] = {
        "camera": CameraInput(CameraConfig()),
        "lidar": LidarInput(LidarConfig(features=[])),
    }
    # Bare images and arrays could also be cameras and sweeps; only a calibration makes that certain.
    members = {"image": IMAGE, "audio": AUDIO, "text": TEXT, **{m: x.default_members[:1] for m, x in sensors.items()}}
    return Wanted(members, inputs=sensors, max_pixels=max_pixels)


def of_recipe(recipe: Recipe, source: int) -> Wanted:
    """What a recipe looks for in one of its sources.

    Raises:
        ConfigError: as in training.
    """
    inputs = build_inputs(recipe.modalities)
    kinds = {m: part.kind or m for m, part in recipe.modalities.items()}
    pairs = [(a, b) for a, b in recipe.pairs]
    members = members_of(recipe.data, source, inputs, pairs)
    other = {m: inputs[m] for m in members if kinds[m] not in ("image", "audio", "text")}
    return Wanted(members, kinds, pairs, other)


def advice(found: Counter[str], wanted: Wanted) -> str:
    """The endings found where training finds no pair, and what to write in the recipe."""
    some = found.most_common(6)
    more = f" and {len(found) - len(some):,} more" if len(found) > len(some) else ""
    there = ", ".join(f".{e} ({n:,})" for e, n in some) + more
    named = [m for m in wanted.members if wanted.pairs is None or any(m in p for p in wanted.pairs)]
    last = {e: e.rsplit(".", 1)[-1] for e in found}
    fitting = {m: [e for e in last if last[e] in wanted.members[m] and last[e] != e] for m in named}
    fitting = {m: e for m, e in fitting.items() if e}
    shown = named if wanted.pairs is not None else [m for m in named if m in fitting or m in ("image", "text")]
    looked = "; ".join(f"{m}: {', '.join(wanted.members[m])}" for m in shown)
    said = f"their endings are {there}; training looks for {looked}. "
    if not fitting:
        entry = "json:KEY" if "json" in found else "ENDING"
        written = ", ".join(f"{m}: [{'ENDING' if m != 'text' else entry}]" for m in shown)
        return said + f"Name the right endings in the recipe's source: members: {{{written}}}"
    if all(len(e) <= 4 for e in fitting.values()):
        have = {m: e or [x for x in wanted.members[m] if x in found] for m, e in fitting.items()}
        have |= {m: [x for x in wanted.members[m] if x in found] for m in named if m not in have}
        written = ", ".join(f"{m}: [{', '.join(e)}]" for m, e in have.items() if e)
        return said + f"Write in the recipe's source: members: {{{written}}}"
    return said + (
        "A key ends at the first dot of a file name, so names with further dots each have an ending of their own: pack "
        "them again with other names ('_' instead of '.'), or with: dualenc shards build"
    )
