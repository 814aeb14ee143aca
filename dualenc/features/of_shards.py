"""Features of every sample of some shards: one part of the store per shard, each rank its share of the shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualenc.config import Data, Source
from dualenc.data.shards.index import ShardSet, open_source
from dualenc.data.shards.reader import Found, SampleError, iter_samples
from dualenc.distributed.world import World, agree, all_gather_object
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.features.store import Description, Lost, PartInfo, part_name, totals
from dualenc.features.writer import FeatureWriter, PartRows
from dualenc.model import Bundle, Embedder

_CHUNK = 16
"""Batches read before they are embedded: enough for the decoding pool, little memory."""

Samples = Iterator[tuple[str, Found | SampleError]]


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One shard to be embedded: the part's name, what is recorded about the data, and how to read it."""

    name: str
    data: dict[str, Any]
    samples: Callable[[], Samples]
    """The whole key of each sample, and its raw values or why there are none."""


@dataclass(slots=True)
class Gathered:
    """The features of one shard, collected as they are made.

    Attributes:
        shapes: modality → (V, D).
        ids: of the samples seen so far.
    """

    shapes: Mapping[str, tuple[int, int]]
    ids: list[str] = field(default_factory=list)
    _which: dict[str, list[int]] = field(default_factory=dict)
    _rows: dict[str, list[Tensor]] = field(default_factory=dict)
    _lost: list[tuple[int, str, str]] = field(default_factory=list)

    def sample(self, key: str) -> int:
        """Add a sample by its whole key; returns its number, which the other methods take."""
        self.ids.append(key)
        return len(self.ids) - 1

    def add(self, m: str, which: Sequence[int], x: Tensor) -> None:
        """Rows [n, V, D] of a modality, of the samples ``which`` [n]."""
        self._which.setdefault(m, []).extend(which)
        self._rows.setdefault(m, []).append(x)

    def lose(self, i: int, m: str, reason: str) -> None:
        """Record a row that cannot be made."""
        self._lost.append((i, m, reason))

    def rows(self) -> PartRows:
        """As the writer takes them, for every modality."""
        empty = {m: torch.zeros(0, *shape) for m, shape in self.shapes.items()}
        return {m: (self._which.get(m, []), torch.cat([x, *self._rows.get(m, [])])) for m, x in empty.items()}

    def lost(self) -> list[Lost]:
        """Lost rows in the order of the samples."""
        order = list(self.shapes)
        found = sorted(self._lost, key=lambda x: (x[0], order.index(x[1])))
        return [Lost(self.ids[i], m, reason) for i, m, reason in found]


