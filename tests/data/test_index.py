"""Patterns, indexes, and what is said when something is not there."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from conftest import numbered, write_tar

from dualenc.config import Source
from dualenc.data.shards.index import ShardIndex, build_index, expand, load_index, open_source, short_names
from dualenc.errors import DataError


def source(shards: object, **more: object) -> Source:
    return Source.model_validate({"name": "s", "shards": shards, **more})


def test_expand_patterns(tmp_path: Path) -> None:
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("a-{8..11}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar", "a-11.tar"]
    assert expand("{x,y}/{0..2..2}.tar") == ["x/0.tar", "x/2.tar", "y/0.tar", "y/2.tar"]
    assert expand(["s3://b/{0..1}.tar", "pipe:cat ${HOME}/{2..3}.tar"]) == [
        "s3://b/0.tar",
        "s3://b/1.tar",
        "pipe:cat ${HOME}/2.tar",
        "pipe:cat ${HOME}/3.tar",
    ]
    paths = numbered(tmp_path, [1, 1])
    assert expand(f"{tmp_path}/*.tar") == [str(p) for p in paths]
    assert expand("https://host/a.tar?x=[1]") == ["https://host/a.tar?x=[1]"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/nowhere/*.tar", "No file matches"),
        ([], "names no shard"),
        ("a{5..3}.tar", "is an empty range"),
        (["a.tar", "a.tar"], "listed twice"),
    ],
)
def test_expand_says_what_is_wrong(pattern: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand(pattern)  # type: ignore[arg-type]


def test_short_names_do_not_depend_on_where_shards_lie() -> None:
    assert short_names(["/x/a.tar", "/x/b.tar"]) == short_names(["s3://y/a.tar", "s3://y/b.tar"]) == ["a.tar", "b.tar"]
    assert short_names(["/x/a.tar", "/y/a.tar"]) == ["x/a.tar", "y/a.tar"]
    assert short_names(["pipe:curl -s https://h/p/a-1.tar | cat"]) == ["a-1.tar"]
    assert len(set(short_names(["pipe:one", "pipe:two"]))) == 2


def test_index_in_memory_equals_index_on_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = numbered(tmp_path, [3, 1, 5])
    with caplog.at_level(logging.INFO):
        bare = open_source(source(f"{tmp_path}/s-{{000..002}}.tar"))
    assert "3 of 3 shards are not indexed" in caplog.text
    assert not list(tmp_path.glob("*.json"))
    assert bare.counts == [3, 1, 5]
    done: list[tuple[int, int]] = []
    out = build_index([str(p) for p in paths], progress=lambda i, n: done.append((i, n)))
    assert out == tmp_path / "index.json"
    assert done == [(1, 3), (2, 3), (3, 3)]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        indexed = open_source(source(f"{tmp_path}/s-{{000..002}}.tar"))
    assert not caplog.text
    assert not indexed.memory
    assert indexed.counts == bare.counts
    assert [i.bytes for i in indexed.infos] == [p.stat().st_size for p in paths]
    assert all(Path(str(indexed.sidecar(i))).is_file() for i in range(3))


def test_building_keeps_other_shards_and_takes_digests(tmp_path: Path) -> None:
    import hashlib

    a, b = numbered(tmp_path, [2, 3])
    build_index([str(a)])
    build_index([str(b)], digests=True)
    rows = load_index(str(tmp_path / "index.json")).shards
    assert [(r.url, r.samples) for r in rows] == [(a.name, 2), (b.name, 3)]
    assert rows[0].digest is None
    assert rows[1].digest == hashlib.sha256(b.read_bytes()).hexdigest()
    assert isinstance(load_index(str(tmp_path / "index.json")), ShardIndex)


def test_a_shard_of_another_size_than_indexed_is_refused(tmp_path: Path) -> None:
    (path,) = numbered(tmp_path, [3])
    build_index([str(path)])
    write_tar(path, [(f"{i}.a", b"x" * 5000) for i in range(9)])
    with pytest.raises(DataError, match=r"61,440 bytes and its index says 10,240, so it was changed or replaced"):
        open_source(source(str(path)))
    write_tar(path, [(f"{i}.a", b"x" * 5000) for i in range(1)])
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"was cut short or replaced .* run: dualenc shards index"):
        open_source(source(str(path)))
    write_tar(path, [(f"{i}.a", b"x" * 5000) for i in range(9)])
    build_index([str(path)])
    assert open_source(source(str(path))).counts == [9]


def test_shards_of_two_folders_have_two_indexes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        build_index([str(numbered(tmp_path / name, [2])[0])])
    opened = open_source(source(f"{tmp_path}/{{x,y}}/s-000.tar"))
    assert opened.counts == [2, 2]
    assert not opened.memory
    assert opened.names == ["x/s-000.tar", "y/s-000.tar"]
    with pytest.raises(DataError, match="where to write the index"):
        build_index(opened.urls)


def test_remote_needs_an_index() -> None:
    with pytest.raises(DataError, match=r"dualenc shards index 'pipe:cat x-\{0..3\}.tar'"):
        open_source(source("pipe:cat x-{0..3}.tar"))


def test_broken_indexes(tmp_path: Path) -> None:
    (path,) = numbered(tmp_path, [3])
    file = tmp_path / "index.json"
    for text in ("{", "[]", '{"version": 1}', '{"version": 1, "shards": [{"url": "x"}]}'):
        file.write_text(text)
        with pytest.raises(DataError, match="not a shard index"):
            open_source(source(str(path)))
    file.write_text(json.dumps({"version": 9, "shards": []}))
    with pytest.raises(DataError, match="version 9"):
        open_source(source(str(path)))
    file.unlink()
    with pytest.raises(DataError, match="no shard index"):
        open_source(source(str(path), index=str(tmp_path / "other.json")))
    with pytest.raises(DataError, match="no shard"):
        open_source(source(str(tmp_path / "s-001.tar")))
