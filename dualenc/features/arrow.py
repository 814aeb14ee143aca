"""Stored features as Arrow tables, Parquet files and NumPy arrays, for tools that read those."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dualenc.distributed.world import World, agree
from dualenc.errors import ConfigError, DataError
from dualenc.features.store import FeaturePart, FeatureStore
from dualenc.files import replacing, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa


def table(part: FeaturePart, modalities: Sequence[str]) -> pa.Table:
    """A part as a table: ``id`` and a list of floats (fp32, whatever the store's dtype) for each modality, null where
    an id has no row. With several views, they are columns ``MODALITY.0`` … ``MODALITY.V-1``."""
    pa = _pyarrow()
    ids = [key.encode("utf-8", "backslashreplace").decode("utf-8") for key in part.ids]
    columns: dict[str, Any] = {"id": pa.array(ids, pa.string())}
    for m in modalities:
        x, place = part.features(m), part.row_of(m)
        for v in range(x.shape[1]):
            values = x[:, v].contiguous().numpy()
            ends = np.cumsum(np.where(place >= 0, x.shape[2], 0))
            starts = pa.array(np.concatenate([[0], ends]), pa.int64(), mask=np.append(place < 0, False))
            name = m if x.shape[1] == 1 else f"{m}.{v}"
            columns[name] = pa.LargeListArray.from_arrays(starts, pa.array(values.reshape(-1)))
    return pa.table(columns)


def write_parquet(store: FeatureStore, world: World | None = None) -> None:
    """``NAME.parquet`` beside every part of a finished store; the parts are distributed over the ranks.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: the folder cannot be written to.
    """
    world = world or World()
    agree(lambda: _write(store, world), world)


def _write(store: FeatureStore, world: World) -> None:
    _pyarrow()
    import pyarrow.parquet as pq

    for part in store.parts[world.rank :: world.world_size]:
        path = store.folder / f"{part.name}.parquet"
        try:
            with replacing(path) as hidden:
                pq.write_table(table(part, list(store.description.modalities)), hidden)
        except OSError as e:
            raise DataError(f"{path} cannot be written ({e.strerror or e})") from e


def write_npy(store: FeatureStore, world: World | None = None) -> None:
    """``MODALITY.npy`` [N, D] fp32 ([N, V, D] with several views) and ``MODALITY.ids.json`` beside a finished store,
    memory-mapped by numpy (``np.load(…, mmap_mode="r")``); written by rank 0, part by part.

    Raises:
        DataError: the folder cannot be written to.
    """
    world = world or World()
    agree(lambda: _write_npy(store) if world.rank == 0 else None, world)


def _write_npy(store: FeatureStore) -> None:
    for m in store.description.modalities:
        parts = [p for p in store.parts if p.counts.get(m)]
        if not parts:
            continue
        views, width = parts[0].features(m).shape[1:]
        shape = (sum(p.counts[m] for p in parts), *((views,) if views > 1 else ()), width)
        path = store.folder / f"{m}.npy"
        try:
            with replacing(path) as hidden:
                out = np.lib.format.open_memmap(hidden, mode="w+", dtype=np.float32, shape=shape)
                start = 0
                for part in parts:
                    x = part.features(m).numpy()
                    out[start : start + len(x)] = x if views > 1 else x[:, 0]
                    start += len(x)
                out.flush()
            ids = [p.ids[i] for p in parts for i in p.rows(m).tolist()]
            write_atomically(store.folder / f"{m}.ids.json", json.dumps(ids, ensure_ascii=False))
        except OSError as e:
            raise DataError(f"{path} cannot be written ({e.strerror or e})") from e


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as e:
        raise ConfigError("--format parquet needs pyarrow: pip install 'dualenc[tools]'") from e
    return pyarrow
