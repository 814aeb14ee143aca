"""Texts that are wrong for an item, from a member of its json to further columns of the loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_tar, write_tar
from test_loader import data, parts, take

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from gradcheck import OPTIM

from dualenc.config import Component, EngineConfig, LogitScale
from dualenc.data.batch import Batch
from dualenc.data.loader import Loader
from dualenc.data.modalities import ModalityInput
from dualenc.distributed.world import World
from dualenc.encoders import DualEncoder, build_tower
from dualenc.engine import build_engine
from dualenc.losses import build_loss, objective
from dualenc.losses.objective import to_slots
from dualenc.train.step import train_step

PAIRS = [("image", "text")]
TEXT = {"tokenizer": "clip-bpe:600", "context_length": 12, "negatives": "json:negatives", "max_negatives": 2}
WRONG = {0: ["a wrong dog", "a wrong and rather long cat"], 1: ["one"], 2: ["a", "b", "c", "d"], 4: []}


@pytest.fixture(scope="module")
def inputs() -> dict[str, ModalityInput]:
    return parts(image={"input": {"size": 32}}, text={"input": TEXT})


@pytest.fixture(scope="module")
def shard(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight samples; sample 3 has no json, 4 an empty list, the others as in WRONG or none."""
    members = read_tar(quickstart / "train-000000.tar")
    keys = sorted({name.split(".")[0] for name in members})[:8]
    rows = []
    for k, key in enumerate(keys):
        rows += [(f"{key}.webp", members[f"{key}.webp"]), (f"{key}.txt", members[f"{key}.txt"])]
        if WRONG.get(k):
            rows.append((f"{key}.json", json.dumps({"negatives": WRONG[k]}).encode()))
    return write_tar(tmp_path_factory.mktemp("wrong") / "s-000.tar", rows)


@pytest.fixture(scope="module")
def batch(shard: Path, inputs: dict[str, ModalityInput]) -> Batch:
    (out,) = take(Loader(data({"shards": str(shard)}), inputs, PAIRS, seed=0, batch_size=8), 1)
    return out


def model(inputs: dict[str, Any]) -> DualEncoder:
    torch.manual_seed(0)
    encoders = {
        "image": {"name": "own/vit", "width": 16, "layers": 1, "heads": 2},
        "text": {"name": "own/transformer", "width": 16, "layers": 1, "heads": 2},
    }
    towers = {m: build_tower(m, Component(**e), inputs[m].describe(), 8) for m, e in encoders.items()}
    return DualEncoder(towers, PAIRS, LogitScale(init=7.0))


def test_wrong_texts_reach_the_batch_by_slot(batch: Batch, inputs: dict[str, Any]) -> None:
    assert not batch.bad
    there = batch.extras["negatives_there"]["text"]
    by_key = dict(zip(batch.keys, there.sum(1).tolist(), strict=True))
    assert [by_key[k] for k in sorted(by_key)] == [2, 1, 2, 0, 0, 0, 0, 0]
    text, first = batch.inputs["text"], batch.keys.index(min(batch.keys))
    assert text["negatives"]["ids"].shape == (8, 2, text["ids"].shape[1])
    want = inputs["text"].eval(["a wrong dog"])
    assert text["negatives"]["ids"][first, 0, : len(want)].tolist() == want.tolist()


def test_the_loss_sees_them_as_columns_of_the_images_rows(batch: Batch, inputs: dict[str, Any]) -> None:
    net = model(inputs)
    outputs = net(batch.inputs)
    got = objective(outputs, batch, PAIRS, build_loss(Component(name="info_nce"))).value
    a, b, wrong = (
        to_slots(outputs[group][m], batch.rows[m], 8)
        for group, m in (("features", "image"), ("features", "text"), ("negatives", "text"))
    )
    there = batch.extras["negatives_there"]["text"] > 0
    scale, own = outputs["logit_scale"]["image-text"], torch.arange(8)
    to_text = scale * a @ torch.cat([b, wrong[there]]).T
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(got, (cross_entropy(to_text, own) + cross_entropy(scale * b @ a.T, own)) / 2)
    assert int(there.sum()) == 5


@pytest.mark.parametrize("loss", ["info_nce", "hcl", "dcl"])
def test_micro_batches_change_nothing(loss: str, batch: Batch, inputs: dict[str, Any]) -> None:
    found = []
    for micro in (None, 2):
        engine = build_engine(EngineConfig(), OPTIM, model(inputs), World())
        train_step(engine, batch, PAIRS, build_loss(Component(name=loss)), micro=micro)
        found.append(engine.model_state())
    for name, p in found[0].items():
        torch.testing.assert_close(found[1][name], p, rtol=1e-5, atol=1e-6)


def test_a_batch_without_any_has_columns_that_are_not_there(inputs: dict[str, Any]) -> None:
    """So that its rank takes part in gathering them."""
    rows = inputs["text"].collate([inputs["text"].dummy()])
    assert rows["negatives"]["ids"].shape[:2] == (1, 2)
    assert rows["labels"]["negatives_there"].tolist() == [[0, 0]]


def test_without_the_setting_nothing_changes(shard: Path) -> None:
    """Neither the batch nor what a checkpoint says of the input."""
    plain = {k: v for k, v in TEXT.items() if "negatives" not in k}
    two = [parts(image={"input": {"size": 32}}, text={"input": text}) for text in (TEXT, plain)]
    (got,) = take(Loader(data({"shards": str(shard)}), two[1], PAIRS, seed=0, batch_size=8), 1)
    assert set(got.inputs["text"]) == {"ids", "mask"}
    assert got.extras == {}
    assert two[0]["text"].describe() == two[1]["text"].describe()
