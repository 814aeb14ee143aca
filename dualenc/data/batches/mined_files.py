"""Files of clusters and of neighbours: what ``dualenc mine`` writes and batch plans read, by sample id.

A safetensors file with ``ids`` int64 [n] (:func:`dualenc.data.batches.facts.sample_id`) and either ``labels`` int64 [n]
or ``neighbors`` int32 [n, K]: row numbers of the file, nearest first, −1 where there are fewer. Labels may also come
from a JSON lines file, ``{"id": "SHARD/KEY", "label": 3}`` a line.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualenc.data.batch import ABSENT
from dualenc.data.order import Ints
from dualenc.data.values import stable_id
from dualenc.errors import DataError
from dualenc.files import replacing


def write_mined(path: str | Path, arrays: dict[str, NDArray[Any]], about: dict[str, str]) -> Path:
    """Write such a file; ``about`` says what it was made from."""
    from safetensors.numpy import save_file

    with replacing(path) as hidden:
        save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, hidden, metadata=about)
    return Path(path)


def read_labels(path: str, ids: Ints, source: str) -> Ints:
    """int64 [n]: the label of every sample of a source by its id, −1 where the file has none.

    Raises:
        DataError: no such file, not one of labels, or none of the source's samples is in it.
    """
    if path.endswith(".jsonl"):
        known, labels = _json_labels(path)
    else:
        found = _read(path, "labels", "clusters")
        known, labels = found["ids"], found["labels"]
    row = _rows(known, ids)
    _refuse_foreign(row, path, source)
    return np.where(row >= 0, labels[np.maximum(row, 0)], ABSENT)


def read_neighbors(path: str, ids: Ints, source: str) -> NDArray[np.int32]:
    """int32 [n, K]: the neighbours of every sample of a source as numbers in the source, nearest first, −1 for none.

    Raises:
        DataError: as :func:`read_labels`.
    """
    found = _read(path, "neighbors", "neighbors")
    row = _rows(found["ids"], ids)
    _refuse_foreign(row, path, source)
    number = np.full(len(found["ids"]) + 1, -1, np.int32)  # of a row of the file; the last is that of −1
    number[row[row >= 0]] = np.flatnonzero(row >= 0)
    out: NDArray[np.int32] = number[found["neighbors"][np.maximum(row, 0)]]
    out[row < 0] = -1
    return out


def _json_labels(path: str) -> tuple[Ints, Ints]:
    ids, labels = [], []
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                try:
                    row = json.loads(line)
                    ids.append(stable_id(str(row["id"])))
                    labels.append(_label(row["label"]))
                except (ValueError, KeyError, TypeError, RecursionError) as e:
                    raise DataError(
                        f'{path}, line {number}: write {{"id": "SHARD/KEY", "label": 3}} on every line ({e!r})'
                    ) from e
    except OSError as e:
        raise DataError(f"data.batches: {path} cannot be read ({e.strerror})") from e
    return np.array(ids, np.int64), np.array(labels, np.int64)


def _label(raw: Any) -> int:
    return raw if isinstance(raw, int) and 0 <= raw < 2**62 else stable_id(str(raw))


def _read(path: str, wanted: str, command: str) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    hint = f"write one with: dualenc mine {command} FEATURES --out {path}"
    if not Path(path).is_file():
        raise DataError(f"data.batches: there is no file {path}; {hint}")
    try:
        found = load_file(path)
    except (OSError, SafetensorError, ValueError) as e:
        raise DataError(f"data.batches: {path} cannot be read ({e}); {hint}") from e
    if not {"ids", wanted} <= found.keys() or len(found[wanted]) != len(found["ids"]):
        raise DataError(f"data.batches: {path} holds no {wanted}, only {', '.join(sorted(found))}; {hint}")
    return found


def _rows(known: Ints, ids: Ints) -> Ints:
    """The row of each id in ``known``, −1 for none; of an id that is there twice the first."""
    if not len(known):
        return np.full(len(ids), -1, np.int64)
    order = np.argsort(known, kind="stable")
    at = np.minimum(np.searchsorted(known[order], ids), len(known) - 1)
    return np.where(known[order[at]] == ids, order[at], -1)


def _refuse_foreign(rows: Ints, path: str, source: str) -> None:
    if not bool((rows >= 0).any()):
        raise DataError(
            f"data.batches: {path} has none of the {len(rows):,} samples of source {source!r}; make it from features "
            "of these shards (dualenc embed MODEL SHARDS)"
        )


def digest_of_array(array: NDArray[Any]) -> str:
    """64 bits of BLAKE2b of its values, in hex."""
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()
