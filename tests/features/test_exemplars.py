"""Exemplars to be replayed, and the noise that spans a modality gap, against plain loops and their identities."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from _feature_jobs import tiny

from dualenc.cli import app
from dualenc.data.modalities.vector import VectorConfig, VectorInput
from dualenc.errors import ConfigError, DataError
from dualenc.features import FeatureStore
from dualenc.features.exemplars import exemplars, herded
from dualenc.features.mining import gap_of, measure_gap, read_features
from dualenc.features.of_shards import embed_shards


def unit(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_herding_is_the_loop_of_the_paper() -> None:
    x = unit(40, 6) + torch.tensor([0.5, 0, 0, 0, 0, 0])
    rows, chosen = x.double().numpy(), list[int]()
    for n in range(1, 13):
        left = [i for i in range(40) if i not in chosen]
        chosen.append(min(left, key=lambda i: np.linalg.norm(rows.mean(0) - rows[[*chosen, i]].sum(0) / n)))
    assert herded(x, 12) == chosen
    assert sorted(herded(x, 99)) == list(range(40))
    off = [float(np.linalg.norm(rows.mean(0) - rows[s].mean(0))) for s in (chosen, list(range(12)))]
    assert off[0] < off[1] / 3


def test_exemplars_of_every_class() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([3, 5, 8, -1], [30, 2, 20, 9]))
    ids = rng.integers(0, 2**62, len(labels))
    x = unit(len(labels), 4)
    x[::7] = torch.nan
    for features in (None, x):
        before = np.array([], np.int64)
        for k in (1, 3, 10, 50):
            got = exemplars(labels, ids, k, 1, features)
            there = labels >= 0 if features is None else (labels >= 0) & ~x.isnan().any(1).numpy()
            expected = {c: min(k, int((labels[there] == c).sum())) for c in (3, 5, 8) if (labels[there] == c).any()}
            assert dict(zip(*(a.tolist() for a in np.unique(labels[got], return_counts=True)), strict=True)) == expected
            assert set(before.tolist()) <= set(got.tolist())
            before = got
    order = rng.permutation(len(labels))  # whatever order or shards the samples are in
    assert set(ids[exemplars(labels, ids, 4, 1)]) == set(ids[order][exemplars(labels[order], ids[order], 4, 1)])
    assert set(exemplars(labels, ids, 4, 1)) != set(exemplars(labels, ids, 4, 2))


def labelled(folder: Path) -> str:
    with tarfile.open(folder / "s-0.tar", "w") as tar:
        for i in range(12):
            image = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
            raw = io.BytesIO()
            from PIL import Image

            Image.fromarray(image).save(raw, "png")
            about = {"kind": "ab"[i % 2]} if i < 10 else {}
            for ending, data in (
                ("png", raw.getvalue()),
                ("txt", f"a {i}".encode()),
                ("json", json.dumps(about).encode()),
            ):
                info = tarfile.TarInfo(f"k{i}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(folder / "s-0.tar")


def test_commands_exemplars_and_gap(tmp_path: Path) -> None:
    shards = labelled(tmp_path)
    embed_shards(tiny(), shards, tmp_path / "features", ["image", "text"])
    for more in ([], ["--features", str(tmp_path / "features"), "--modalities", "image"]):
        done = CliRunner().invoke(
            app, ["mine", "exemplars", shards, "--label", "json:kind", "-k", "3", "--out", "m", *more]
        )
        assert done.exit_code == 0, done.output
        assert "6 samples of 2 classes, 3 to 3 of each" in done.output
        rows = pq.read_table(tmp_path / "m.selection.parquet").to_pylist()
        assert sorted(r["index"] % 2 for r in rows) == [0, 0, 0, 1, 1, 1]
        assert {r["weight"] for r in rows} == {1.0}
    x = read_features(FeatureStore(tmp_path / "features"), ["image"])[1]
    assert [r["index"] for r in rows if r["index"] % 2 == 0] == sorted(2 * i for i in herded(x[0:10:2], 3))
    done = CliRunner().invoke(app, ["mine", "gap", str(tmp_path / "features")])
    cosine = float((read_features(FeatureStore(tmp_path / "features"), ["text"])[1] * x).sum(1).mean())
    if cosine > 0:  # an untrained model's
        assert measure_gap(tmp_path / "features").cosine == pytest.approx(cosine, abs=1e-5)
        assert f"mean cosine {cosine:.3f}" in done.output
    else:
        assert done.exit_code == DataError.exit_code
    with pytest.raises(ConfigError, match="name two of image, text"):
        measure_gap(tmp_path / "features", ["image"])


@pytest.mark.parametrize(("w", "cosine"), [(0.04, 0.670), (0.08, 0.411), (0.12, 0.288)])
def test_noise_from_a_measured_cosine(w: float, cosine: float) -> None:
    """CLOSE's noise at 768 dimensions, from w to c and back; and the input that draws it."""
    a, d = unit(400, 768), 768
    exact = 1 / (1 + w * w * d) ** 0.5
    assert exact == pytest.approx(cosine, abs=1e-3)
    b = exact * a + (1 - exact**2) ** 0.5 * torch.nn.functional.normalize(
        unit(400, 768, 1) - (unit(400, 768, 1) * a).sum(1, keepdim=True) * a, dim=1
    )
    gap = gap_of(a, b)  # pairs at exactly that cosine
    assert gap.cosine == pytest.approx(exact, abs=1e-5)
    assert gap.w == pytest.approx(w, rel=1e-4)
    noisy = VectorInput(VectorConfig(dim=d, noise=gap.noise))
    plain = VectorInput(VectorConfig(dim=d))
    rng = np.random.default_rng(0)
    rows = a.numpy()
    drawn = np.stack([noisy.train(row, rng) for row in rows])
    assert float((drawn * rows).sum(1).mean()) == pytest.approx(exact, abs=6e-3)
    np.testing.assert_array_equal(noisy.eval(rows[0]), plain.train(rows[0], rng))
