"""Features of whole shards: every sample has its row under its whole key, or a reason; nothing lost silently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _shared import DATA, PYTHONPATH
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from _feature_jobs import files, shard, texts, tiny

from dualenc.data.modalities.text import TextInput
from dualenc.errors import ConfigError, DataError
from dualenc.features import FeatureStore
from dualenc.features.of_shards import embed_shards

Photos = list[tuple[bytes, list[str]]]
FAULTS = DATA.parent / "faults"
ENV = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def dualenc(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "dualenc", *arguments]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_every_sample_has_a_row_or_a_reason(tmp_path: Path, coco: Photos) -> None:
    bundle = tiny()
    members = [(f"s{i}.{end}", raw) for i, (x, t) in enumerate(coco[:5]) for end, raw in (("jpg", x), ("txt", t[0]))]
    members = [(name, raw.encode() if isinstance(raw, str) else raw) for name, raw in members if name != "s3.jpg"]
    members = [(name, raw[:2000] if name == "s2.jpg" else raw) for name, raw in members]  # cut short
    shard(tmp_path / "a.tar", members[:7])
    shard(tmp_path / "b.tar", members[7:])
    report = embed_shards(bundle, str(tmp_path / "{a,b}.tar"), tmp_path / "out", [], batch_size=2)
    assert report["shards"] == 2
    assert report["samples"] == 5
    assert report["embedded"] == {"image": 3, "text": 5}
    assert report["lost"] == {"image": 1, "text": 0}
    assert report["absent"] == {"image": 1, "text": 0}
    store = FeatureStore(tmp_path / "out")
    a, b = store.parts
    assert a.ids == ["s0", "s1", "s2", "s3"]
    assert a.rows("image").tolist() == [0, 1]
    assert b.ids == ["s4"]
    said = json.loads((tmp_path / "out" / "a.tar.json").read_text())
    assert [(x["id"], x["modality"]) for x in said["lost"]] == [("s2", "image")]
    assert said["lost"][0]["reason"]
    assert store.description.model["weights"] == bundle.weights_hash
    got = load_file(tmp_path / "out" / "a.tar.safetensors")
    embedder = bundle.embedder()
    assert (got["image"] - embedder.embed("image", [x for x, _ in coco[:2]])).abs().max() <= 1e-6
    assert (got["text"] - embedder.embed("text", [t[0] for _, t in coco[:4]])).abs().max() <= 1e-6
    assert got["text"].dtype == torch.float32
    ids, x = store.read("text")
    assert ids == ["s0", "s1", "s2", "s3", "s4"]
    assert torch.equal(x[:4, 0], got["text"])
    with pytest.raises(ConfigError, match="Did you mean 'text'"):
        embed_shards(bundle, str(tmp_path / "a.tar"), tmp_path / "out", ["txt"])


def test_keys_stay_whole_and_repeated_ones_have_their_rows(tmp_path: Path) -> None:
    """Folders that change from sample to sample do not cut the shard; a key that comes again is a sample like any."""
    folders = [(f"{'abc'[i % 3]}/s{i}.txt", f"text {i}".encode()) for i in range(30)]
    again = [("a/s0.txt", b"text 0"), ("a/s1.txt", b"x"), ("a/s0.txt", b"text 30")]
    shard(tmp_path / "folders.tar", folders)
    shard(tmp_path / "again.tar", again)
    report = embed_shards(tiny(), str(tmp_path / "*.tar"), tmp_path / "out", ["text"], batch_size=4)
    assert report["shards"] == 2
    assert report["embedded"] == {"text": 33}
    assert report["lost"] == {"text": 0}
    twice, folded = FeatureStore(tmp_path / "out").parts
    assert folded.ids == [name.removesuffix(".txt") for name, _ in folders]
    assert twice.ids == ["a/s0", "a/s1", "a/s0"]
    assert (twice.features("text")[0] - folded.features("text")[0]).abs().max() <= 1e-6


@pytest.mark.parametrize(("name", "rows"), [("folders_in_keys", 30), ("duplicate_keys", 40)])
def test_the_planted_faults(name: str, rows: int, tmp_path: Path) -> None:
    if not FAULTS.is_dir():
        pytest.skip(f"needs {FAULTS}, beside {DATA}")
    report = embed_shards(tiny(), str(FAULTS / f"{name}.tar"), tmp_path / "out")
    ids, x = FeatureStore(tmp_path / "out").read("image")
    assert report["embedded"] == {"image": rows, "text": rows}
    assert report["lost"] == {"image": 0, "text": 0}
    assert (len(ids), len(set(ids)), x.shape) == (rows, 30, (rows, 1, 16))
    assert all("/" in key for key in ids) == (name == "folders_in_keys")


def test_nothing_to_embed_is_an_error(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", [("s0.v2.jpeg2", b"x"), ("s1.v2.jpeg2", b"x")])
    with pytest.raises(DataError, match=r"None of the 2 samples .*looked for text: txt, text, caption"):
        embed_shards(tiny(), str(tmp_path / "a.tar"), tmp_path / "out", ["text"])


class Fragile(TextInput):
    """Raises what a text names: a stand-in for bytes that nobody thought of."""

    ERRORS = (
        MemoryError(),
        RecursionError("too deep"),
        TypeError("at <x object at 0x7f00aabbcc>"),
        OverflowError("1e9"),
    )

    def decode(self, raw: Any) -> Any:
        if str(raw).startswith("decode "):
            raise self.ERRORS[int(str(raw)[7:])]
        return super().decode(raw)

    def collate(self, rows: list[Any]) -> Any:
        if any(len(r) == self.length for r in rows):
            raise ValueError("a row that cannot be collated")
        return super().collate(rows)

    length = -1


def test_whatever_an_item_s_bytes_cause_is_that_item_s() -> None:
    bundle = tiny()
    embedder = bundle.embedder()
    items = ["a dog", *(f"decode {k}" for k in range(4)), "one two three four five six seven", "a cat"]
    want = embedder.embed("text", ["a dog", "a cat"])
    plain = bundle.inputs["text"]
    fragile = Fragile(plain.config)  # type: ignore[attr-defined]
    fragile.length = len(plain.eval(plain.decode(items[5])))
    bundle.inputs["text"] = fragile
    bad: dict[int, str] = {}
    assert torch.allclose(embedder.embed("text", items, batch_size=3, bad=bad), want, atol=1e-6)
    assert bad == {
        1: "MemoryError",
        2: "RecursionError: too deep",
        3: "TypeError: at <x object at 0x…>",
        4: "OverflowError: 1e9",
        5: "ValueError: a row that cannot be collated",
    }
    with pytest.raises(DataError, match="text item 1 of 7 cannot be embedded: MemoryError"):
        embedder.embed("text", items)


def test_one_string_is_one_item(coco: Photos) -> None:
    embedder = tiny().embedder()
    assert torch.equal(embedder.embed("text", "dog"), embedder.embed("text", ["dog"]))
    assert torch.equal(embedder.embed("image", coco[0][0]), embedder.embed("image", [coco[0][0]]))


def test_a_killed_embedding_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Killed at every single write (eight of them), a half-written file left behind, and started again."""
    model = tiny().save(tmp_path / "model")
    job = Path(__file__).with_name("_feature_jobs.py")
    command = [sys.executable, str(job), str(model), texts(tmp_path), str(tmp_path)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "8"


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_write_what_one_writes(tmp_path: Path) -> None:
    """Through the command line; then again, when everything is there; then with one part damaged."""
    model, pattern = str(tiny().save(tmp_path / "model")), texts(tmp_path)
    embed = ["embed", model, pattern, "--modalities", "text", "--device", "cpu", "--out"]
    one = dualenc(*embed, str(tmp_path / "one"))
    two = dualenc("launch", "--nproc", "2", *embed, str(tmp_path / "two"), "--format", "parquet")
    assert (one["shards"], one["kept"]) == (3, 0)
    assert {**two, "out": ""} == {**one, "out": ""}
    tables = {f"t-{k}.tar.parquet" for k in range(3)}
    got = files(tmp_path / "two")
    assert {n: x for n, x in got.items() if n not in tables} == files(tmp_path / "one")
    assert tables <= got.keys()
    damaged = tmp_path / "two" / "t-1.tar.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    again = dualenc("launch", "--nproc", "2", *embed, str(tmp_path / "two"), "--format", "parquet")
    assert again["kept"] == 2
    assert files(tmp_path / "two") == got
