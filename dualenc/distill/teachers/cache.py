"""Teacher features on disk, beside the data: written once, read at the cost of a look-up.

    OUT/NUMBER.safetensors    modality → [n, V, D] fp16 (or int8 and MODALITY.scale [n, V]), MODALITY.has bool [n]
    OUT/NUMBER.json           keys in that order ("source/shard/key"); key → reason of what has no features at all, and
                              modality → key → reason of what has some
    OUT/teacher.json          the teacher (hash of its weights, inputs), how views were drawn, the shards; written last

V views of a sample are what the student sees in passes 0 … V − 1, by the very draw: augmentation is a function of
(seed, sample, pass), so a student that trains on the cache draws its view number ``pass % V`` with the cache's seed,
and teacher and student see one crop and one caption (MobileCLIP's reinforced sets, arXiv 2311.17049, store the
parameters of the augmentation instead). A ``plain`` modality has one view, the item as in evaluation, whatever the
student draws.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualenc.config import Recipe
from dualenc.data.batch import map_tensors
from dualenc.data.dataset import members_of, sample_rng, stable_id
from dualenc.data.modalities import DecodeError, ModalityInput
from dualenc.data.shards.index import ShardSet, open_source
from dualenc.data.shards.reader import Found, SampleError, iter_samples
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.model import Bundle
from dualenc.model.bundle import resolve_input

ABOUT = "teacher.json"
FORMAT = 1
_TORCH = {"fp16": torch.float16, "int8": torch.int8, "fp32": torch.float32}


def as_student_sees(teacher: ModalityInput, student: ModalityInput) -> ModalityInput:
    """The teacher's input with the student's augmentation: from one random state both draw the same view."""
    mine: Any = getattr(teacher, "config", None)
    theirs: Any = getattr(student, "config", None)
    fields = getattr(type(mine), "model_fields", {})
    if mine is None or "augment" not in fields or not hasattr(theirs, "augment"):
        return teacher
    return type(teacher)(mine.model_copy(update={"augment": theirs.augment}), getattr(teacher, "base_dir", None))


def augmentation(inputs: Mapping[str, ModalityInput], modalities: Sequence[str]) -> dict[str, Any]:
    """Modality → the student's augmentation: what a drawn view depends on beside the seed."""
    out = {}
    for m in modalities:
        augment = getattr(getattr(inputs[m], "config", None), "augment", None)
        out[m] = augment.model_dump(mode="json") if augment is not None else None
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
) -> dict[str, Any]:
    """Write a teacher's features of every sample of a recipe's data.

    Args:
        bundle: the teacher.
        recipe: the student's: its sources, members, augmentation and seed.
        views: V of the modalities that are not plain.
        plain: modalities stored as in evaluation.
        names: student's modality → the teacher's, where they differ.
        dtype: how features are stored. int8: each row is scaled by its largest entry, an error below 1/254 of that.

    Returns:
        ``{"out", "samples", "lost", "views", "bytes"}``.

    Raises:
        ConfigError: if the teacher has none of the recipe's modalities, or ``plain`` names none of them.
        DataError: for missing or broken shards.
    """
    if dtype not in _TORCH:
        raise ConfigError(f"--dtype: {dtype!r} is none of {', '.join(_TORCH)}")
    names = dict(names or {})
    student = {m: resolve_input(m, part)[1] for m, part in recipe.modalities.items()}
    chosen = [m for m in student if names.get(m, m) in bundle.inputs]
    if not chosen:
        raise ConfigError(f"the teacher has {bundle.modalities}, the recipe {list(student)}: nothing to embed.")
    for m in plain:
        if m not in chosen:
            raise ConfigError(f"--plain: {m!r} is not embedded. {did_you_mean(m, chosen)}")
    about: dict[str, Any] = {
        "format": FORMAT,
        "model": bundle.embedder().describe(),
        "modalities": {m: names.get(m, m) for m in chosen},
        "views": {m: 1 if m in plain else views for m in chosen},
        "plain": [m for m in chosen if m in plain],
        "seed": recipe.seed,
        "augment": augmentation(student, chosen),
        "dtype": dtype,
        "shards": [],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / ABOUT).unlink(missing_ok=True)
    writer = _Writer(bundle, student, about, batch_size)
    samples = lost = 0
    for i, source in enumerate(recipe.data.sources):
        opened = open_source(source, recipe.data.retries)
        wanted = {m: e for m, e in members_of(recipe.data, i, student, recipe.pairs).items() if m in chosen}
        found = iter_samples(source, wanted, recipe.data)
        for name, group in groupby(found, key=lambda s: s[0].rpartition("/")[0]):
            keys, gone = writer.shard(out / f"{len(about['shards']):06d}", source.name, name, group)
            info = opened.infos[opened.names.index(name)]
            row = {"source": source.name, "name": name, "samples": info.samples, "bytes": info.bytes}
            about["shards"].append(row | {"rows": keys})
            samples, lost = samples + info.samples, lost + gone
    _write_text(out / ABOUT, json.dumps(about, indent=1, ensure_ascii=False))
    size = sum(p.stat().st_size for p in out.iterdir())
    return {"out": str(out), "samples": samples, "lost": lost, "views": about["views"], "bytes": size}


