"""Pseudo-labels are the model's own zero-shot predictions, their places are by class, and training reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _shared import ROOT

from dualenc.api.model import Model
from dualenc.config import Data, Recipe
from dualenc.data.batches.facts import ReadFacts
from dualenc.data.shards.index import build_plan, open_sources
from dualenc.data.shards.reader import Reader
from dualenc.data.shards.selection import write_scores
from dualenc.data.values import stable_id
from dualenc.errors import ConfigError, DataError
from dualenc.model import build_bundle
from dualenc_data_tools.choose.filter import Opened, run_filters
from dualenc_data_tools.choose.pseudo_labels import PseudoLabels, PseudoLabelsConfig, places
from dualenc_data_tools.choose.select import select

SHARD = ROOT / "recipes" / "quickstart" / "data" / "train-000000.tar"
NAMES, PROMPTS = ["a cat", "a dog", "a red car"], ["{}", "a drawing of {}."]
TINY = {
    "name": "tiny",
    "modalities": {
        "image": {"input": {"size": 32}, "encoder": {"name": "own/convnet", "widths": [8, 16, 32]}},
        "text": {
            "input": {"tokenizer": "clip-bpe:1024", "context_length": 16},
            "encoder": {"name": "own/transformer", "width": 32, "layers": 1, "heads": 2},
        },
    },
    "embed_dim": 16,
    "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
    "batch": {"size": 8},
    "budget": {"steps": 1},
}


def test_places_are_shares_of_a_class() -> None:
    label = np.array(["a", "b", "a", None, "a", "b", "a"], object)
    sure = np.array([0.9, 0.5, 0.7, np.nan, 0.9, 0.6, 0.2])
    np.testing.assert_array_equal(places(label, sure), [0.25, 1.0, 0.75, np.nan, 0.5, 0.5, 1.0])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pseudo")
    (folder / "u-0.tar").write_bytes(SHARD.read_bytes())
    return str(folder / "u-0.tar")


def test_predictions_are_those_of_classify(shards: str, tmp_path: Path) -> None:
    model = Model(build_bundle(Recipe.model_validate(TINY)))
    model.save(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "classes": NAMES, "templates": PROMPTS}
    got = {n: v for n, (_, v) in run_filters(shards, ["pseudo_labels"], {"pseudo_labels": settings}).items()}
    opened = Opened.of(shards)
    rows = [r for some in opened.rows(0, {"image": ["webp"]}) for r in some][:20]
    expected = model.classify([r.values["image"] for r in rows], NAMES, PROMPTS, modality="image")
    assert got["pseudo_label"][:20].tolist() == expected.best
    np.testing.assert_allclose(got["pseudo_confidence"][:20], expected.probabilities.max(1).values.numpy(), atol=1e-5)
    assert select(shards, "pseudo_confidence >= 0", "all")[1] == opened.total  # threshold 0: every sample
    label, place = got["pseudo_label"], got["pseudo_place"]
    for name in set(label.tolist()):
        assert (place[label == name] <= 0.5).sum() == (label == name).sum() // 2
    with pytest.raises(ConfigError, match="two or more different names"):
        PseudoLabels(PseudoLabelsConfig(model=str(tmp_path / "model"), classes=["a", "a"]))


def test_scores_are_members(shards: str) -> None:
    """A caption and a label out of a score; facts and the plan's digest follow the file's content."""
    opened = Opened.of(shards)

    def write(texts: list[str | None]) -> None:
        write_scores(
            Path(shards).with_name("said.scores.parquet"), opened.shards, opened.index_of, np.array(texts, object)
        )

    texts: list[str | None] = [f"caption {i % 5}" for i in range(opened.total)]
    texts[3] = None
    source = {"name": "u", "shards": shards, "members": {"image": ["webp"], "text": ["scores:said"]}}
    data = Data.model_validate({"sources": [source | {"values": {"label": "scores:said"}}]})
    digests = []
    for changed in (False, True):
        if changed:
            texts[0] = "something else"
        write(texts)
        sets = open_sources(data)
        reader = Reader(sets, None, 1)
        for i in (0, 1, 3):
            sample = reader.locate(0, 0, i)
            found = reader.find(0, 0, sample, {"text": ["scores:said"], "other": ["scores:said", "txt"]})
            assert found.values.get("text") == texts[i]
            assert found.members["other"] == ("txt" if texts[i] is None else "scores:said")
            assert reader.lacks(0, 0, sample, "scores:said") == (texts[i] is None)
        labels = ReadFacts(data, sets).values(0, "label")
        assert labels.tolist() == [-1 if t is None else stable_id(t) for t in texts]
        digests.append(build_plan(data, sets, 0).digest())
        plain = Data.model_validate({"sources": [{"name": "u", "shards": shards}]})
        assert build_plan(plain, open_sources(plain), 0).digest() != digests[-1]
    assert digests[0] != digests[1]
    with pytest.raises(DataError, match=r"There is no .*nothing\.scores\.parquet"):
        open_sources(Data.model_validate({"sources": [source | {"members": {"text": ["scores:nothing"]}}]}))
