"""A teacher's features of a student's data, stored once and then looked up.

They are a :class:`~dualenc.features.store.FeatureStore`: one part per shard, with the shard's ids.

V views of a sample are what the student sees in epochs 0 … V − 1, by the same draw: augmentation is a function of
(seed, sample, epoch), so a student that trains on the cache draws its view number ``epoch % V`` with the cache's seed,
and teacher and student see one crop and one caption (MobileCLIP's reinforced sets, arXiv 2311.17049, store the
parameters of the augmentation instead). A ``plain`` modality has one view, the item as in evaluation, whatever the
student draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualenc.config import Recipe
from dualenc.data.batch import map_tensors
from dualenc.data.dataset import members_of, sample_rng
from dualenc.data.modalities import DecodeError, ModalityInput
from dualenc.data.modalities.modality import InFolder
from dualenc.data.shards.index import ShardSet, open_sources
from dualenc.data.shards.reader import Found, SampleError
from dualenc.data.values import stable_id
from dualenc.distributed.devices import autocast
from dualenc.distributed.world import World, agree
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.features.of_shards import Gathered, Samples, ShardJob, shard_jobs, write_shards
from dualenc.features.store import Description, FeatureStore
from dualenc.features.writer import FeatureWriter
from dualenc.model import Bundle
from dualenc.model.bundle import resolve_input
from dualenc.model.decoding import collate_usable, read_ahead


def as_student_sees(teacher: ModalityInput, student: ModalityInput) -> ModalityInput:
    """The teacher's input with the student's augmentation: from one random state both draw the same view."""
    if not (_augments(teacher) and _augments(student)):
        return teacher
    changed = {"augment": student.config.augment}
    if _views(student) is not None:
        changed["view"] = student.config.view
    config = teacher.config.model_copy(update=changed)
    return type(teacher)(config, teacher.base_dir if isinstance(teacher, InFolder) else None)


def _augments(part: ModalityInput) -> bool:
    """Whether its settings have a section ``augment``."""
    return "augment" in type(part.config).model_fields


def _views(part: ModalityInput) -> Any:
    """Its settings' section ``view`` (dualenc/data/modalities/text_views.py); None where it has none."""
    return part.config.view if "view" in type(part.config).model_fields else None


def augmentation(inputs: Mapping[str, ModalityInput], modalities: Sequence[str]) -> dict[str, Any]:
    """Modality → the student's augmentation: what a drawn view depends on besides the seed."""
    out = {}
    for m in modalities:
        augment = inputs[m].config.augment if _augments(inputs[m]) else None
        out[m] = None if augment is None else augment.model_dump(mode="json")
        view = _views(inputs[m])
        if view is not None:
            out[m] = {**(out[m] or {}), "view": view.model_dump(mode="json")}
    return out


# --- writing -----------------------------------------------------------------------------------------------------