class _Writer:
    """Embeds the views of a shard's samples."""

    def __init__(
        self, bundle: Bundle, student: Mapping[str, ModalityInput], about: Mapping[str, Any], batch_size: int
    ) -> None:
        self.bundle, self.about, self.batch_size = bundle, about, batch_size
        self.inputs = {m: as_student_sees(bundle.inputs[t], student[m]) for m, t in about["modalities"].items()}
        for source in self.inputs.values():
            source.dummy()  # fast tokenizers keep their truncation as state: set here once, not by several threads
        bundle.model.eval()

    def shard(
        self, out: Path, source: str, name: str, samples: Iterator[tuple[str, Found | SampleError]]
    ) -> tuple[int, int]:
        """Write one shard's files; returns how many samples have a row, and how many have nothing."""
        from safetensors.torch import save_file

        keys: list[str] = []
        lost: dict[str, str] = {}
        self.partly: dict[str, dict[str, str]] = {}
        rows: dict[str, list[Tensor | None]] = {m: [] for m in self.inputs}
        for chunk in _chunks(samples, self.batch_size):
            good = []
            for path, found in chunk:
                key = f"{source}/{path}"
                if isinstance(found, SampleError):
                    lost[key] = str(found)
                else:
                    good.append((key, found))
            made = {m: self._embed(m, good) for m in self.inputs}
            for i, (key, _) in enumerate(good):
                if all(x[i] is None for x in made.values()):
                    lost.setdefault(key, "it has none of the modalities")
                    continue
                keys.append(key)
                for m, x in made.items():
                    rows[m].append(x[i])
        tensors: dict[str, Tensor] = {}
        for m, x in rows.items():
            tensors |= self._stored(m, x)
        hidden = out.with_name(f".{out.name}.tmp")
        save_file(tensors, str(hidden))
        os.replace(hidden, out.with_suffix(".safetensors"))
        _write_text(
            out.with_suffix(".json"),
            json.dumps({"keys": keys, "lost": lost, "partly": self.partly}, ensure_ascii=False),
        )
        return len(keys), len(lost)

    def _stored(self, m: str, rows: Sequence[Tensor | None]) -> dict[str, Tensor]:
        shape = (self.about["views"][m], self.bundle.embed_dim)
        x = torch.stack([torch.zeros(shape) if r is None else r for r in rows]) if rows else torch.zeros(0, *shape)
        out = {f"{m}.has": torch.tensor([r is not None for r in rows], dtype=torch.bool)}
        if self.about["dtype"] == "int8":
            largest = x.abs().amax(-1).clamp(min=1e-12)
            out |= {f"{m}.scale": largest, m: (x / largest[..., None] * 127).round().to(torch.int8)}
        else:
            out[m] = x.to(_TORCH[self.about["dtype"]])
        return out

    def _embed(self, m: str, samples: Sequence[tuple[str, Found]]) -> list[Tensor | None]:
        """[V, D] of each sample, or None."""
        source, views = self.inputs[m], int(self.about["views"][m])

        def read(sample: tuple[str, Found]) -> list[Any] | str:
            key, found = sample
            if m not in found.values:
                return ""
            try:
                item = source.decode(found.values[m])
                if m in self.about["plain"]:
                    return [source.eval(item)]
                return [source.train(item, sample_rng(self.about["seed"], key, k, m)) for k in range(views)]
            except DecodeError as e:
                return str(e)

        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            read_ones = list(pool.map(read, samples))
        flat = [row for r in read_ones if isinstance(r, list) for row in r]
        features: list[Tensor] = []
        for k in range(0, len(flat), self.batch_size):
            x = source.collate(flat[k : k + self.batch_size])
            moved = map_tensors(x, lambda t: t.to(self.bundle.device))
            with torch.no_grad():
                features.append(self.bundle.model.encode(self.about["modalities"][m], moved).cpu())
        done = iter(torch.cat(features).view(-1, views, self.bundle.embed_dim) if features else ())
        out: list[Tensor | None] = []
        for (key, _), r in zip(samples, read_ones, strict=True):
            if isinstance(r, str) and r:
                self.partly.setdefault(m, {})[key] = r
            out.append(next(done) if isinstance(r, list) else None)
        return out


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for x in items:
        chunk.append(x)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _write_text(path: Path, text: str) -> None:
    hidden = path.with_name(f".{path.name}.tmp")
    hidden.write_text(text, encoding="utf-8")
    os.replace(hidden, path)


# --- reading -----------------------------------------------------------------------------------------------------


