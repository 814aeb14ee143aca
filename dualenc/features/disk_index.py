"""A search index on disk, built from stored features: compressed codes, and with usearch a graph over them.

    FOLDER/index.json         what it was built from: model, modality, width, precision, kind, items
    FOLDER/codes.safetensors  the codes (and the ranges of int8 and binary ones)
    FOLDER/index.usearch      kind hnsw: usearch's own file (Malkov & Yashunin 2018, arXiv 1603.09320)

``exact`` compares a query with every item. ``hnsw`` finds ``k · rescore`` candidates in the graph and orders them by
the codes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dualenc.checkpoint.ranges import write_tensors
from dualenc.encoders.dual_encoder import prefix
from dualenc.errors import ConfigError, DataError, did_you_mean
from dualenc.features.compress import DimRanges, Gallery
from dualenc.features.store import FeatureStore, read_json
from dualenc.files import write_atomically

ABOUT = "index.json"
FORMAT = 1
Kind = Literal["exact", "hnsw"]
_GRAPH, _CODES = "index.usearch", "codes.safetensors"
_METRICS = {"float": ("ip", "f32"), "int8": ("ip", "i8"), "binary": ("hamming", "b1")}


@dataclass(frozen=True)
class DiskIndex:
    """An index that :func:`build_index` wrote.

    Attributes:
        about: what index.json holds, ``items`` aside.
        items: how each is called: the sample's id.
        gallery: the codes.
        graph: usearch's index; None where the kind is exact.
    """

    about: dict[str, Any]
    items: list[str]
    gallery: Gallery
    graph: Any = None

    @property
    def modality(self) -> str:
        """Of the items."""
        return str(self.about["modality"])

    def __len__(self) -> int:
        return len(self.items)

    def search(self, queries: Tensor, k: int, rescore: int = 4) -> tuple[Tensor, Tensor]:
        """The ``k`` best items of each query [q, D], best first: scores [q, k'] and rows [q, k'].

        Raises:
            ConfigError: ``k`` below 1.
        """
        if k < 1:
            raise ConfigError(f"k: {k} must be at least 1")
        if self.graph is None:
            return self.gallery.search(queries, k, rescore)
        asked = prefix(queries.float(), self.gallery.dim)
        found = self.graph.search(_given(self.gallery, asked), min(k * max(rescore, 1), len(self)))
        rows = torch.from_numpy(found.keys.astype("int64")).reshape(len(asked), -1)
        return self.gallery.rescored(asked, rows, k)


def build_index(
    features: Path, out: Path, modality: str, dim: int | None = None, precision: str = "float", kind: str = "exact"
) -> DiskIndex:
    """Index the features that ``dualenc embed`` wrote.

    Args:
        features: the folder of a finished :class:`~dualenc.features.store.FeatureStore`.
        dim: keep the first ``dim`` dimensions.
        precision: float, int8 or binary; ranges are calibrated on the features themselves.
        kind: exact, or hnsw (usearch).

    Raises:
        ConfigError: an unknown modality, width, precision or kind; usearch is not installed.
        DataError: the features are damaged, or have several views.
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"unknown --kind {kind!r}. {did_you_mean(kind, get_args(Kind))}")
    if kind == "hnsw":
        _usearch()
    store = FeatureStore(features)
    items, x = store.read(modality)
    if x.shape[1] != 1:
        raise DataError(f"{features}: {modality} has {x.shape[1]} views of each sample; an index takes one")
    gallery = Gallery.of(x[:, 0], dim, precision)
    about = {
        "format": FORMAT,
        "modality": modality,
        "dim": gallery.dim,
        "embed_dim": x.shape[2],
        "precision": precision,
        "kind": kind,
        "model": store.description.model,
        "features": store.digest,
    }
    out.mkdir(parents=True, exist_ok=True)
    ranges = {} if gallery.ranges is None else {k: v.contiguous() for k, v in vars(gallery.ranges).items()}
    write_tensors(out / _CODES, {"codes": gallery.codes.contiguous(), **ranges}, {})
    graph = None
    if kind == "hnsw":
        graph = _graph(gallery, x[:, 0])
        graph.save(str(out / _GRAPH))
    write_atomically(out / ABOUT, json.dumps({**about, "items": items}, ensure_ascii=False) + "\n")
    return DiskIndex(about, items, gallery, graph)


def load_index(folder: Path) -> DiskIndex:
    """Read an index folder.

    Raises:
        ConfigError: usearch is not installed.
        DataError: a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    about = read_json(folder / ABOUT)
    if about.get("format") != FORMAT:
        raise DataError(f"{folder / ABOUT}: format: {about.get('format')!r} is not {FORMAT}; build the index again")
    items = [str(x) for x in about.pop("items")]
    try:
        tensors = load_file(str(folder / _CODES))
    except (OSError, SafetensorError) as e:
        raise DataError(f"{folder / _CODES} cannot be read ({e}); build the index again") from e
    ranges = DimRanges(**{k: tensors[k] for k in ("low", "high", "middle", "spread")}) if "low" in tensors else None
    gallery = Gallery(tensors["codes"], about["precision"], ranges, int(about["dim"]))
    if len(items) != len(gallery.codes):
        raise DataError(f"{folder} has {len(gallery.codes)} codes for {len(items)} items; build the index again")
    graph = None
    if about["kind"] == "hnsw":
        graph = _usearch().Index.restore(str(folder / _GRAPH))
        if graph is None:
            raise DataError(f"{folder / _GRAPH} cannot be read; build the index again")
    return DiskIndex(about, items, gallery, graph)


def _graph(gallery: Gallery, x: Tensor) -> Any:
    """usearch's index of features [n, D], at the gallery's width and precision."""
    metric, dtype = _METRICS[gallery.precision]
    binary = gallery.precision == "binary"
    width = gallery.codes.shape[1] * 8 if binary else gallery.dim
    graph = _usearch().Index(ndim=width, metric=metric, dtype=dtype)
    vectors = gallery.codes if binary else prefix(x, gallery.dim)
    graph.add(torch.arange(len(x)).numpy(), vectors.contiguous().numpy())
    return graph


def _given(gallery: Gallery, queries: Tensor) -> Any:
    if gallery.precision != "binary":
        return queries.numpy()
    assert gallery.ranges is not None
    return gallery.ranges.binary(queries).numpy()


def _usearch() -> Any:
    try:
        import usearch.index as found
    except ImportError as e:
        raise ConfigError(f"--kind hnsw needs usearch: pip install 'dualenc[index]' ({e})") from e
    return found


def usearch_recall(queries: Tensor, gallery: Tensor, k: int = 10) -> dict[str, float] | None:
    """Precision → share of the exact ``k`` nearest that usearch's index finds; None without usearch."""
    try:
        made = {p: _graph(Gallery.of(gallery, None, p), gallery) for p in _METRICS}
    except ConfigError:
        return None
    out = {}
    for precision, graph in made.items():
        codes = Gallery.of(gallery, None, precision)
        index = DiskIndex({"modality": ""}, [str(i) for i in range(len(gallery))], codes, graph)
        exact = codes.search(queries, k)[1]
        found = index.search(queries, k)[1]
        out[precision] = float((found[:, :, None] == exact[:, None]).any(-1).float().mean())
    return out
