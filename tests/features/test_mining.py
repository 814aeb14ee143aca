"""Clusters and neighbours of stored features, against plain NumPy, and from the features to a plan's batches."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from _feature_jobs import RECIPE, texts, tiny

from dualenc.cli import app
from dualenc.config import Data, Recipe
from dualenc.data.batches import prepare
from dualenc.data.batches.facts import sample_id
from dualenc.errors import ConfigError
from dualenc.features import FeatureStore
from dualenc.features.mining import k_means, nearest_neighbors, read_features, read_stages
from dualenc.features.of_shards import embed_shards
from dualenc.model import build_bundle


def unit(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_neighbours_are_those_of_the_whole_matrix() -> None:
    x = torch.cat([unit(300, 8), unit(1, 8).expand(3, 8)])
    cosine = (x.double() @ x.double().T).numpy()
    np.fill_diagonal(cosine, -2)
    found = nearest_neighbors(x, 5)
    expected = np.sort(cosine, 1)[:, ::-1][:, :5]
    np.testing.assert_allclose(np.take_along_axis(cosine, found, 1), expected, atol=1e-6)
    assert not (found == np.arange(303)[:, None]).any()
    apart = nearest_neighbors(x, 5, max_cosine=0.999)  # the three copies and what they copy are no neighbours
    assert (np.take_along_axis(cosine, np.maximum(apart, 0), 1)[apart >= 0] <= 0.9991).all()
    few = nearest_neighbors(unit(3, 4), 5)
    assert few.shape == (3, 5)
    assert (few[:, 2:] == -1).all()
    assert (few[:, :2] >= 0).all()


def test_k_means_finds_what_is_apart_and_says_when_it_cannot() -> None:
    centres = torch.eye(4, 16)
    x = torch.nn.functional.normalize(centres.repeat(50, 1) + 0.05 * torch.randn(200, 16), dim=1)
    label = k_means(x, 4)
    assert all(len(set(label[c::4].tolist())) == 1 for c in range(4))
    assert len(set(label.tolist())) == 4
    assert (k_means(x, 4) == label).all()
    with pytest.raises(ConfigError, match="201 clusters of 200 samples cannot be made"):
        k_means(x, 201)


def test_features_of_several_stages_are_joined_by_sample(tmp_path: Path) -> None:
    """The second stage has one shard less; a cosine is the mean of the stages' cosines."""
    texts(tmp_path, shards=3, each=5)
    stages = [tmp_path / "stage0", tmp_path / "stage1"]
    embed_shards(tiny(), str(tmp_path / "t-{0..2}.tar"), stages[0], ["text"])
    embed_shards(
        build_bundle(Recipe.model_validate({**RECIPE, "seed": 1})), str(tmp_path / "t-{1..2}.tar"), stages[1], ["text"]
    )
    stores = [FeatureStore(s) for s in stages]
    ids, x = read_stages(stores, ["text"])
    assert sorted(ids.tolist()) == sorted(sample_id(f"t-{s}.tar", f"s{s}{i}") for s in (1, 2) for i in range(5))
    parts = [dict(zip(i.tolist(), y, strict=True)) for i, y in (read_features(s, ["text"]) for s in stores)]
    own = [torch.stack([part[i] for i in ids.tolist()]) for part in parts]
    assert not torch.allclose(own[0], own[1])
    torch.testing.assert_close(x @ x.T, sum(y @ y.T for y in own) / 2)
    out = tmp_path / "clusters.safetensors"
    done = CliRunner().invoke(app, ["mine", "clusters", *map(str, stages), "--clusters", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert load_file(out)["labels"].tolist() == k_means(x, 2).tolist()


def test_from_features_to_batches(tmp_path: Path) -> None:
    texts(tmp_path, shards=2, each=6)
    store = tmp_path / "features"
    embed_shards(tiny(), str(tmp_path / "t-{0..1}.tar"), store, ["text"])
    ids, x = read_features(FeatureStore(store), ["text"])
    assert ids.tolist() == [sample_id(f"t-{s}.tar", f"s{s}{i}") for s in range(2) for i in range(6)]
    run = CliRunner()
    for command, said in (
        (["clusters", "--clusters", "3"], "12 samples in 3 clusters"),
        (["neighbors", "-k", "4"], "12 samples, 4"),
    ):
        out = str(tmp_path / f"{command[0]}.safetensors")
        done = run.invoke(app, ["mine", command[0], str(store), *command[1:], "--out", out])
        assert done.exit_code == 0, done.output
        assert said in done.output
    near = load_file(tmp_path / "neighbors.safetensors")["neighbors"]
    assert near.tolist() == nearest_neighbors(x, 4).tolist()
    source = {"name": "a", "shards": str(tmp_path / "t-{0..1}.tar")}
    for batches in (
        {"name": "clusters", "files": str(tmp_path / "clusters.safetensors")},
        {"name": "hard_negatives", "files": str(tmp_path / "neighbors.safetensors")},
        {"name": "bags", "files": str(tmp_path / "neighbors.safetensors"), "sizes": {0: 2}},
    ):
        plan = prepare(Data.model_validate({"sources": [source], "batches": batches}), 4, 0)
        refs = plan.at(np.arange(12))
        assert sorted((refs.shard * 6 + refs.sample).tolist()) == list(range(12)), batches
    with pytest.raises(ConfigError, match="has no 'image'"):
        read_features(FeatureStore(store), ["image"])
