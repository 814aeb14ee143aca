"""Selections and scores: what was decided or measured about every sample, in parquet files beside the shards.

``NAME.selection.parquet`` has a row for each selected sample: ``shard`` (its short name), ``index`` (its number in the
shard), ``key``, ``weight`` and ``why``. ``NAME.scores.parquet`` has a row for every sample: ``shard``, ``index``,
``key``, ``value`` (a number, a text, or null where there is none). Shards are never rewritten.

Either file says which shards it was made from (their samples, bytes and the digest of their headers) and is refused
where one has changed. In memory both are one number a sample, in the order of the shards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dualenc.data.order import Ints
from dualenc.data.selected_order import MAX_WEIGHT, Chosen
from dualenc.data.shards.remote import Bounds, fetch_bytes, is_local, is_pipe, local_path
from dualenc.errors import ConfigError, DataError
from dualenc.files import replacing

if TYPE_CHECKING:
    from pathlib import Path

    from dualenc.data.shards.index import ShardSet
    from dualenc.data.shards.tar import TarIndex

SELECTION, SCORES = ".selection.parquet", ".scores.parquet"
FORMAT = 1
_ABOUT = b"dualenc"
_ROWS = 1 << 16

Floats = NDArray[np.float64]
Values = NDArray[Any]
"""Of every sample: float64 with NaN where there is no value, or texts (object) with None."""
IndexOf = Callable[[int], "TarIndex"]
"""Number of a shard → its index, as ``Reader.index`` gives it."""


def file_of(name: str, shards: ShardSet, ending: str = SELECTION) -> str:
    """The file that a selection's (or score's) name stands for: beside the first shard, unless it is a path.

    Raises:
        ConfigError: a name for shards that are the output of a command.
    """
    if name.endswith(".parquet") or "/" in name:
        return name
    url = shards.urls[0]
    if is_pipe(url):
        raise ConfigError(f"{name!r}: shards of a pipe: command have no folder; write the path of the {ending} file")
    return (url.split("?")[0].rsplit("/", 1)[0] + "/" if "/" in url else "") + name + ending


def starts(shards: ShardSet) -> Ints:
    """Where each shard begins among all samples, and the end: [shards + 1]."""
    return np.concatenate([[0], np.cumsum(np.asarray(shards.counts, np.int64))])


# --- writing ---------------------------------------------------------------------------------------------------------


def write_selection(
    path: str | Path, shards: ShardSet, index_of: IndexOf, weight: Floats, why: str | Sequence[str], about: str = ""
) -> int:
    """Write the samples whose ``weight`` [samples] is not 0; returns how many.

    Args:
        why: the reason, for all rows or for each sample.
        about: how the selection was made; kept in the file.

    Raises:
        DataError: a weight that is negative, not finite or above a million; the file cannot be written.
    """
    if not (np.isfinite(weight) & (weight >= 0) & (weight <= MAX_WEIGHT)).all():
        bad = weight[~(np.isfinite(weight) & (weight >= 0) & (weight <= MAX_WEIGHT))][0]
        raise DataError(f"{path}: the weight {bad:g} of a sample is not between 0 and {MAX_WEIGHT:,.0f}")

    def columns(at: Ints) -> dict[str, Any]:
        return {"weight": weight[at], "why": [why if isinstance(why, str) else why[i] for i in at.tolist()]}

    _write(path, shards, index_of, np.flatnonzero(weight), columns, {"weight": "double", "why": "category"}, about)
    return int(np.count_nonzero(weight))


def write_scores(path: str | Path, shards: ShardSet, index_of: IndexOf, values: Values, about: str = "") -> None:
    """Write a value for every sample.

    Raises:
        DataError: the file cannot be written.
    """
    kind = "category" if values.dtype == object else "double"

    def columns(at: Ints) -> dict[str, Any]:
        got = values[at]
        return {"value": got.tolist() if kind == "category" else np.ma.masked_invalid(got)}  # type: ignore[no-untyped-call]

    _write(path, shards, index_of, np.arange(len(values)), columns, {"value": kind}, about)


def _write(
    path: str | Path,
    shards: ShardSet,
    index_of: IndexOf,
    rows: Ints,
    columns: Callable[[Ints], dict[str, Any]],
    kinds: dict[str, str],
    about: str,
) -> None:
    """Rows of the samples ``rows``, in their order; a shard at a time, so that few are in memory."""
    pa, pq = _pyarrow()
    text = pa.dictionary(pa.int32(), pa.string())
    types = {"double": pa.float64(), "category": text}
    head = {"format": FORMAT, "shards": described(shards), "about": about}
    schema = pa.schema(
        [("shard", text), ("index", pa.int64()), ("key", pa.string()), *((n, types[k]) for n, k in kinds.items())],
        {_ABOUT: json.dumps(head).encode()},
    )
    begin = starts(shards)
    try:
        with replacing(path) as hidden, pq.ParquetWriter(hidden, schema, compression="zstd") as out:
            for shard, name in enumerate(shards.names):
                here = rows[np.searchsorted(rows, begin[shard]) : np.searchsorted(rows, begin[shard + 1])]
                index = index_of(shard) if len(here) else None
                for at in (here[i : i + _ROWS] for i in range(0, len(here), _ROWS)):
                    local = at - begin[shard]
                    keys = [index.key(i).encode("utf-8", "backslashreplace").decode() for i in local.tolist()]  # type: ignore[union-attr]
                    data = {"shard": [name] * len(at), "index": local, "key": keys, **columns(at)}
                    arrays = [pa.array(data[f.name], _plain(pa, f.type)).cast(f.type) for f in schema]
                    out.write_table(pa.Table.from_arrays(arrays, schema=schema))
    except OSError as e:
        raise DataError(f"{path} cannot be written ({e.strerror or e})") from e


def _plain(pa: Any, of: Any) -> Any:
    return of.value_type if pa.types.is_dictionary(of) else of


def described(shards: ShardSet) -> list[list[Any]]:
    """Name, samples, bytes and digest of the headers of each shard, as a file records them."""
    headers = [i.headers or (shards.memory[k].digest if k in shards.memory else "") for k, i in enumerate(shards.infos)]
    return [[n, i.samples, i.bytes, h] for n, i, h in zip(shards.names, shards.infos, headers, strict=True)]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_chosen(name: str, shards: ShardSet, retries: int = 3, bounds: Bounds | None = None) -> Chosen:
    """The rows of a selection that are in these shards; memory: 24 bytes a row.

    Args:
        name: of the selection, or its path or URL.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: there is none, it is damaged, a shard has changed since, or it does not cover a shard.
    """
    path = file_of(name, shards)
    parts = list(_rows(path, shards, "weight", retries, bounds))
    shard = np.concatenate([p[0] for p in parts] or [np.zeros(0, np.int64)])
    sample = np.concatenate([p[1] for p in parts] or [np.zeros(0, np.int64)])
    weight = np.concatenate([p[2] for p in parts] or [np.zeros(0)]).astype(np.float64)
    if not (np.isfinite(weight) & (weight >= 0) & (weight <= MAX_WEIGHT)).all():
        raise DataError(f"{path}: column weight has values that are not between 0 and {MAX_WEIGHT:,.0f}")
    kept = weight > 0
    if not kept.all():
        shard, sample, weight = shard[kept], sample[kept], weight[kept]
    line = starts(shards)[shard] + sample
    if (np.diff(line) <= 0).any():
        order = np.argsort(line, kind="stable")
        shard, sample, weight, line = shard[order], sample[order], weight[order], line[order]
        twice = np.flatnonzero(np.diff(line) == 0)
        if len(twice):
            at = int(twice[0])
            raise DataError(f"{path}: sample {int(sample[at])} of {shards.names[int(shard[at])]} is listed twice")
    return Chosen(name, shard, sample, weight)


def read_weights(name: str, shards: ShardSet) -> Floats:
    """The weight of every sample, 0 for those that are not selected. Raises as :func:`read_chosen`."""
    chosen = read_chosen(name, shards)
    out = np.zeros(int(starts(shards)[-1]))
    out[starts(shards)[chosen.shard] + chosen.sample] = chosen.weight
    return out


def read_scores(name: str, shards: ShardSet) -> Values:
    """The value of every sample: float64 with NaN, or texts with None, where there is none.

    Raises:
        ConfigError, DataError: as :func:`read_chosen`.
    """
    begin, out = starts(shards), None
    for shard, sample, value in _rows(file_of(name, shards, SCORES), shards, "value", 3, None):
        if out is None:
            total = int(begin[-1])
            out = np.full(total, None, object) if value.dtype == object else np.full(total, np.nan)
        out[begin[shard] + sample] = value
    return np.full(int(begin[-1]), np.nan) if out is None else out


def _rows(
    path: str, shards: ShardSet, column: str, retries: int, bounds: Bounds | None
) -> Iterator[tuple[Ints, Ints, Values]]:
    """Batches of rows: number of the shard, number of the sample, and a column."""
    pa, pq = _pyarrow()
    try:
        file = pq.ParquetFile(_source(pa, path, retries, bounds), read_dictionary=["shard"])
        number = _match(path, (file.schema_arrow.metadata or {}).get(_ABOUT), shards)
        counts = np.asarray(shards.counts, np.int64)
        for batch in file.iter_batches(_ROWS, columns=["shard", "index", column]):
            names = batch.column("shard").dictionary.to_pylist()
            known = np.array([number.get(n, -1) for n in names] or [-1], np.int64)
            shard = known[batch.column("shard").indices.to_numpy(zero_copy_only=False).astype(np.int64)]
            here = shard >= 0
            sample = batch.column("index").to_numpy(zero_copy_only=False)
            if not here.all():
                shard, sample = shard[here], sample[here]
            if len(shard) and ((sample < 0) | (sample >= counts[shard])).any():
                at = int(np.flatnonzero((sample < 0) | (sample >= counts[shard]))[0])
                raise DataError(f"{path}: {shards.names[int(shard[at])]} has no sample {int(sample[at])}")
            values = batch.column(column)
            if pa.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            texts = pa.types.is_string(values.type)
            got = np.array(values.to_pylist(), object) if texts else values.to_numpy(zero_copy_only=False)
            yield shard, sample.astype(np.int64), got[here]
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as e:
        raise DataError(f"{path} is damaged or has no column shard, index or {column} ({str(e)[:160]})") from e


def _source(pa: Any, path: str, retries: int, bounds: Bounds | None) -> Any:
    if not is_local(path):
        try:
            return pa.BufferReader(fetch_bytes(path, retries, bounds=bounds))
        except FileNotFoundError as e:
            raise DataError(f"There is no {path}.") from e
    try:
        return pa.OSFile(local_path(path))
    except FileNotFoundError as e:
        how = "dualenc shards select" if path.endswith(SELECTION) else "dualenc shards filter"
        raise DataError(f"There is no {path}; make it with: {how}") from e


def _match(path: str, head: bytes | None, shards: ShardSet) -> dict[str, int]:
    """Name of a shard in the file → its number in ``shards``."""
    try:
        about = json.loads(head or b"")
        if about["format"] != FORMAT:
            raise DataError(f"{path} has format {about['format']}; this version reads {FORMAT}")
        recorded = {str(n): (int(s), int(b), str(h)) for n, s, b, h in about["shards"]}
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(
            f"{path} does not say which shards it was made from; make it with: dualenc shards select"
        ) from e
    again = "make it again from these shards"
    for name, samples, size, headers in described(shards):
        if name not in recorded:
            raise DataError(f"{path} does not cover the shard {name} of source {shards.source!r}; {again}")
        then = recorded[name]
        if then[:2] != (samples, size):
            raise DataError(
                f"{path}: {name} has changed since: it had {then[0]:,} samples in {then[1]:,} bytes and has "
                f"{samples:,} in {size:,}; {again}"
            )
        if headers and then[2] and headers != then[2]:
            raise DataError(f"{path}: {name} has changed since: its headers have another digest; {again}")
    return {n: i for i, n in enumerate(shards.names)}


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise ConfigError("selections and scores are parquet files: pip install 'dualenc[tools]'") from e
    return pyarrow, pyarrow.parquet