class Cache:
    """A cache as a training run reads it: features by sample key; the files are mapped, not read whole.

    Attributes:
        about: what ``teacher.json`` says.

    Raises:
        DataError: if the folder holds no finished cache, or a file in it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / ABOUT
        if not path.is_file():
            raise DataError(
                f"{folder} holds no teacher features ({ABOUT} is not there): write them with "
                f"dualenc embed MODEL --recipe RECIPE --out {folder}"
            )
        self.about = _json(path)
        if self.about.get("format") != FORMAT:
            raise DataError(f"{path}: format: {self.about.get('format')!r} is not {FORMAT}; write the cache anew")
        ids: list[int] = []
        files: list[np.ndarray[Any, Any]] = []
        self.lost: set[str] = set()
        lost_in: list[int] = []
        self._tensors: list[dict[str, Tensor]] = []
        for k, shard in enumerate(self.about["shards"]):
            said = _json(self.folder / f"{k:06d}.json")
            if len(said["keys"]) != shard["rows"]:
                raise DataError(
                    f"{self.folder}/{k:06d}.json has {len(said['keys'])} keys, {ABOUT} says {shard['rows']}: the cache "
                    "was changed after it was written; write it anew"
                )
            ids += [stable_id(key) for key in said["keys"]]
            files.append(np.stack([np.full(len(said["keys"]), k), np.arange(len(said["keys"]))], 1))
            self.lost |= set(said["lost"])
            lost_in.append(len(said["lost"]))
            self._tensors.append({})
        self._lost_in = lost_in
        order = np.argsort(np.array(ids, np.int64), kind="stable")
        self._ids = np.array(ids, np.int64)[order]
        self._places = np.concatenate(files)[order] if files else np.zeros((0, 2), np.int64)

    def covers(self, sets: Sequence[ShardSet], allowed: float) -> None:
        """Refuse a cache that was made of other data, or lacks more than ``allowed`` (a share) of it.

        Raises:
            DataError: naming the shard, and how much is missing.
        """
        known = {(s["source"], s["name"]): (s, n) for s, n in zip(self.about["shards"], self._lost_in, strict=True)}
        missing, total, first = 0, 0, ""
        for opened in sets:
            for name, info in zip(opened.names, opened.infos, strict=True):
                total += info.samples
                shard, lost = known.get((opened.source, name), (None, 0))
                if shard is None:
                    missing, first = missing + info.samples, first or f"{opened.source}/{name}"
                    continue
                if (shard["samples"], shard["bytes"]) != (info.samples, info.bytes):
                    raise DataError(
                        f"{self.folder} is stale: shard {opened.source}/{name} had {shard['samples']} samples in "
                        f"{shard['bytes']} bytes when its features were written, now {info.samples} in {info.bytes}; "
                        "write the cache anew"
                    )
                gone = info.samples - shard["rows"] - lost
                missing, first = missing + gone, first or (f"{opened.source}/{name}" if gone else "")
        if missing > allowed * total:
            raise DataError(
                f"{self.folder} lacks {missing:,} of {total:,} samples ({100 * missing / total:.1f} %), the first in "
                f"{first}: write it anew with dualenc embed, or allow it with the teacher's max_missing"
            )

    def rows(self, m: str, keys: Sequence[str], passes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features [B, D] fp32 and which keys have them, bool [B]; the view of a key is ``pass % V``."""
        ids = np.array([stable_id(k) for k in keys], np.int64)
        at = np.searchsorted(self._ids, ids).clip(max=max(len(self._ids) - 1, 0))
        found = self._ids[at] == ids if len(self._ids) else np.zeros(len(ids), bool)
        out = torch.zeros(len(keys), int(self.about["model"]["embed_dim"]))
        has = torch.zeros(len(keys), dtype=torch.bool)
        for i in np.flatnonzero(found).tolist():
            file, row = (int(v) for v in self._places[at[i]])
            tensors = self._open(file)
            if not tensors[f"{m}.has"][row]:
                continue
            view = int(passes[i]) % int(self.about["views"][m])
            x = tensors[m][row, view].float()
            if self.about["dtype"] == "int8":
                x = x * (tensors[f"{m}.scale"][row, view] / 127)
            out[i], has[i] = x, True
        # fp16 and int8 leave the unit sphere by a rounding
        return torch.where(has[:, None], torch.nn.functional.normalize(out, dim=-1), out), has

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The keys that have neither features nor a reason why not."""
        ids = np.array([stable_id(k) for k in keys], np.int64)
        known = np.isin(ids, self._ids)
        return [k for k, ok in zip(keys, known, strict=True) if not ok and k not in self.lost]

    def _open(self, k: int) -> dict[str, Tensor]:
        if not self._tensors[k]:
            from safetensors import SafetensorError, safe_open

            path = self.folder / f"{k:06d}.safetensors"
            try:
                with safe_open(str(path), framework="pt") as f:
                    self._tensors[k] = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as e:
                raise DataError(f"{path} cannot be read ({e}); write the cache anew") from e
        return self._tensors[k]


def _json(path: Path) -> dict[str, Any]:
    try:
        out = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"{path} cannot be read ({e}); write the cache anew") from e
    if not isinstance(out, dict):
        raise DataError(f"{path} is no description of a cache; write the cache anew")
    return out
