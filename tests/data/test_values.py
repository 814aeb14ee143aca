"""Labels by name: from real json to a loss, by slot, whatever was lost and however the batch is cut."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_tar, write_tar
from test_loader import data, parts, take
from torch import Tensor

from dualenc.config import Data
from dualenc.data.batch import ABSENT, Batch, present
from dualenc.data.loader import Loader
from dualenc.data.modalities import ModalityInput
from dualenc.data.values import ValueKind, check_needs, stable_id
from dualenc.errors import ConfigError, DataError
from dualenc.losses.grad_cache import join
from dualenc.losses.objective import extras_of

PAIRS = [("image", "text")]
VALUES = {
    "label": "json:group",
    "source": {"member": "json:source", "type": "id"},
    "tags": {"member": "json:tags", "width": 32},
    "path": {"member": "json:path", "type": "tree", "width": 4},
    "length": "json:length",
    "depth": "json:depth",
    "caption": "txt",
}


@pytest.fixture(scope="module")
def inputs() -> dict[str, ModalityInput]:
    return parts(image={"input": {"size": 16}}, text={"input": {"tokenizer": "clip-bpe:600", "context_length": 8}})


@pytest.fixture(scope="module")
def labelled(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The quickstart's first samples, each with what its metadata file says of it as json: emoji have a group and tags,
    clip art has neither. One sample's image is damaged."""
    with gzip.open(quickstart / "metadata.jsonl.gz", "rt", encoding="utf-8") as f:
        about = {row["key"]: row for row in map(json.loads, f)}
    members = read_tar(quickstart / "train-000000.tar")
    keys = list(dict.fromkeys(name.split(".")[0] for name in members))[:60]
    rows = []
    for k, key in enumerate(keys):
        doc = about[key]
        doc["length"] = len(doc["caption"])
        if "group" in doc:
            doc["path"] = [doc["source"], doc["group"]]
            doc["depth"] = len(doc["tags"]) / 2
        image = members[f"{key}.webp"] if k != 7 else b"not an image"
        rows += [
            (f"{key}.webp", image),
            (f"{key}.txt", members[f"{key}.txt"]),
            (f"{key}.json", json.dumps(doc).encode()),
        ]
    folder = tmp_path_factory.mktemp("labelled")
    return write_tar(folder / "s-000.tar", rows), {key: about[key] for key in keys}


def loader(shard: Path, inputs: dict[str, ModalityInput], values: dict[str, Any], **more: Any) -> Loader:
    d = data({"shards": str(shard), "values": values}, max_bad_share=1.0)
    return Loader(d, inputs, PAIRS, seed=0, batch_size=60, **more)


def test_real_json_becomes_values_by_slot(labelled: Any, inputs: dict[str, ModalityInput]) -> None:
    shard, about = labelled
    (batch,) = take(loader(shard, inputs, VALUES), 1)
    assert len(batch.bad) == 1
    extras = extras_of({}, batch, ("image", "text"))
    assert extras.a == extras.b == {}
    got = extras.both
    dtypes = {"length": torch.int64, "depth": torch.float64}
    assert all(got[name].dtype == dtypes.get(name, torch.int64) for name in VALUES)
    assert {name: x.shape[1:] for name, x in got.items() if x.ndim == 2} == {"tags": (32,), "path": (4,)}
    without = 0
    for slot, key in enumerate(batch.keys):
        doc = about[key.rsplit("/", 1)[1]]
        if batch.ids[slot] == ABSENT:  # lost, and its values with it
            assert not any(present(x[slot]).any() for x in got.values())
            continue
        assert got["label"][slot] == (stable_id(doc["group"]) if "group" in doc else ABSENT)
        assert got["source"][slot] == stable_id(doc["source"])
        assert got["caption"][slot] == stable_id(doc["caption"])
        assert got["length"][slot] == doc["length"]
        tags = got["tags"][slot][present(got["tags"][slot])].tolist()
        assert tags == [stable_id(t) for t in doc.get("tags", [])]
        if "group" in doc:
            assert got["depth"][slot] == doc["depth"]
            want = [stable_id(doc["source"]), stable_id(doc["source"] + "\0" + doc["group"]), ABSENT, ABSENT]
            assert got["path"][slot].tolist() == want
        else:
            without += 1
            assert math.isnan(got["depth"][slot])
    assert without > 3


def test_ranks_and_micro_batches_have_the_same_values(labelled: Any, inputs: dict[str, ModalityInput]) -> None:
    (whole,) = take(loader(labelled[0], inputs, VALUES), 1)
    for world in (2, 4):
        for rank in range(world):
            (mine,) = take(loader(labelled[0], inputs, VALUES, rank=rank, world=world), 1)
            for name, x in whole.extras.items():
                torch.testing.assert_close(mine.extras[name]["*"], x["*"][rank::world], equal_nan=True)
    chunks = whole.chunks(7)
    encoded = [_fake_outputs(c) for c in chunks]
    joined = join(encoded, chunks, whole)[1]
    moved = joined.to("cpu")
    for name, x in whole.extras.items():
        torch.testing.assert_close(moved.extras[name]["*"], x["*"], equal_nan=True)


