"""Features of whole shards, keys beside them, nothing lost silently."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dualenc.config import Recipe
from dualenc.errors import ConfigError
from dualenc.model import build_bundle
from dualenc.model.embed_shards import embed_shards

Photos = list[tuple[bytes, list[str]]]


def shard(path: Path, samples: list[dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for ending, raw in sample.items():
                info = tarfile.TarInfo(f"s{i}.{ending}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))


def test_every_sample_has_a_row_or_a_reason(tmp_path: Path, coco: Photos) -> None:
    raw = {
        "name": "tiny",
        "modalities": {
            "image": {"input": {"size": 64}, "encoder": {"name": "own/convnet", "widths": [8, 16, 32]}},
            "text": {
                "input": {"tokenizer": "clip-bpe:1024", "context_length": 32},
                "encoder": {"name": "own/transformer", "width": 32, "layers": 1, "heads": 2},
            },
        },
        "embed_dim": 16,
        "data": {"sources": [{"name": "x", "shards": "x.tar"}]},
        "batch": {"size": 8},
        "budget": {"steps": 1},
    }
    bundle = build_bundle(Recipe.model_validate(raw))
    samples = [{"jpg": x, "txt": t[0].encode()} for x, t in coco[:5]]
    samples[2]["jpg"] = samples[2]["jpg"][:2000]  # cut short
    del samples[3]["jpg"]
    shard(tmp_path / "a.tar", samples[:4])
    shard(tmp_path / "b.tar", samples[4:])
    report = embed_shards(bundle, str(tmp_path / "{a,b}.tar"), tmp_path / "out", [], batch_size=2)
    assert report["shards"] == 2
    assert report["samples"] == 5
    assert report["embedded"] == {"image": 3, "text": 5}
    assert report["lost"] == 0
    about = json.loads(next((tmp_path / "out").glob("a*.json")).read_text())
    assert about["keys"] == {"image": ["s0", "s1"], "text": ["s0", "s1", "s2", "s3"]}
    assert list(about["lost"]) == ["s2:image"]
    assert about["model"]["weights"] == bundle.weights_hash
    got = load_file(next((tmp_path / "out").glob("a*.safetensors")))
    embedder = bundle.embedder()
    assert (got["image"] - embedder.embed("image", [x for x, _ in coco[:2]])).abs().max() <= 1e-6
    assert (got["text"] - embedder.embed("text", [t[0] for _, t in coco[:4]])).abs().max() <= 1e-6
    assert got["text"].dtype == torch.float32
    with pytest.raises(ConfigError, match="Did you mean 'text'"):
        embed_shards(bundle, str(tmp_path / "a.tar"), tmp_path / "out", ["txt"])
