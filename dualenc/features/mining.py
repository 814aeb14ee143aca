"""Clusters and neighbours of stored features, for the batch plans ``clusters``, ``hard_negatives`` and ``bags``.

Both run over whole features in blocks, exactly and from a fixed seed; the files name samples by shard and key
(:mod:`dualenc.data.batches.mined_files`).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dualenc.data.batches.facts import sample_id
from dualenc.data.batches.mined_files import write_mined
from dualenc.data.order import Ints
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.features.store import FeatureStore

logger = logging.getLogger(__name__)
_BLOCK = 2048
_EVERY_S = 5.0


def read_features(store: FeatureStore, modalities: Sequence[str]) -> tuple[Ints, Tensor]:
    """Ids int64 [n] and unit features fp32 [n, D] of the samples that have every one of ``modalities``; of several, the
    features end to end, so that a cosine is the mean of theirs.

    Raises:
        ConfigError: the store has no such modality.
        DataError: the features are not of shards, or no sample has all modalities.
    """
    for m in modalities:
        if m not in store.description.modalities:
            raise ConfigError(
                f"--modalities: {store.folder} has no {m!r}. {did_you_mean(m, store.description.modalities)}"
            )
    ids: list[int] = []
    rows: list[Tensor] = []
    for part in store.parts:
        shard = part.data.get("shard")
        if not isinstance(shard, str):
            raise DataError(f"{store.folder}: its features are not of shards, so they have no place in a batch plan")
        places = [part.row_of(m) if part.counts.get(m) else np.full(len(part.ids), -1) for m in modalities]
        have = np.flatnonzero(np.stack([p >= 0 for p in places]).all(0))
        if not len(have):
            continue
        own = [part.features(m)[torch.from_numpy(p[have]), 0] for m, p in zip(modalities, places, strict=True)]
        rows.append(torch.cat([torch.nn.functional.normalize(x, dim=1) for x in own], 1))
        ids += [sample_id(shard, part.ids[i]) for i in have.tolist()]
    if not rows:
        raise DataError(f"{store.folder}: no sample has features of all of {', '.join(modalities)}")
    return np.array(ids, np.int64), torch.nn.functional.normalize(torch.cat(rows), dim=1)


def read_stages(stores: Sequence[FeatureStore], modalities: Sequence[str]) -> tuple[Ints, Tensor]:
    """As :func:`read_features`, of several models' features of the same samples end to end (MCL's stages, S27): a
    cosine is the mean of theirs. Samples that a model lacks are left out.

    Raises:
        ConfigError: a store has no such modality.
        DataError: no sample is in all of them.
    """
    ids, x = read_features(stores[0], modalities)
    for store in stores[1:]:
        others, y = read_features(store, modalities)
        ids, one, two = np.intersect1d(ids, others, return_indices=True)
        if not len(ids):
            raise DataError(f"{store.folder}: none of its samples is in {stores[0].folder}; embed the same shards")
        x = torch.cat([x[torch.from_numpy(one)], y[torch.from_numpy(two)]], 1)
    return ids, torch.nn.functional.normalize(x, dim=1)


def k_means(x: Tensor, k: int, iterations: int = 100, tolerance: float = 1e-5, seed: int = 0) -> Ints:
    """Cluster of each unit row of ``x`` [n, D]: int64 [n] below k. Lloyd's algorithm on cosines, begun by k-means++.

    Raises:
        ConfigError: fewer rows than clusters.
    """
    n = len(x)
    if not 1 <= k <= n:
        raise ConfigError(f"--clusters: {k} clusters of {n:,} samples cannot be made; use a number from 1 to {n:,}")
    rng = np.random.Generator(np.random.Philox(key=seed))
    chosen = [int(rng.integers(n))]
    far = 1 - x @ x[chosen[0]]
    for _ in range(k - 1):
        weights = far.clamp(min=0).double().cumsum(0)
        at = int(torch.searchsorted(weights, rng.random() * float(weights[-1]), right=True))
        chosen.append(min(at, n - 1))
        far = torch.minimum(far, 1 - x @ x[chosen[-1]])
    centres, before = x[chosen].clone(), -1.0
    label = torch.zeros(n, dtype=torch.long)
    for _ in range(iterations):
        best = torch.empty(n)
        for start in range(0, n, 16 * _BLOCK):
            best[start : start + 16 * _BLOCK], label[start : start + 16 * _BLOCK] = (
                x[start : start + 16 * _BLOCK] @ centres.T
            ).max(1)
        now = float(best.double().mean())
        if now - before <= tolerance:
            break
        before = now
        sums = torch.zeros_like(centres).index_add_(0, label, x)
        empty = torch.bincount(label, minlength=k) == 0
        if bool(empty.any()):  # an empty cluster begins again at the sample that fits worst
            sums[empty] = x[best.argsort()[: int(empty.sum())]]
        centres = torch.nn.functional.normalize(sums, dim=1)
    return label.numpy()


def nearest_neighbors(x: Tensor, k: int, max_cosine: float = 1.0) -> np.ndarray:
    """The ``k`` most similar other rows of each unit row of ``x`` [n, D]: int32 [n, k], most similar first, −1 where
    there are fewer. ``max_cosine``: rows above it are near-duplicates and left out. n² · D multiplications."""
    n, began = len(x), time.monotonic()
    out = np.full((n, k), -1, np.int32)
    for start in range(0, n, _BLOCK):
        cosine = x[start : start + _BLOCK] @ x.T
        own = torch.arange(len(cosine))
        cosine[own, start + own] = -2
        if max_cosine < 1:
            cosine[cosine > max_cosine] = -2
        value, at = cosine.topk(min(k, n))
        at[value <= -2] = -1
        out[start : start + len(cosine), : at.shape[1]] = at.numpy()
        if time.monotonic() - began > _EVERY_S:
            began = time.monotonic()
            logger.info("Neighbours of %d of %d samples.", start + len(cosine), n)
    return out


@dataclass(frozen=True, slots=True)
class Gap:
    """How far apart two modalities of a model are, over the ``pairs`` that it has seen.

    Attributes:
        cosine: c, the mean cosine of positives; distance: of the two means (Liang et al. 2022, arXiv 2203.02053).
    """

    pairs: int
    dim: int
    cosine: float
    distance: float

    @property
    def noise(self) -> float:
        """The expected length of noise after which a vector's cosine with itself is about c, √(1/c² − 1): from
        E cos(y, y + wε) ≈ 1 / √(1 + w²D) with ε ~ N(0, I), of length w√D (CLOSE, arXiv 2211.09778)."""
        return math.sqrt(1 / self.cosine**2 - 1)

    @property
    def w(self) -> float:
        """The same as a standard deviation of each number, as CLOSE writes it."""
        return self.noise / math.sqrt(self.dim)


def measure_gap(folder: Path, modalities: Sequence[str] = ()) -> Gap:
    """The gap between two modalities of stored features, over all samples that have both.

    Raises:
        ConfigError: the store has no such modality, or not two are named.
        DataError: the features are not of shards; positives have a mean cosine of 0 or less.
    """
    store = FeatureStore(folder)
    two = list(modalities) or list(store.description.modalities)
    if len(two) != 2:
        raise ConfigError(f"--modalities: name two of {', '.join(store.description.modalities)}, got {', '.join(two)}")
    x = read_features(store, two)[1]
    a, b = (torch.nn.functional.normalize(y.double(), dim=1) for y in x.chunk(2, 1))
    found = gap_of(a, b)
    if found.cosine <= 0:
        raise DataError(
            f"{folder}: pairs of {' and '.join(two)} have the mean cosine {found.cosine:.3f}, so they are not aligned"
        )
    return found


def gap_of(a: Tensor, b: Tensor) -> Gap:
    """The gap between unit features ``a`` and ``b`` [n, D], whose rows are pairs."""
    return Gap(len(a), a.shape[1], float((a * b).sum(1).mean()), float((a.mean(0) - b.mean(0)).norm()))


def mine_clusters(
    folders: Sequence[Path], modalities: Sequence[str], clusters: int, out: Path, seed: int = 0
) -> list[int]:
    """Write the file of clusters of feature stores, of one model each; returns their sizes, largest first."""
    stores = [FeatureStore(folder) for folder in folders]
    chosen = list(modalities) or list(stores[0].description.modalities)
    ids, x = read_stages(stores, chosen)
    labels = k_means(x, clusters, seed=seed)
    write_mined(out, {"ids": ids, "labels": labels}, _about(stores, chosen, clusters=clusters, seed=seed))
    return sorted(np.bincount(labels, minlength=clusters).tolist(), reverse=True)


def mine_neighbors(
    folders: Sequence[Path], modalities: Sequence[str], k: int, out: Path, max_cosine: float = 1.0
) -> tuple[int, float]:
    """Write the file of neighbours in feature stores, of one model each; returns their samples and the mean cosine to
    the nearest."""
    stores = [FeatureStore(folder) for folder in folders]
    chosen = list(modalities) or list(stores[0].description.modalities)
    ids, x = read_stages(stores, chosen)
    near = nearest_neighbors(x, k, max_cosine)
    write_mined(out, {"ids": ids, "neighbors": near}, _about(stores, chosen, k=k, max_cosine=max_cosine))
    first = torch.from_numpy(near[:, 0].astype(np.int64))
    some = first >= 0
    return len(ids), float((x[some] * x[first[some]]).sum(1).mean()) if bool(some.any()) else 0.0


def _about(stores: Sequence[FeatureStore], modalities: Sequence[str], **settings: float) -> dict[str, str]:
    return {
        "features": ",".join(s.digest for s in stores),
        "modalities": ",".join(modalities),
        "settings": json.dumps(settings),
    }
