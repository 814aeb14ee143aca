"""Does what is retrieved help to decide a label? Against every draw, identities, and real stamps and captions."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualenc_evals.catalog import load_task, parse_task
from dualenc_evals.harness import definition, evaluate
from dualenc_evals.kinds.probes import random_neighbours
from dualenc_evals.read.shards import read_rows

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import Pixels
from _shared import DATA as SHARED_DATA

needs_shared = pytest.mark.skipif(not SHARED_DATA.exists(), reason=f"the real data are not below {SHARED_DATA}")


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_random_votes_are_those_of_all_draws(k: int) -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    got = random_neighbours(labels, np.arange(3), 3, k, seed=0, draws=1500)
    draws = [Counter(labels[list(d)].tolist()) for d in itertools.combinations(range(6), k)]
    want = [np.mean([all(d[c] > d[o] for o in {0, 1, 2} - {c}) for d in draws]) for c in range(3)]
    assert got == pytest.approx(want, abs=0.05)


def test_all_items_at_random_are_the_majority() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 41)
    truth = np.arange(4).repeat(3)
    got = random_neighbours(labels, truth, 4, k=100, seed=1)
    assert got.tolist() == (truth == np.bincount(labels).argmax()).tolist()


class Reads(Pixels):
    """Gives a picture the features of the caption that it is told."""

    def __init__(self, captions: dict[bytes, str]) -> None:
        super().__init__()
        self.captions = captions

    def _picture(self, raw: bytes) -> torch.Tensor:
        return self._words(self.captions[raw])

    def describe(self) -> dict[str, Any]:
        seen = hashlib.blake2b("".join(self.captions.values()).encode()).hexdigest()
        return {"name": "reads", "weights_sha256": seen}


@needs_shared
def test_captions_retrieved_for_real_stamps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALENC_DATA", str(SHARED_DATA))
    said = load_task("tuxpaint_groups").model_dump(exclude_unset=True)
    base = {
        **said, "name": "a", "kind": "probe", "source": {**said["source"], "every": {"step": 4}},
        "probe": {"k": 5}, "metrics": ["knn_top1", "knn_random_top1", "majority_top1", "knn_gain"],
    }  # fmt: skip
    across = parse_task({**base, "train": {"every": {"step": 4, "others": True}, "modality": "text"}})
    within = parse_task({**base, "train": {"every": {"step": 4, "others": True}}})
    assert definition(across) != definition(within)
    assert across.needed() == ["image", "text"]
    assert within.needed() == ["image"]
    rows = [*read_rows(across).rows]
    pictures = [r.contents["image"][0].read() for r in rows]
    table = {r["image"]: r["caption"] for r in _captions()}
    told = [table[r.id] for r in rows]

    def run(model: Any, task: Any) -> dict[str, Any]:
        results: dict[str, Any] = evaluate(model, [task], progress=False)["tasks"]["a"]
        return results

    reads = run(Reads(dict(zip(pictures, told, strict=True))), across)
    assert reads["n"]["image"] == len(rows) == 238
    value = reads["metrics"]
    assert value["knn_gain"] == pytest.approx(value["knn_top1"] - value["knn_random_top1"], abs=2e-6)
    assert reads["ci"]["knn_gain"][0] > 0.05  # words say more of a folder than captions at random
    shuffled = [told[i] for i in np.random.default_rng(0).permutation(len(told))]
    wrong = run(Reads(dict(zip(pictures, shuffled, strict=True))), across)
    assert wrong["metrics"]["knn_gain"] < value["knn_gain"] - 0.05
    for name in ("knn_random_top1", "majority_top1"):  # the model has no part in them
        assert wrong["metrics"][name] == value[name]
    alone = parse_task({**across.model_dump(exclude_unset=True), "metrics": ["knn_gain"]})
    only = run(Reads(dict(zip(pictures, told, strict=True))), alone)
    assert only["metrics"] == {"knn_gain": value["knn_gain"]}
    assert only["chance"] == {}


def _captions() -> list[dict[str, Any]]:
    import json

    path = SHARED_DATA / "image_text" / "tuxpaint" / "captions.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
