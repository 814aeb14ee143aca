"""The tar index against webdataset and the standard library."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import read_tar, write_tar

from dualenc.data.shards.index import index_local
from dualenc.data.shards.tar import TarIndex, check_member, unsafe
from dualenc.errors import DataError

NAMES = [
    "a.jpg",
    "a.txt",
    "dir.v1/b.left.JPG",
    "dir.v1/b.txt",
    "x" * 150 + ".jpg",
    "deep/" * 30 + "c.png",
    "ünïcode.txt",
    "__meta__/x.json",
    ".hidden",
    "noending",
    "a.jpg",
]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_groups_and_places_as_webdataset(tmp_path: Path, format: int) -> None:
    wds = pytest.importorskip("webdataset")
    names = [n for n in NAMES if format != tarfile.USTAR_FORMAT or len(n) < 100]
    members = [(n, bytes([i]) * (i * 300)) for i, n in enumerate(names)]
    path = write_tar(tmp_path / "s.tar", members, format)
    index = index_local(str(path))
    raw = path.read_bytes()
    ours = []
    for i in range(len(index)):
        sample = index.sample(i)
        ours.append((sample.key, {e: raw[o : o + s] for e, (o, s) in sample.members.items()}))
        for ending, (o, s) in sample.members.items():
            assert check_member(raw[o - 512 : o + s], f"{sample.key}.{ending}", s, "s.tar") == raw[o : o + s]
    theirs = [
        (s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")})
        for s in wds.WebDataset(str(path), shardshuffle=False)
    ]
    assert ours == theirs
    assert len(ours) == len(names) - 3 - 2  # three are no members; a and dir.v1/b have two each


def test_real_shards(quickstart: Path) -> None:
    for path in sorted(quickstart.glob("*.tar")):
        index, members = index_local(str(path)), read_tar(path)
        raw = path.read_bytes()
        got = {}
        for i in range(len(index)):
            sample = index.sample(i)
            got.update({f"{sample.key}.{e}": raw[o : o + s] for e, (o, s) in sample.members.items()})
        assert got == members


def test_round_trip_without_pickle(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [(n, b"1" * 700) for n in NAMES])
    index = index_local(str(path))
    again = TarIndex.from_bytes(index.to_bytes(), "s")
    assert [again.sample(i) for i in range(len(again))] == [index.sample(i) for i in range(len(index))]
    assert again.tar_bytes == path.stat().st_size
    for broken in (b"", b"nonsense", index.to_bytes()[:-40]):
        with pytest.raises(DataError, match="damaged"):
            TarIndex.from_bytes(broken, "s.idx.npz")


def test_an_index_that_would_unpickle_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (ran,))  # type: ignore[return-value]

    np.savez(tmp_path / "x.npz", header=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match="damaged"):
        TarIndex.from_bytes((tmp_path / "x.npz").read_bytes(), "x.npz")
    assert not ran.exists()


def test_a_same_key_again_is_a_new_sample(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar", [("a.txt", b"1"), ("a.txt", b"2"), ("a.jpg", b"3"), ("b.txt", b"4"), ("a.jpg", b"5")]
    )
    index = index_local(str(path))
    assert [(index.key(i), set(index.sample(i).members)) for i in range(len(index))] == [
        ("a", {"txt"}),
        ("a", {"txt", "jpg"}),
        ("b", {"txt"}),
        ("a", {"jpg"}),
    ]


def test_folders_and_links_are_no_members(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_bytes(b"x" * 600)
    (tmp_path / "d" / "b.txt").symlink_to("/etc/passwd")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "d", "d")
    index = index_local(str(tmp_path / "s.tar"))
    assert [index.key(i) for i in range(len(index))] == ["d/a"]


def test_what_is_no_shard(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "good.tar", [("a.txt", b"x" * 2000), ("b.txt", b"y" * 2000)]).read_bytes()
    cases = {
        "page.tar": (b"<html>404 not found</html>" * 100, "is not a tar"),
        "short.tar": (good[:3200], "is cut short"),
        "half.tar": (good[: 512 + 2048 + 100], "damaged or cut short at byte 2560"),
        "flip.tar": (good[:2570] + b"?" + good[2571:], "damaged or cut short at byte 2560"),
        "empty.tar": (b"", "is an empty file"),
        "none.tar": (b"\0" * 10240, "holds no sample"),
    }
    for name, (raw, message) in cases.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=message):
            index_local(str(tmp_path / name))
    with pytest.raises(DataError, match=r"no shard .*goood.tar. Did you mean 'good.tar'"):
        index_local(str(tmp_path / "goood.tar"))


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    raw = bytearray(write_tar(tmp_path / "s.tar", [("a.txt", b"x")], tarfile.GNU_FORMAT).read_bytes())
    raw[156:157] = b"S"
    raw[148:156] = b"%06o\0 " % (sum(raw[:148]) + 256 + sum(raw[156:512]))
    (tmp_path / "s.tar").write_bytes(raw)
    with pytest.raises(DataError, match="sparse"):
        index_local(str(tmp_path / "s.tar"))


def test_a_rewritten_shard_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"x" * 100), ("b.txt", b"y" * 100)])
    index = index_local(str(path))
    offset, size = index.sample(1).members["txt"]
    write_tar(path, [("c.txt", b"x" * 100), ("d.txt", b"y" * 100)])
    block = path.read_bytes()[offset - 512 : offset + size]
    with pytest.raises(DataError, match="stale"):
        check_member(block, "b.txt", size, "s.tar")


def test_unsafe_keys() -> None:
    assert all(map(unsafe, ["../a", "/a", "x/../../a", "..\\a", "a/.."]))
    assert not any(map(unsafe, ["a", "d/a", "d/a..b", "...a"]))