def write_cache(
    bundle: Bundle,
    recipe: Recipe,
    out: Path,
    views: int = 1,
    plain: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    dtype: str = "fp16",
    batch_size: int = 64,
    world: World | None = None,
    overwrite: bool = False,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Write a teacher's features of every sample of a recipe's data; shards that are finished already are kept.

    Args:
        bundle: the teacher.
        recipe: the student's: its sources, members, augmentation and seed.
        views: V of the modalities that are not plain.
        plain: modalities stored as in evaluation.
        names: student's modality → the teacher's, where they differ.
        dtype: how features are stored: fp16, int8 or fp32.
        world: the ranks that share the work, each on its own copy of the teacher; all of them must call this.
        overwrite: replace other features that stand in ``out``.
        precision: what the teacher computes in: fp32, bf16, or fp16 on a GPU.

    Returns:
        As :func:`dualenc.features.of_shards.embed_shards`, and ``"views"`` and ``"bytes"``.

    Raises:
        ConfigError: if the teacher has none of the recipe's modalities, ``plain`` names none of them, or ``out`` holds
            other features.
        DataError: for missing or broken shards.
    """
    world = world or World()
    names = dict(names or {})
    student = {m: resolve_input(m, part)[1] for m, part in recipe.modalities.items()}
    chosen = [m for m in student if names.get(m, m) in bundle.inputs]
    if not chosen:
        raise ConfigError(f"the teacher has {bundle.modalities}, the recipe {list(student)}: no modality to embed.")
    for m in plain:
        if m not in chosen:
            raise ConfigError(f"--plain: {m!r} is not embedded. {did_you_mean(m, chosen)}")
    for m in chosen:
        if m not in plain and _views(student[m]) is not None:
            raise ConfigError(
                f"modalities.{m}.input.view: its views cannot be cached; store the whole text with --plain {m}, or "
                "name the teacher's model in distill.teachers, so that it runs along"
            )
    preprocessing = {
        "plain": [m for m in chosen if m in plain],
        "seed": recipe.seed,
        "augment": augmentation(student, chosen),
    }
    description = Description(
        bundle.embedder(precision=precision).describe(),
        {m: names.get(m, m) for m in chosen},
        {m: 1 if m in plain else views for m in chosen},
        dtype,
        preprocessing,
    )
    jobs = agree(lambda: _jobs(recipe, student, chosen), world)
    writer = FeatureWriter(out, description, world, overwrite=overwrite)
    embed = _Views(bundle, student, description, batch_size, precision)
    sources = {job.name: str(job.data["source"]) for job in jobs}
    done = write_shards(writer, jobs, lambda job: embed.shard(sources[job.name], str(job.data["shard"]), job.samples()))
    return {**done, "views": description.views, "bytes": sum(p.stat().st_size for p in out.iterdir())}


def _jobs(recipe: Recipe, student: Mapping[str, ModalityInput], chosen: Sequence[str]) -> list[ShardJob]:
    out = []
    for i, opened in enumerate(open_sources(recipe.data)):
        wanted = {m: e for m, e in members_of(recipe.data, i, student, recipe.pairs).items() if m in chosen}
        out += shard_jobs(opened, wanted, recipe.data, opened.source)
    return out


class _Views:
    """Embeds the views of a shard's samples."""

    def __init__(
        self,
        bundle: Bundle,
        student: Mapping[str, ModalityInput],
        description: Description,
        batch_size: int,
        precision: str,
    ) -> None:
        self.bundle, self.batch_size, self.description, self.precision = bundle, batch_size, description, precision
        self.seed, self.plain = int(description.preprocessing["seed"]), set(description.preprocessing["plain"])
        self.inputs = {m: as_student_sees(bundle.inputs[t], student[m]) for m, t in description.modalities.items()}
        for source in self.inputs.values():
            source.dummy()  # fast tokenizers keep their truncation as state: set here once, not by several threads
        bundle.model.eval()

    def shard(self, source: str, shard: str, samples: Samples) -> Gathered:
        """Views of all samples of one shard; views are drawn by the whole id, "source/shard/key"."""
        out = Gathered({m: (self.description.views[m], self.bundle.embed_dim) for m in self.inputs})
        for chunk in _chunks(samples, self.batch_size):
            good = []
            for key, found in chunk:
                i = out.sample(key)
                if isinstance(found, SampleError):
                    for m in self.inputs:
                        out.lose(i, m, str(found))
                else:
                    good.append((i, f"{source}/{shard}/{key}", found))
            for m in self.inputs:
                self._embed(m, [x for x in good if m in x[2].values], out)
        return out

    def _embed(self, m: str, samples: Sequence[tuple[int, str, Found]], out: Gathered) -> None:
        source, views = self.inputs[m], self.description.views[m]

        def read(k: int) -> list[Any]:
            _, key, found = samples[k]
            item = source.decode(found.values[m])
            if m in self.plain:
                return [source.eval(item)]
            return [source.train(item, sample_rng(self.seed, key, one, m)) for one in range(views)]

        got = [x for batch in read_ahead(read, len(samples), self.batch_size) for x in batch]
        bad = {k: x for k, x in enumerate(got) if isinstance(x, DecodeError)}
        rows = {k: x for k, x in enumerate(got) if not isinstance(x, DecodeError)}
        features: list[Tensor] = []
        for x in collate_usable(source, rows, self.batch_size, bad):
            moved = map_tensors(x, lambda t: t.to(self.bundle.device))
            with torch.no_grad(), autocast(self.bundle.device, self.precision):
                features.append(self.bundle.model.encode(self.description.modalities[m], moved).cpu())
        if features:
            which = [samples[k][0] for k in rows if k not in bad]
            out.add(m, which, torch.cat(features).view(-1, views, self.bundle.embed_dim))
        for k, why in bad.items():
            out.lose(samples[k][0], m, str(why))


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for x in items:
        chunk.append(x)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


# --- reading -----------------------------------------------------------------------------------------------------


class Cache:
    """A cache as a training run reads it: features by sample key ("source/shard/key").

    Attributes:
        description: what the features depend on.

    Raises:
        DataError: if the folder holds no finished cache, or a file in it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._store = FeatureStore(folder)
        self.description = self._store.description
        self.parts = self._store.parts
        if not {"plain", "seed", "augment"} <= self.description.preprocessing.keys():
            raise DataError(
                f"{folder} holds features of plain shards, not of a recipe's augmented data: write a teacher's cache "
                f"with dualenc embed MODEL --recipe RECIPE"
            )
        ids: list[int] = []
        files: list[np.ndarray[Any, Any]] = []
        for k, part in enumerate(self.parts):
            before = f"{part.data['source']}/{part.data['shard']}"
            ids += [stable_id(f"{before}/{key}") for key in part.ids]
            files.append(np.stack([np.full(len(part.ids), k), np.arange(len(part.ids))], 1))
        order = np.argsort(np.array(ids, np.int64), kind="stable")
        self._ids = np.array(ids, np.int64)[order]
        self._places = np.concatenate(files)[order] if files else np.zeros((0, 2), np.int64)

    def covers(self, sets: Sequence[ShardSet], allowed: float) -> None:
        """Refuse a cache that was made from other data, or lacks more than ``allowed`` (a share) of it.

        Raises:
            DataError: naming the shard, and how much is missing.
        """
        known = {(p.data["source"], p.data["shard"]): p for p in self.parts}
        missing, total, first = 0, 0, ""
        for opened in sets:
            for name, info in zip(opened.names, opened.infos, strict=True):
                total += info.samples
                part = known.get((opened.source, name))
                if part is None:
                    missing, first = missing + info.samples, first or f"{opened.source}/{name}"
                    continue
                made = part.data
                if (made["samples"], made["bytes"]) != (info.samples, info.bytes):
                    raise DataError(
                        f"{self.folder} is stale: shard {opened.source}/{name} had {made['samples']} samples in "
                        f"{made['bytes']} bytes when its features were written, now {info.samples} in {info.bytes}; "
                        "write the cache again"
                    )
                gone = info.samples - len(part.ids)
                missing, first = missing + gone, first or (f"{opened.source}/{name}" if gone else "")
        if missing > allowed * total:
            raise DataError(
                f"{self.folder} lacks {missing:,} of {total:,} samples ({100 * missing / total:.1f} %), the first in "
                f"{first}: write it again with dualenc embed, or allow it with the teacher's max_missing"
            )

    def rows(self, m: str, keys: Sequence[str], passes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features [B, D] fp32 and which keys have them, bool [B]; the view of a key is ``pass % V``."""
        at, found = self._find(keys)
        out = torch.zeros(len(keys), int(self.description.model["embed_dim"]))
        has = torch.zeros(len(keys), dtype=torch.bool)
        views = np.array(passes, np.int64) % self.description.views[m]
        where = np.flatnonzero(found)
        for k in np.unique(self._places[at[where], 0]).tolist():
            part = self.parts[k]
            slots = where[self._places[at[where], 0] == k]
            rows = part.row_of(m)[self._places[at[slots], 1]]
            slots, rows = slots[rows >= 0], rows[rows >= 0]
            x = part.at(m, torch.from_numpy(rows), torch.from_numpy(views[slots]))
            out[slots], has[slots] = x, True
        # fp16 and int8 leave the unit sphere by a rounding
        return torch.where(has[:, None], torch.nn.functional.normalize(out, dim=-1), out), has

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The keys that the cache does not know: it has neither features of them nor the reason for their lack."""
        _, found = self._find(keys)
        return [k for k, ok in zip(keys, found, strict=True) if not ok]

    def _find(self, keys: Sequence[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The position of each key among the sorted ids, and whether it is there."""
        ids = np.array([stable_id(k) for k in keys], np.int64)
        at = np.searchsorted(self._ids, ids).clip(max=max(len(self._ids) - 1, 0))
        return at, self._ids[at] == ids if len(self._ids) else np.zeros(len(ids), bool)
