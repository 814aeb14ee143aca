"""Evaluation finds in a shard what training finds: joined members, the same endings in the same order."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "data"))
sys.path.append(str(Path(__file__).parents[1] / "train"))
from _driving_runs import RECIPES, SMALL
from _rigs import KITTI, here

from dualenc.config import load_recipe
from dualenc.data.modalities import modalities
from dualenc.data.shards.reader import SampleError, iter_samples
from dualenc.data.show import preview
from dualenc.errors import DataError
from dualenc.features.of_shards import embed_shards
from dualenc.features.store import FeatureStore
from dualenc.model import build_bundle
from dualenc_evals.catalog import load_task
from dualenc_evals.features import digest
from dualenc_evals.harness import evaluate
from dualenc_evals.read.shards import read_rows
from dualenc_evals.task import Task


def tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as out:
        for key, members in samples.items():
            for ending, raw in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(raw)
                out.addfile(info, io.BytesIO(raw))


def task(folder: Path, modalities: tuple[str, str] = ("image", "text"), **source: Any) -> Task:
    source = {"kind": "shards", "path": "./s/*.tar", **source}
    said = {"kind": "retrieval", "modalities": modalities, "metrics": ["R@1"], "source": source}
    (folder / "t.yaml").write_text(json.dumps(said))
    return load_task(str(folder / "t.yaml"))


@here
def test_keyframes_in_shards_are_evaluated_as_they_are_trained_on(tmp_path: Path) -> None:
    """A calibration with its image, a sweep with its columns: the very values that training reads, and the features of
    ``dualenc embed``."""
    from dualenc_data_tools.build import build

    build("kitti", tmp_path / "s", path=str(KITTI), limit=4, boxes=False, verify=False, progress=False)
    bundle = build_bundle(load_recipe(RECIPES / "keyframes.yaml", [*SMALL, "data.sources.0.shards=x"]))
    (shard,) = (tmp_path / "s").glob("*.tar")
    frames = task(tmp_path, ("camera", "lidar"))
    rows = read_rows(frames).rows
    members = {m: modalities[m].default_members for m in ("camera", "lidar")}
    trained = {key: found for key, found in iter_samples(str(shard), members) if not isinstance(found, SampleError)}
    assert len(rows) == len(trained) == 4
    for row, found in zip(rows, trained.values(), strict=True):
        for m in members:
            (content,) = row.contents[m]
            assert content.read() == found.values[m]
            assert {"picture"} == preview(content.read(), m).keys()
    results = evaluate(bundle.embedder(), [frames], progress=False)
    assert results["tasks"]["t"]["n"] == {"camera": 4, "lidar": 4}
    assert results["tasks"]["t"]["skipped"]["count"] == 0
    embed_shards(bundle, str(shard), tmp_path / "f")
    for m in members:
        _, stored = FeatureStore(tmp_path / "f").read(m)
        mine = bundle.embedder().embed(m, [r.contents[m][0].read() for r in rows])
        assert torch.allclose(mine, stored[:, 0], atol=1e-6)


def test_joined_parts_that_are_missing_send_the_search_on(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    samples = {
        "whole": {"json": b'{"lidar": {"columns": ["x"]}, "caption": "a"}', "lidar.npy": b"sweep", "npy": b"no"},
        "key": {"json": b'{"caption": "b"}', "lidar.npy": b"sweep"},
        "member": {"json": b'{"lidar": {}, "caption": "c"}', "npy": b"other"},
        "many": {"json": b'{"lidar": {}, "caption": "d"}', "bin": b"1", "cam_a.jpg": b"A", "cam_b.pkl": b"P"},
    }
    tar(tmp_path / "s" / "a.tar", samples)
    members = {"lidar": ["json:lidar+lidar.npy", "lidar.npy", "npy", "json:lidar+cam*"], "text": ["json:caption"]}
    rows = read_rows(task(tmp_path, ("lidar", "text"), members=members)).rows
    got = [r.contents["lidar"][0].read() for r in rows]
    assert got == [
        {"json:lidar": {"columns": ["x"]}, "lidar.npy": b"sweep"},
        b"sweep",
        b"other",
        {"json:lidar": {}, "cam_a.jpg": b"A"},
    ]
    trained = [f for _, f in iter_samples(str(tmp_path / "s" / "a.tar"), members) if not isinstance(f, SampleError)]
    assert got == [f.values["lidar"] for f in trained]
    assert len({digest(x) for x in got}) == 4
    assert digest(got[0]) == digest(dict(reversed(got[0].items())))
    assert digest({"a": b"x"}) != digest({"a": b"y"}) != digest({"b": b"y"})
    tar(tmp_path / "s" / "a.tar", {"k": {"json": b"{", "lidar.npy": b"x"}})
    one = {"lidar": members["lidar"], "text": ["lidar.npy"]}
    broken = read_rows(task(tmp_path, ("lidar", "text"), members=one)).rows
    with pytest.raises(DataError, match="json: is not valid JSON"):
        broken[0].contents["lidar"][0].read()


def test_captions_have_the_endings_of_training(tmp_path: Path) -> None:
    """One table: ``caption`` and ``text`` members are captions in either, and the first that is there counts."""
    (tmp_path / "s").mkdir()
    samples = {
        "a": {"jpg": b"i", "caption": b" one \n", "json": b'{"caption": "no"}'},
        "b": {"jpg": b"i", "text": b"two", "caption": b"no"},
        "c": {"jpg": b"i", "json": b'{"captions": ["no"], "caption": "three"}'},
        "d": {"jpg": b"i", "json": b'{"captions": ["four", "five"]}'},
    }
    tar(tmp_path / "s" / "a.tar", samples)
    rows = read_rows(task(tmp_path)).rows
    assert [[c.read() for c in r.contents["text"]] for r in rows] == [["one"], ["two"], ["three"], ["four", "five"]]
    endings = {"text": modalities["text"].default_members}
    text = modalities["text"](modalities["text"].Config())
    found = [f for _, f in iter_samples(str(tmp_path / "s" / "a.tar"), endings) if not isinstance(f, SampleError)]
    assert [text.decode(f.values["text"]) for f in found] == [["one"], ["two"], ["three"], ["four", "five"]]
