"""Features computed in bf16: fp32 on disk, named as what they are, and never taken for fp32 ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from _feature_jobs import shard, tiny
from typer.testing import CliRunner

from dualenc.cli import app
from dualenc.data.sources.item import Content
from dualenc.errors import ConfigError
from dualenc.features.of_shards import embed_shards
from dualenc.features.store import FeatureStore
from dualenc_evals.features import Store
from dualenc_evals.ranks import Ranks

TEXTS = [f"caption {i}" for i in range(6)]


def test_bf16_features_are_stored_as_fp32_and_apart_from_fp32_ones(tmp_path: Path) -> None:
    packed = shard(tmp_path / "t.tar", [(f"{i}.txt", t.encode()) for i, t in enumerate(TEXTS)])
    bundle = tiny()
    embed_shards(bundle, str(packed), tmp_path / "plain", ["text"])
    embed_shards(bundle, str(packed), tmp_path / "low", ["text"], precision="bf16")
    (_, plain), (_, low) = (FeatureStore(tmp_path / f).read("text") for f in ("plain", "low"))
    assert low.dtype == torch.float32
    off = float((plain - low).abs().max())
    assert 0 < off < 0.02
    assert torch.allclose(low.norm(dim=-1), torch.ones(6, 1), atol=1e-6)
    assert FeatureStore(tmp_path / "low").description.model["precision"] == "bf16"
    assert "precision" not in FeatureStore(tmp_path / "plain").description.model
    with pytest.raises(ConfigError, match="precision"):
        embed_shards(bundle, str(packed), tmp_path / "plain", ["text"], precision="bf16")


def test_the_cache_of_an_evaluation_keeps_them_apart(tmp_path: Path) -> None:
    bundle, found = tiny(), {}
    for precision in ("fp32", "bf16", "fp32"):
        embedder = bundle.embedder(precision=precision)
        store = Store(embedder, Ranks(), lambda modality, raw: None, 4, tmp_path)
        contents = [Content(t, text=t) for t in TEXTS]
        x = store.features("text", contents, store.inspect("text", contents).digests)
        assert torch.equal(x, found.setdefault(precision, x))
    assert len(list(tmp_path.iterdir())) == 2
    assert not torch.equal(found["fp32"], found["bf16"])


@pytest.mark.parametrize("command", ["eval", "embed", "interpolate"])
def test_the_commands_have_the_option(command: str) -> None:
    assert "--precision" in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
