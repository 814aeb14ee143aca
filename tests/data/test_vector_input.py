"""Vectors: what is read, what is refused and why, noise of the length that was asked for, and a tower on them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from dualenc.config import Component, settings_as
from dualenc.data.modalities import DecodeError, modalities
from dualenc.data.modalities.vector import VectorInput
from dualenc.encoders import build_tower
from dualenc.errors import ConfigError


def vector(**settings: object) -> VectorInput:
    cls = modalities["vector"]
    return cls(settings_as(cls.Config, {"dim": 8, **settings}, "input"))  # type: ignore[return-value]


def npy(x: object) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(x), allow_pickle=False)
    return out.getvalue()


def test_a_vector_is_read_and_normalised() -> None:
    x = np.arange(8, dtype=np.float16)
    for raw in (npy(x), npy(x[None]), npy(x.astype(np.int32)), vector().as_raw(torch.tensor(x))):
        row = vector().eval(vector().decode(raw))
        assert row.dtype == np.float32
        assert np.allclose(row, x / np.linalg.norm(x.astype(np.float64)), atol=1e-6)
    assert np.array_equal(vector(normalize=False).eval(vector().decode(npy(x))), x.astype(np.float32))
    large = vector().eval(vector().decode(npy(np.full(8, 3e38, np.float32))))
    assert np.allclose(large, 8**-0.5, atol=1e-6)  # its square is beyond float32


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (npy(np.zeros(7, np.float32)), r"has the shape \[7\], expected \[8\]"),
        (npy(np.zeros((8, 1), np.float32)), "has the shape"),
        (npy(np.full(8, np.nan)), "not a number"),
        (npy(np.full(8, 1e300)), "infinite"),
        (npy(np.zeros(8)), "has no direction"),
        (npy(np.zeros(8, bool)), "holds bool"),
        (b"1,2,3", "not a .npy"),
        ("text", "must be the bytes of a .npy"),
    ],
)
def test_what_is_no_vector_is_refused(raw: object, why: str) -> None:
    with pytest.raises(DecodeError, match=why):
        vector().decode(raw)


def test_noise_has_the_length_that_was_asked_for_and_only_in_training() -> None:
    part, rng = vector(dim=512, normalize=False, noise=0.5), np.random.default_rng(0)
    x = np.zeros(512, np.float32)
    lengths = [float(np.linalg.norm(part.train(x, rng))) for _ in range(50)]
    assert np.mean(lengths) == pytest.approx(0.5, rel=0.02)
    assert not part.eval(x).any()
    kept = vector(dim=512, noise=0.5)
    assert np.linalg.norm(kept.train(np.eye(1, 512, dtype=np.float32)[0], rng)) == pytest.approx(1.0, abs=1e-6)


def test_a_tower_on_vectors_starts_as_a_linear_map_and_keeps_rows_apart() -> None:
    part = vector()
    tower = build_tower("vector", Component(name="own/mlp", layers=2, hidden=16), part.describe(), 4)
    rows = [np.random.default_rng(i).normal(size=8).astype(np.float32) for i in range(3)]
    batch = part.collate(rows)
    want = tower.head(torch.nn.functional.layer_norm(batch["values"], (8,)))
    assert torch.allclose(tower.encode(batch), want, atol=1e-6)
    assert torch.allclose(tower.encode(batch)[1:2], tower.encode(part.collate(rows[1:2])), atol=1e-6)
    assert len(tower.blocks()) == 2
    with pytest.raises(ConfigError, match="embed_dim"):
        build_tower("vector", Component(name="own/mlp", head="none"), part.describe(), 4)