def _fake_outputs(batch: Batch) -> dict[str, dict[str, Tensor]]:
    rows = {m: torch.zeros(max(len(r), 1), 2) for m, r in batch.rows.items()}
    return {"features": rows, "logit_scale": {}, "logit_bias": {}}


def test_nothing_else_of_the_batch_changes(labelled: Any, inputs: dict[str, ModalityInput]) -> None:
    (plain,), (with_values,) = (take(loader(labelled[0], inputs, v), 1) for v in ({}, VALUES))
    assert plain.extras == {}
    assert plain.keys == with_values.keys
    assert torch.equal(plain.ids, with_values.ids)
    assert torch.equal(plain.inputs["image"], with_values.inputs["image"])
    assert "values" not in data({"shards": "x"}).model_dump()["sources"][0]


def test_a_value_of_another_type_costs_its_sample_only(tmp_path: Path, inputs: dict[str, ModalityInput]) -> None:
    text = {"kind": "text", "input": {"tokenizer": "clip-bpe:600", "context_length": 8}}
    docs = [b'{"k": 3}', b'{"k": 4}', b'{"k": "four"}', b"{}", b'{"k": -1}', b'{"k": 1e999}']
    rows = [m for i, doc in enumerate(docs) for m in ((f"{i}.a", b"a"), (f"{i}.b", b"b"), (f"{i}.json", doc))]
    shard = write_tar(tmp_path / "s-000.tar", rows)
    source = {
        "shards": str(shard),
        "members": {"a": ["a"], "b": ["b"]},
        "values": {"k": {"member": "json:k", "type": "int"}},
    }
    made = Loader(data(source, max_bad_share=1.0), parts(a=text, b=text), [("a", "b")], seed=0, batch_size=6)
    (batch,) = take(made, 1)
    at = {int(key.rsplit("/", 1)[1]): slot for slot, key in enumerate(batch.keys)}
    assert [int(batch.extras["k"]["*"][at[i]]) for i in range(6)] == [3, 4, ABSENT, ABSENT, ABSENT, ABSENT]
    assert [int(batch.ids[at[i]]) >= 0 for i in range(6)] == [True, True, False, True, False, False]
    assert "'four' is not a number, as its type int says" in {b.key: b.reason for b in batch.bad}["2"]


def test_types_are_found_in_the_samples_and_differ_between_no_sources(
    labelled: Any, inputs: dict[str, ModalityInput], tmp_path: Path
) -> None:
    found = loader(labelled[0], inputs, VALUES)._steps.kinds
    want = {"label": "id", "source": "id", "tags": "ids", "path": "tree", "length": "int", "depth": "float"}
    assert {n: k.name for n, k in found.items()} == {**want, "caption": "id"}
    rows = [(f"{i}.{e}", v) for i in range(3) for e, v in (("webp", b""), ("txt", b"x"), ("cls", b"%d" % i))]
    other = {"shards": str(write_tar(tmp_path / "c-000.tar", rows))}
    made = data({**other, "values": {"k": "cls"}})
    assert Loader(made, inputs, PAIRS, seed=0, batch_size=2)._steps.kinds == {"k": ValueKind("int")}
    both = data({"shards": str(labelled[0]), "values": {"k": "json:group"}}, {**other, "values": {"k": "cls"}})
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.values\.k is int, but data\.sources\.0\.values\.k is id"):
        Loader(both, inputs, PAIRS, seed=0, batch_size=2)
    with pytest.raises(
        DataError, match=r"values\.k: no sample that was looked at has it; the json of its first sample has"
    ):
        loader(labelled[0], inputs, {"k": "json:grup"})
    with pytest.raises(ConfigError, match="pickled"):
        loader(labelled[0], inputs, {"k": "pkl"})


def test_what_a_loss_needs_is_named() -> None:
    some = Data.model_validate({"sources": [{"name": "s", "shards": "x", "values": {"lable": "json:class"}}]})
    with pytest.raises(ConfigError, match=r"needs the value 'label', which no source has\. Did you mean 'lable'\?"):
        check_needs(["label"], some)
    check_needs(["lable"], some)
    with pytest.raises(ConfigError, match=r"Write data\.sources\.0\.values: \{label: json:KEY\}"):
        check_needs(["label"], data({"shards": "x"}))


def test_trees_agree_down_to_where_paths_part() -> None:
    kind = ValueKind("id", 3, tree=True)
    a, b = (torch.tensor(kind.read(p)) for p in (["car", "moving", "fast"], "car/moving/slow"))
    assert (a == b).tolist() == [True, True, False]
    c = torch.tensor(kind.read(["bus", "moving", "fast"]))
    assert not (a == c).any()  # equal names below different parents are different places
    with pytest.raises(ValueError, match="more than its width 3"):
        kind.read(list("abcd"))