def embed_shards(
    bundle: Bundle,
    shards: str,
    out: Path,
    modalities: Sequence[str] = (),
    batch_size: int = 64,
    dtype: str = "fp32",
    world: World | None = None,
    overwrite: bool = False,
    dim: int | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Embed the samples of ``shards`` in their order, into a :class:`~dualenc.features.store.FeatureStore`.

    A sample that lacks a modality has no row for it; one whose bytes are bad is listed with the reason. Parts that are
    finished already (after a kill) are kept.

    Args:
        shards: path, brace pattern or URL.
        out: folder for the files; created.
        modalities: which to embed; empty: all of the model's.
        dtype: how features are stored: fp32, fp16 or int8.
        world: the ranks that share the work, each on its own copy of the model; all of them must call this.
        overwrite: replace other features in ``out``.
        dim: keep the first ``dim`` dimensions of each feature, of length 1 again (Matryoshka).
        precision: what the model computes in: fp32, bf16, or fp16 on a GPU.

    Returns:
        ``{"out", "shards", "kept" (shards that were finished already), "samples"}`` and, by modality, rows that were
        ``embedded``, ``lost`` (named in the part's json) and ``absent`` (the sample has no such member).

    Raises:
        ConfigError: for a modality the model does not have; ``out`` holds other features.
        DataError: for missing or broken shards, or if no sample could be embedded.
    """
    world = world or World()
    chosen = chosen_of(bundle, modalities)
    embedder = bundle.embedder(dim, precision)
    wanted = {m: bundle.inputs[m].default_members for m in chosen}
    opened = agree(lambda: open_source(Source.model_validate({"name": "embed", "shards": shards})), world)
    jobs = shard_jobs(opened, wanted, None)
    description = Description(embedder.describe(), {m: m for m in chosen}, dict.fromkeys(chosen, 1), dtype)
    writer = FeatureWriter(out, description, world, overwrite=overwrite)
    done = write_shards(writer, jobs, lambda job: embed_samples(embedder, job.samples(), chosen, batch_size))
    if not any(done["embedded"].values()):
        looked = "; ".join(f"{m}: {', '.join(e)}" for m, e in wanted.items())
        raise DataError(
            f"None of the {done['samples']} samples of {shards} could be embedded: {sum(done['lost'].values())} rows "
            f"are damaged, the other members are missing (looked for {looked})"
        )
    return done


def chosen_of(bundle: Bundle, modalities: Sequence[str]) -> list[str]:
    """The modalities to embed; all of the model's where none is named.

    Raises:
        ConfigError: for one the model does not have.
    """
    for m in modalities:
        if m not in bundle.inputs:
            raise ConfigError(f"--modalities: there is no modality {m!r}. {did_you_mean(m, bundle.inputs)}")
    return list(modalities) or bundle.modalities


def shard_jobs(
    opened: ShardSet, wanted: Mapping[str, Sequence[str]], data: Data | None, source: str | None = None
) -> list[ShardJob]:
    """A job for each shard of an opened source; ``source``: its name, if one store holds parts of several."""

    def samples(shard: int) -> Samples:
        start = len(opened.names[shard]) + 1
        for key, found in iter_samples(opened, wanted, data, only=[shard]):
            yield key[start:], found

    jobs = []
    for k, (name, info) in enumerate(zip(opened.names, opened.infos, strict=True)):
        about: dict[str, Any] = {} if source is None else {"source": source}
        about |= {"shard": name, "samples": info.samples, "bytes": info.bytes}
        # The digest of the shard's headers, from its index or from reading them: the same with an index or without.
        headers = info.headers or (opened.memory[k].digest if k in opened.memory else "")
        if headers:
            about["headers"] = headers
        about["members"] = {m: list(e) for m, e in wanted.items()}
        words = (name,) if source is None else (source, name)
        jobs.append(ShardJob(part_name(*words), about, lambda k=k: samples(k)))  # type: ignore[misc]
    return jobs


def write_shards(
    writer: FeatureWriter, jobs: Sequence[ShardJob], embed: Callable[[ShardJob], Gathered]
) -> dict[str, Any]:
    """Write a part for each job that has none yet; the ranks take jobs in turn.

    Returns:
        As :func:`embed_shards`, the same on every rank.
    """
    world = writer.world
    kept = 0

    def mine() -> list[PartInfo]:
        nonlocal kept
        infos = []
        for job in jobs[world.rank :: world.world_size]:
            info = writer.finished(job.name, job.data)
            kept += info is not None
            if info is None:
                got = embed(job)
                info = writer.write(job.name, got.ids, got.rows(), got.lost(), job.data)
            infos.append(info)
        return infos

    infos = writer.finish(agree(mine, world), [job.name for job in jobs])
    return {
        "out": str(writer.folder),
        "shards": len(infos),
        "kept": sum(all_gather_object(kept, world)),
        **totals(infos, list(writer.description.modalities)),
    }


def embed_samples(embedder: Embedder, samples: Samples, chosen: Sequence[str], batch_size: int) -> Gathered:
    """Features of samples as they come; a value that is a DataError is a row that is lost."""
    out = Gathered(dict.fromkeys(chosen, (1, embedder.embed_dim)))
    waiting: dict[str, list[tuple[int, Any]]] = {m: [] for m in chosen}

    def flush(m: str) -> None:
        bad: dict[int, str] = {}
        x = embedder.embed(m, [raw for _, raw in waiting[m]], batch_size, bad)
        for k, reason in bad.items():
            out.lose(waiting[m][k][0], m, reason)
        out.add(m, [i for k, (i, _) in enumerate(waiting[m]) if k not in bad], x[:, None])
        waiting[m].clear()

    for key, found in samples:
        i = out.sample(key)
        for m in chosen:
            if isinstance(found, SampleError):
                out.lose(i, m, str(found))
            elif isinstance(found.values.get(m), DataError):
                out.lose(i, m, str(found.values[m]))
            elif m in found.values:
                waiting[m].append((i, found.values[m]))
                if len(waiting[m]) >= _CHUNK * batch_size:
                    flush(m)
    for m in chosen:
        flush(m)
    return out
