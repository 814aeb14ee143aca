"""A data set in its own layout gives the features that its shards give."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _feature_jobs import tiny
from PIL import Image

from dualenc.errors import ConfigError, DataError
from dualenc.features.of_shards import embed_shards
from dualenc.features.of_source import embed_source
from dualenc.features.store import FeatureStore
from dualenc_data_tools.build import build


def pictures(folder: Path, n: int = 6) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)).save(out, "PNG")
        (folder / f"p{i}.png").write_bytes(out.getvalue())
        (folder / f"p{i}.txt").write_text(f"caption {i}", encoding="utf-8")
    return folder


def test_a_folder_and_its_shards_have_the_same_features(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    build("folder", tmp_path / "shards", {"path": str(folder)})
    bundle = tiny()
    packed = embed_shards(bundle, str(tmp_path / "shards" / "*.tar"), tmp_path / "a")
    plain = embed_source(bundle, "folder", {"path": str(folder)}, tmp_path / "b")
    assert packed["embedded"] == plain["embedded"] == {"image": 6, "text": 6}
    for m in ("image", "text"):
        (ids, ours), (others, theirs) = (FeatureStore(tmp_path / f).read(m) for f in "ab")
        assert len(ids) == len(others) == 6
        assert torch.equal(ours, theirs)


def test_what_cannot_be_read_is_lost_by_name_and_the_rest_goes_on(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    (folder / "p2.png").write_bytes(b"<html>404</html>")
    done = embed_source(tiny(), "folder", {"path": str(folder)}, tmp_path / "out")
    assert done["embedded"] == {"image": 5, "text": 6}
    assert done["lost"] == {"image": 1, "text": 0}
    assert any("p2" in p.read_text(encoding="utf-8") for p in (tmp_path / "out").glob("*.json"))
    again = embed_source(tiny(), "folder", {"path": str(folder)}, tmp_path / "out")
    assert again["kept"] == 1


def test_a_wrong_source_or_column_is_a_sentence(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps({"caption": "a dog", "file": "gone.png"}) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="folder"):
        embed_source(tiny(), "foldr", {"path": "x"}, tmp_path / "out")
    with pytest.raises(DataError, match="none of 1 items"):
        embed_source(
            tiny(),
            "jsonl",
            {"path": str(table), "members": {"image": ["file"]}},
            tmp_path / "out",
            modalities=["image"],
        )
