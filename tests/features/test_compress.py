"""Compressed features and indexes: sizes, errors, recall against exact search, and the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dualenc.errors import ConfigError, DataError
from dualenc.features import FeatureStore
from dualenc.features.arrow import write_npy
from dualenc.features.compress import DimRanges, Gallery
from dualenc.features.disk_index import build_index, load_index
from dualenc.features.store import Description
from dualenc.features.writer import FeatureWriter


def clustered(n: int, dim: int = 64, seed: int = 0) -> torch.Tensor:
    """Unit features with structure: 20 directions and noise, a different spread in each dimension."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, dim, generator=torch.Generator().manual_seed(9))
    x = centres[torch.randint(0, 20, (n,), generator=g)] + 0.5 * torch.randn(n, dim, generator=g)
    return normalize(x * torch.linspace(2, 0.2, dim), dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store")
    description = Description({"weights": "abc", "embed_dim": 64}, {"image": "image"}, {"image": 1})
    writer = FeatureWriter(out, description)
    x, infos = clustered(600), []
    for k in range(2):
        rows = {"image": (range(300), x[k * 300 : (k + 1) * 300, None])}
        infos.append(writer.write(f"p{k}", [f"{k}/{i}" for i in range(300)], rows))
    writer.finish(infos, ["p0", "p1"])
    return out


def test_codes_give_back_what_they_hold() -> None:
    x = clustered(500)
    ranges = DimRanges.calibrate(x, clip=0.0)
    step = (ranges.high - ranges.low) / 254
    assert ((ranges.from_int8(ranges.int8(x)) - x).abs() <= step / 2 + 1e-6).all()
    assert (ranges.int8(2 * x.abs() + 1) == 127).all()  # clipped, not wrapped
    odd = x[:, :13]
    bits = DimRanges.calibrate(odd)
    codes = bits.binary(odd)
    assert codes.shape == (500, 2)
    assert torch.equal(bits.signs(codes) > 0, odd > bits.middle)
    assert np.array_equal(codes.numpy(), np.packbits((odd > bits.middle).numpy(), axis=1))  # as everyone packs bits
    assert abs(float(bits.signs(codes).mean())) < 0.02  # the median: as many ones as zeros
    with pytest.raises(ConfigError, match=r"dim: 65 is not between 1 and the features' width, 64"):
        Gallery.of(x, 65)
    with pytest.raises(ConfigError, match=r"unknown precision 'int4'"):
        Gallery.of(x, precision="int4")


@pytest.mark.parametrize(("precision", "size", "least"), [("float", 256, 1.0), ("int8", 64, 0.95), ("binary", 8, 0.4)])
def test_search_against_exact(precision: str, size: int, least: float) -> None:
    x, queries = clustered(1000), clustered(50, seed=1)
    exact = torch.topk(queries @ x.T, 10, dim=1).indices
    gallery = Gallery.of(x, precision=precision)
    assert gallery.bytes == 1000 * size

    def recall(rows: torch.Tensor) -> float:
        return float((rows[:, :, None] == exact[:, None]).any(-1).float().mean())

    found = recall(gallery.search(queries, 10)[1])
    assert found >= least
    if precision == "binary":  # the float query beats Hamming, int8 beside the bits beats both
        finer = Gallery.of(x, precision="int8")
        assert (
            recall(gallery.search(queries, 10, rescore=0)[1]) < found < recall(gallery.search(queries, 10, 4, finer)[1])
        )
    scores, rows = Gallery.of(x, 16, precision).search(queries, 3)
    assert scores.shape == rows.shape == (50, 3)
    assert (scores[:, :-1] >= scores[:, 1:]).all()


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
@pytest.mark.parametrize("precision", ["float", "int8", "binary"])
def test_an_index_on_disk(folder: Path, tmp_path: Path, kind: str, precision: str) -> None:
    if kind == "hnsw":
        pytest.importorskip("usearch.index", reason="pip install 'dualenc[index]'")
    build_index(folder, tmp_path / "i", "image", 32, precision, kind)
    index = load_index(tmp_path / "i")
    ids, x = FeatureStore(folder).read("image")
    queries = clustered(40, seed=2)
    want = Gallery.of(x[:, 0], 32, precision).search(queries, 5)
    scores, rows = index.search(queries, 5)
    assert index.items == ids
    assert (rows == want[1]).float().mean() >= (0.99 if kind == "exact" else 0.8)
    assert scores.shape == (40, 5)
    if kind == "exact":
        (tmp_path / "i" / "codes.safetensors").write_bytes(b"0")
        with pytest.raises(DataError, match=r"codes.safetensors cannot be read"):
            load_index(tmp_path / "i")


def test_npy(folder: Path) -> None:
    store = FeatureStore(folder)
    write_npy(store)
    ids, x = store.read("image")
    assert np.array_equal(np.load(folder / "image.npy", mmap_mode="r"), x[:, 0].numpy())
    assert json.loads((folder / "image.ids.json").read_text()) == ids
