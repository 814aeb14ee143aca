"""Features of every sample of some shards, one safetensors file a shard, with the keys beside them.

OUT/SHARD.safetensors    modality → fp32 [n, D], rows in the order of the keys
OUT/SHARD.json           {"model": …, "keys": {modality: [key, …]}, "lost": {key: reason}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualenc.data.shards.reader import Found, SampleError, iter_samples
from dualenc.errors import ConfigError, did_you_mean
from dualenc.model.bundle import Bundle
from dualenc.model.embedder import Embedder

_CHUNK = 16
"""Batches read before they are embedded: enough for the decoding pool, little memory."""


def embed_shards(
    bundle: Bundle, shards: str, out: Path, modalities: Sequence[str] = (), batch_size: int = 64
) -> dict[str, Any]:
    """Embed the samples of ``shards`` in the order they lie.

    A sample that lacks a modality, or whose bytes are bad, has no row for it; the reason is in the shard's json.

    Args:
        shards: path, brace pattern or URL.
        out: folder for the files; created.
        modalities: which to embed; empty: all of the model's.

    Returns:
        ``{"out", "shards", "samples", "embedded": {modality: rows}, "lost": samples without any row}``.

    Raises:
        ConfigError: for a modality the model does not have.
        DataError: for missing or broken shards.
    """
    chosen = list(modalities) or bundle.modalities
    for m in chosen:
        if m not in bundle.inputs:
            raise ConfigError(f"--modalities: there is no modality {m!r}. {did_you_mean(m, bundle.inputs)}")
    out.mkdir(parents=True, exist_ok=True)
    embedder = bundle.embedder()
    model = embedder.describe()
    wanted = {m: bundle.inputs[m].default_members for m in chosen}
    report: dict[str, Any] = {
        "out": str(out),
        "shards": 0,
        "samples": 0,
        "embedded": dict.fromkeys(chosen, 0),
        "lost": 0,
    }
    for name, samples in groupby(iter_samples(shards, wanted), key=lambda s: s[0].rpartition("/")[0]):
        tensors, keys, lost, count = _one_shard(embedder, samples, chosen, batch_size)
        _write(out, name.replace("/", "_"), tensors, {"model": model, "keys": keys, "lost": lost})
        report["shards"] += 1
        report["samples"] += count
        report["lost"] += count - len(set().union(*keys.values()))
        for m in chosen:
            report["embedded"][m] += len(keys[m])
    return report


def _one_shard(
    embedder: Embedder, samples: Iterator[tuple[str, Found | SampleError]], chosen: Sequence[str], batch_size: int
) -> tuple[dict[str, Tensor], dict[str, list[str]], dict[str, str], int]:
    rows: dict[str, list[Tensor]] = {m: [torch.zeros(0, embedder.embed_dim)] for m in chosen}
    keys: dict[str, list[str]] = {m: [] for m in chosen}
    waiting: dict[str, list[tuple[str, Any]]] = {m: [] for m in chosen}
    lost: dict[str, str] = {}
    count = 0

    def flush(m: str) -> None:
        bad: dict[int, str] = {}
        rows[m].append(embedder.embed(m, [raw for _, raw in waiting[m]], batch_size, bad))
        lost.update({f"{waiting[m][i][0]}:{m}": reason for i, reason in bad.items()})
        keys[m] += [key for i, (key, _) in enumerate(waiting[m]) if i not in bad]
        waiting[m].clear()

    for path, found in samples:
        count += 1
        key = path.rpartition("/")[2]
        if isinstance(found, SampleError):
            lost[key] = str(found)
            continue
        for m in chosen:
            if m in found.values:
                waiting[m].append((key, found.values[m]))
                if len(waiting[m]) >= _CHUNK * batch_size:
                    flush(m)
    for m in chosen:
        flush(m)
    return {m: torch.cat(rows[m]) for m in chosen}, keys, lost, count


def _write(out: Path, name: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Both files under a hidden name first: what stands there is whole."""
    from safetensors.torch import save_file

    hidden = out / f".{name}.tmp"
    save_file({m: x.contiguous() for m, x in tensors.items()}, str(hidden))
    os.replace(hidden, out / f"{name}.safetensors")
    hidden.write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    os.replace(hidden, out / f"{name}.json")
