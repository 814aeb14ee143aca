"""The shard writer and the keys it is given."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from dualenc.data.shards.index import load_index
from dualenc.data.shards.reader import Found, iter_samples
from dualenc.errors import ConfigError, DataError
from dualenc_data_tools.sources import Keys
from dualenc_data_tools.sources.source import fill
from dualenc_data_tools.writer import ShardWriter

SHIPPED = Path(__file__).parents[2] / "recipes" / "quickstart" / "data"


def test_the_shipped_quickstart_comes_out_byte_for_byte(tmp_path: Path) -> None:
    shipped = SHIPPED / "val-clipart-000000.tar"
    with ShardWriter(tmp_path, split="val-clipart") as writer, tarfile.open(shipped) as tar:
        sample: dict[str, bytes] = {}
        for member in tar:
            key, ending = member.name.split(".", 1)
            data = tar.extractfile(member)
            assert data is not None
            sample[ending] = data.read()
            if ending == "txt":
                writer.write(key, sample)
                sample = {}
    assert (tmp_path / shipped.name).read_bytes() == shipped.read_bytes()
    assert load_index(str(tmp_path / "index.json")).total == 62


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_samples=3) as writer:
        for i in range(8):
            writer.write(f"k{i}", {"txt": f"text {i}".encode(), "json": b"{}"})
    assert [s.samples for s in load_index(str(tmp_path / "index.json")).shards] == [3, 3, 2]
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    read = [(s["__key__"], s["txt"]) for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert read == [(f"k{i}", f"text {i}".encode()) for i in range(8)]


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.tar")), ids=lambda p: p.name)
def test_webdataset_reads_every_shard_of_ours_back(path: Path) -> None:
    """The same keys and bytes as our own reader gives, in the same order."""
    ours = [
        (key.removeprefix(f"{path.name}/"), found.values)
        for key, found in iter_samples(str(path), {"webp": ["webp"], "txt": ["txt"]})
        if isinstance(found, Found)
    ]
    theirs = [
        (s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")})
        for s in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert ours == theirs
    assert len(ours) > 50


def test_an_ending_with_an_underscore_in_front_is_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("k", {"_meta.json": b"{}", "txt": b"x"})
    (_, found), *rest = iter_samples(str(tmp_path / "train-000000.tar"), {"m": ["_meta.json"], "t": ["txt"]})
    assert isinstance(found, Found)
    assert found.values == {"m": b"{}", "t": b"x"}
    assert not rest


def test_bytes_bound_a_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_bytes=10_000) as writer:
        for i in range(6):
            writer.write(f"k{i}", {"bin": bytes(4000)})
        writer.write("large", {"bin": bytes(30_000)})
    assert [s.samples for s in load_index(str(tmp_path / "index.json")).shards] == [2, 2, 2, 1]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, max_samples=1) as writer:
        writer.write("a", {"txt": b"x"})
        writer.write("b", {"txt": b"x"})
        assert not list(tmp_path.glob("*.tar")), "shards appear only when all are whole"
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["../up", "/abs", "a.b", "", "a/../b", "line\nbreak", "k" * 120])
def test_unsafe_keys_are_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError), ShardWriter(tmp_path) as writer:
        writer.write(key, {"txt": b"x"})


@pytest.mark.parametrize("ending", ["pkl", "emb.pickle", "pyd", "JPG", "a/b", ""])
def test_bad_endings_are_refused(tmp_path: Path, ending: str) -> None:
    with pytest.raises(DataError), ShardWriter(tmp_path) as writer:
        writer.write("k", {ending: b"x"})


@pytest.mark.parametrize("pattern", ["{split}.tar", "x/{split}-{shard:06d}.tar", "{split}-{shard:06d}", "{shrad}.tar"])
def test_bad_patterns_are_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        ShardWriter(tmp_path, pattern=pattern)


def test_a_split_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split"):
        ShardWriter(tmp_path, split="../train")


@given(st.lists(st.text(max_size=200), max_size=30))
def test_keys_are_safe_distinct_and_repeatable(names: list[str]) -> None:
    first, second = Keys(), Keys()
    keys = [first.make(n) for n in names]
    assert keys == [second.make(n) for n in names]
    assert len(set(keys)) == len(keys)
    assert all(
        k and len(k) <= 90 and set(k) <= set("_-") | set(map(chr, range(48, 123))) - set(":;<=>?@[\\]^`") for k in keys
    )


def test_a_template_leaves_no_dangling_commas() -> None:
    row = {"caption": "Shirt", "colour": None, "type": "Shirts"}
    assert fill("{caption}, {colour}, {type}", row) == "Shirt, Shirts"
    assert fill("{colour}, {caption}", row) == "Shirt"
