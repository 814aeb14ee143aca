"""The format: what other tools read, what each dtype costs, what is refused in a sentence."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from dualenc.errors import ConfigError, DataError
from dualenc.features import Description, FeatureStore, FeatureWriter, Lost
from dualenc.features.store import part_name

MODEL = {"name": "m", "weights": "0" * 64, "embed_dim": 8}
X = torch.nn.functional.normalize(torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)), dim=-1)


def description(**changes: Any) -> Description:
    return Description(**{"model": MODEL, "modalities": {"a": "a", "b": "b"}, "views": {"a": 1, "b": 2}, **changes})


def write(folder: Path, dtype: str = "fp32", **options: Any) -> FeatureStore:
    writer = FeatureWriter(folder, description(dtype=dtype), **options)
    rows = {"a": ([0, 1, 3], X[:, :1]), "b": ([2], X[:1])}
    info = writer.write("one", ["k0", "k1", "ключ/2", "k3"], rows, [Lost("k3", "b", "is damaged")], {"shard": "one"})
    writer.finish([info], ["one"])
    return FeatureStore(folder)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_plain_tools_read_what_was_written(dtype: str, tmp_path: Path) -> None:
    """safetensors and json alone, by what the description of the format says."""
    store = write(tmp_path, dtype)
    tensors, said = load_file(tmp_path / "one.safetensors"), json.loads((tmp_path / "one.json").read_text())
    for m, wanted in (("a", X[:, 0]), ("b", X[:1])):
        x = tensors[m].float()
        if dtype == "int8":
            x = x * tensors[f"{m}.scale"][..., None]
        largest = wanted.abs().amax(-1, keepdim=True)
        bound = {"fp32": 0.0, "fp16": 2**-11, "int8": 1 / 254 + 1e-7}[dtype]
        assert x.shape == wanted.shape
        assert bool(((x - wanted).abs() <= bound * largest).all())
        assert torch.equal(store.parts[0].features(m).reshape(x.shape), x)
    assert [said["ids"][i] for i in tensors["a.rows"].tolist()] == ["k0", "k1", "k3"]
    assert said["lost"] == [{"id": "k3", "modality": "b", "reason": "is damaged"}]
    part = store.parts[0]
    assert part.row_of("b").tolist() == [-1, -1, 0, -1]
    assert torch.equal(part.at("b", torch.tensor([0, 0]), torch.tensor([1, 0])), part.features("b")[0, [1, 0]])
    ids, x = store.read("b")
    assert (ids, x.shape) == (["ключ/2"], (1, 2, 8))
    about = json.loads((tmp_path / "features.json").read_text())
    assert about["parts"][0]["rows"] == {"a": 3, "b": 1}
    assert about["description"]["model"] == MODEL
    with pytest.raises(ConfigError, match="has no 'c'"):
        store.read("c")


def test_parquet_says_the_same(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    from dualenc.features.arrow import write_parquet

    store = write(tmp_path, "int8")
    write_parquet(store)
    got = pq.read_table(tmp_path / "one.parquet").to_pydict()
    assert got["id"] == ["k0", "k1", "ключ/2", "k3"]
    a, b = store.parts[0].features("a"), store.parts[0].features("b")
    assert got["a"][2] is None
    assert torch.equal(torch.tensor([got["a"][i] for i in (0, 1, 3)]), a[:, 0])
    for v in (0, 1):
        assert got[f"b.{v}"][:2] == [None, None]
        assert torch.equal(torch.tensor(got[f"b.{v}"][2]), b[0, v])


def test_other_features_in_the_folder_are_not_replaced_by_chance(tmp_path: Path) -> None:
    write(tmp_path)
    other = description(model={**MODEL, "weights": "1" * 64})
    with pytest.raises(ConfigError, match=r"model\.weights is \"000.* there and \"111.* now; .*--overwrite"):
        FeatureWriter(tmp_path, other)
    with pytest.raises(ConfigError, match=r"dtype is \"fp32\" there and \"int8\" now"):
        FeatureWriter(tmp_path, description(dtype="int8"))
    with pytest.raises(ConfigError, match="use fp32, fp16, int8"):
        FeatureWriter(tmp_path / "x", description(dtype="fp8"))
    writer = FeatureWriter(tmp_path, other, overwrite=True)
    info = writer.write("two", ["k"], {"a": ([0], X[:1, :1])}, data={"shard": "two"})
    writer.finish([info], ["two"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.json", "two.json", "two.safetensors"]


def test_a_part_of_other_data_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path)
    writer = FeatureWriter(tmp_path, description())
    with pytest.raises(DataError, match="is not finished"):
        FeatureStore(tmp_path)
    assert writer.finished("one", {"shard": "one"}) is not None
    assert writer.finished("one", {"shard": "one", "bytes": 5}) is None
    assert writer.finished("two", {}) is None
    file = tmp_path / "one.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        assert writer.finished("one", {"shard": "one"}) is None
    assert "is damaged: its SHA-256 is not the one in one.json" in caplog.text


def test_what_is_no_store_is_said_in_a_sentence(tmp_path: Path) -> None:
    good = tmp_path / "good"
    write(good)

    def spoiled(name: str, file: str, content: str | None) -> Path:
        folder = tmp_path / name
        shutil.copytree(good, folder)
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_text(content)
        return folder

    def parts(folder: Path) -> None:
        for part in FeatureStore(folder).parts:
            part.features("a")

    said = json.loads((good / "one.json").read_text())
    cases = [
        (tmp_path / "nothing", "holds no features"),
        (spoiled("v9", "features.json", json.dumps({"format": 9})), "format: 9 is not 2"),
        (spoiled("cut", "features.json", "{"), "cannot be read"),
        (spoiled("list", "features.json", "[1]"), "does not describe stored features"),
        (spoiled("deep", "features.json", "[" * 100_000), "cannot be read"),
        (spoiled("no_part", "one.json", None), "cannot be read"),
        (spoiled("no_ids", "one.json", json.dumps({**said, "ids": None})), "does not describe a part"),
        (spoiled("other", "one.json", json.dumps({**said, "of": "0" * 32})), "belongs to other features"),
        (spoiled("fewer", "one.json", json.dumps({**said, "ids": said["ids"][:3]})), "was changed after it was"),
        (spoiled("no_file", "one.safetensors", None), "cannot be read"),
        (spoiled("short", "one.safetensors", "x"), r"has 1 bytes, one\.json says"),
    ]
    for folder, match in cases:
        with pytest.raises(DataError, match=match) as caught:
            parts(folder)
        assert "\n" not in str(caught.value), folder
    with pytest.raises(ConfigError, match="cannot be written to"):
        FeatureWriter(good / "one.json", description())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "teacher.json").write_text("{}")
    with pytest.raises(DataError, match="a format that is no longer supported; write them again with dualenc embed"):
        FeatureStore(tmp_path / "old")


def test_names_of_parts_do_not_meet() -> None:
    words = [("a.tar",), ("a", "b"), ("a_b",), ("a/b",), ("a", "/b"), ("../a",), (".a",), ("x" * 300,), ("x" * 301,)]
    names = [part_name(*w) for w in words]
    assert names[0] == "a.tar"
    assert len(set(names)) == len(names)
    assert all("/" not in n and not n.startswith(".") and len(n) < 200 for n in names)
