"""A small memory of samples for later training: k of every class, as a selection beside their shards.

A run that learns new classes takes the old shards as a further source with this selection (experience replay), so what
is replayed is part of the plan like everything else, and the same on any number of ranks and after a resume.

Which k: drawn from (seed, sample id), or by herding (iCaRL, Rebuffi et al., arXiv 1611.07725): one after another, the
sample that brings the mean of those chosen nearest to the mean of its class. In both, the first k of a class are among
its first k + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dualenc.config import Data
from dualenc.data.batches.facts import ReadFacts
from dualenc.data.order import Ints, hashed
from dualenc.data.shards.index import open_sources
from dualenc.data.shards.reader import Reader
from dualenc.data.shards.selection import file_of, write_selection
from dualenc.errors import DataError
from dualenc.features.mining import read_stages
from dualenc.features.store import FeatureStore


def herded(x: Tensor, k: int) -> list[int]:
    """The first ``k`` rows of unit features ``x`` [n, D] by herding, in the order in which they are chosen."""
    rows, chosen = x.double(), list[int]()
    mean, total = rows.mean(0), torch.zeros(x.shape[1], dtype=torch.float64)
    for n in range(1, min(k, len(x)) + 1):
        distance = (mean - (total + rows) / n).square().sum(1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total += rows[chosen[-1]]
    return chosen


def exemplars(labels: Ints, ids: Ints, k: int, seed: int = 0, x: Tensor | None = None) -> Ints:
    """Numbers of ``k`` samples of every class (all, of one that has fewer), ascending.

    Args:
        labels: int64 [n]; below 0: no class.
        ids: int64 [n], the numbers of the samples that a draw depends on.
        x: unit features [n, D], for herding; rows of NaN are samples without one. None: draw.
    """
    drawn, out = hashed(seed, ids), []
    for label in np.unique(labels[labels >= 0]).tolist():
        at = np.flatnonzero(labels == label)
        if x is None:
            out += at[np.lexsort((at, drawn[at]))[:k]].tolist()
        else:
            at = at[~x[torch.from_numpy(at)].isnan().any(1).numpy()]
            out += at[herded(x[torch.from_numpy(at)], k)].tolist()
    return np.array(sorted(out), np.int64)


def keep_exemplars(
    shards: str | Sequence[str],
    label: str,
    k: int,
    name: str,
    features: Sequence[Path] = (),
    modalities: Sequence[str] = (),
    seed: int = 0,
) -> tuple[str, list[int]]:
    """Write the selection ``name`` (or path) of ``k`` samples of every class of some shards.

    Args:
        label: json:KEY or the ending of a member.
        features: stores of the shards' features for herding; of several models end to end. Empty: draw.
        modalities: which of them; default: all that are stored.

    Returns:
        Its file, and how many of each class it selects, most first.

    Raises:
        ConfigError, DataError: shards, labels or features that cannot be read; no sample has a label, or features.
    """
    patterns = [shards] if isinstance(shards, str) else list(shards)
    data = Data.model_validate({"sources": [{"name": "exemplars", "shards": patterns, "values": {"label": label}}]})
    sets = open_sources(data)
    facts = ReadFacts(data, sets)
    labels, ids = facts.values(0, "label"), facts.ids(0)
    x = None
    if features:
        stores = [FeatureStore(folder) for folder in features]
        known, rows = read_stages(stores, list(modalities) or list(stores[0].description.modalities))
        order = np.argsort(known, kind="stable")
        at = order[np.minimum(np.searchsorted(known[order], ids), len(known) - 1)]
        x = rows[torch.from_numpy(at)]
        x[torch.from_numpy(known[at] != ids)] = torch.nan
        if bool(x.isnan().any(1).all()):
            raise DataError(f"{stores[0].folder}: its features are of none of these shards; embed them first")
    chosen = exemplars(labels, ids, k, seed, x)
    weight = np.zeros(len(labels))
    weight[chosen] = 1
    how = f"{k} of every {label}, " + (f"drawn with seed {seed}" if x is None else "by herding")
    path, reader = file_of(name, sets[0]), Reader(sets, None, data.retries)
    try:
        write_selection(path, sets[0], lambda shard: reader.index(0, shard), weight, how, how)
    finally:
        reader.close()
    counts = np.unique(labels[chosen], return_counts=True)[1]
    return path, sorted(counts.tolist(), reverse=True)
