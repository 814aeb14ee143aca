"""Graphs of every modality in onnxruntime: the features of the towers, batches of another size, int8, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.matrix import OWN, SOUND, WORDS, built
from dualenc.data.modalities.sound_file import wav_of
from dualenc.errors import ConfigError
from dualenc.model import Bundle
from dualenc.model.export.export import export
from dualenc.model.export.onnx_int8 import feed_of, run_graph, write_int8

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SERIES = {"input": {"channels": 3, "length": 100}, "encoder": {"name": "own/series_cnn", "widths": [16, 32]}}


def clip(seconds: float, seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).normal(0, 0.1, int(16_000 * seconds)).astype(np.float32)
    return wav_of(noise, 16_000) or b""


def series(times: int, source: Any) -> bytes:
    raw = source.as_raw(np.random.default_rng(times).normal(size=(3, times)))
    assert raw is not None
    return bytes(raw)


def difference(bundle: Bundle, folder: Path, m: str, items: list[Any]) -> float:
    sheet = json.loads((folder / "preprocess.json").read_text())["modalities"][m]
    got = run_graph(folder / sheet["file"], feed_of(bundle.inputs[m], items, sheet))
    return float((torch.from_numpy(got) - bundle.embedder().embed(m, items)).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["none", *(pytest.param(p, marks=pytest.mark.extra) for p in ("zeros", "repeatpad"))])
def test_clips_of_any_length(tmp_path: Path, pad: str) -> None:
    """The log-mel front-end is in the graph: short clips, long ones, one that fills the window."""
    sound = {**SOUND, "input": {"max_s": 2, "pad": pad}}
    bundle = built(24, audio=sound, text=WORDS)
    export(bundle, "onnx", tmp_path / "o")
    assert difference(bundle, tmp_path / "o", "audio", [clip(2.0), clip(0.3), clip(1.37), clip(5.0)]) <= 1e-5
    assert difference(bundle, tmp_path / "o", "audio", [clip(0.9)]) <= 1e-5


@pytest.mark.slow
def test_series_and_int8(tmp_path: Path) -> None:
    bundle = built(24, series=SERIES, image=OWN, text=WORDS)
    source: Any = bundle.inputs["series"]
    export(bundle, "onnx", tmp_path / "o")
    items = [series(t, source) for t in (100, 33, 57, 240)]
    assert difference(bundle, tmp_path / "o", "series", items) <= 1e-5
    with pytest.raises(ConfigError, match="no items of modality series to calibrate"):
        write_int8(bundle, tmp_path / "o", {"text": ["a cat"]})
    pictures = [np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8) for i in range(16)]
    image: Any = bundle.inputs["image"]
    given = {"series": items, "image": [image.as_raw(x) for x in pictures], "text": ["a cat", "two dogs"]}
    cosines = write_int8(bundle, tmp_path / "o", given)
    assert cosines.keys() == {"series", "image", "text"}
    assert all(0.95 < c <= 1.0001 for c in cosines.values()), cosines
    sheet = json.loads((tmp_path / "o" / "preprocess.json").read_text())["modalities"]
    for m, about in sheet.items():
        graph = tmp_path / "o" / about["int8"]
        assert b"QuantizeLinear" in graph.read_bytes(), m
        assert graph.stat().st_size < (tmp_path / "o" / about["file"]).stat().st_size * 1.2


def test_what_has_no_graph_says_why(tmp_path: Path) -> None:
    fused = {"encoder": {"name": "own/audio_cnn", "widths": [8, 16]}, "input": {"ship": "int16"}}
    with pytest.raises(
        ConfigError, match=r"modalities.audio: the graph takes float32 samples: set input.ship: float32"
    ):
        export(built(24, audio=fused, text=WORDS), "onnx", tmp_path / "a")
    lidar = {"encoder": {"name": "own/pillars"}}
    with pytest.raises(ConfigError, match=r"modalities.lidar: a lidar tower scatters a varying number of points"):
        export(built(24, lidar=lidar, text=WORDS), "onnx", tmp_path / "b")
    assert not (tmp_path / "b").exists()
