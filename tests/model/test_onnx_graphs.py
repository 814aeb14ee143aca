"""Graphs of every modality in onnxruntime: the features of the towers, batches of another size, int8, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.families import pictures
from benchmarks.matrix import OWN, SOUND, WORDS, built
from dualenc.cli import app
from dualenc.config import Recipe, parse
from dualenc.data.modalities.sound_file import wav_of
from dualenc.errors import ConfigError
from dualenc.model import Bundle, build_bundle
from dualenc.model.export.export import export
from dualenc.model.export.onnx_int8 import feed_of, other_clips, run_graph, write_int8

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


@pytest.mark.slow
def test_image_towers_of_boxes_and_of_wavelets(tmp_path: Path) -> None:
    """Pooling over boxes and Fourier transforms are in the graphs, and a view that is turned in training."""
    boxes = {"name": "own/convnet", "widths": [8, 16], "stem": 2, "regions": [1, 3]}
    waves = {"name": "own/scatter", "angles": 2, "widths": [8]}
    raw = {
        "name": "small",
        "modalities": {
            "image": {"input": {"size": 32, "augment": {"quarter_turns": True}}, "encoder": boxes},
            "drawing": {"kind": "image", "input": {"size": 32}, "encoder": waves},
        },
        "pairs": [["image", "drawing"]],
        "embed_dim": 12,
        "data": {"sources": [{"name": "a", "shards": "x.tar"}]},
        "batch": {"size": 4},
        "budget": {"steps": 1},
    }
    bundle = build_bundle(parse(Recipe, raw, {}, "small"))
    export(bundle, "onnx", tmp_path / "o")
    pixels = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in range(5)]
    source: Any = bundle.inputs["image"]
    for m in ("image", "drawing"):
        assert difference(bundle, tmp_path / "o", m, [source.as_raw(x) for x in pixels]) <= 1e-5


@pytest.mark.slow
@pytest.mark.extra
def test_the_command_writes_int8_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """export --int8 FOLDER: both graphs, the cosines it prints, which preprocess.json has too."""
    built(24, image=OWN, text=WORDS).save(tmp_path / "m")
    (tmp_path / "photos").mkdir()
    for i, png in enumerate(pictures() * 4):
        (tmp_path / "photos" / f"{i}.png").write_bytes(png)
        (tmp_path / "photos" / f"{i}.txt").write_text(f"{i} red bicycles")
    monkeypatch.setenv("COLUMNS", "200")
    args = ["export", str(tmp_path / "m"), "--format", "onnx", "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(app, [*args, "--int8", str(tmp_path / "photos")])
    assert done.exit_code == 0, done.output
    sheet = json.loads((tmp_path / "o" / "preprocess.json").read_text())["modalities"]
    for m, least in (("image", 0.97), ("text", 0.97)):
        assert f"{m}.int8.onnx: mean cosine {sheet[m]['int8_cosine']:.4f} with the features of {m}.onnx" in done.output
        assert least < sheet[m]["int8_cosine"] <= 1.0001
        small, whole = (tmp_path / "o" / sheet[m][k] for k in ("int8", "file"))
        assert small.stat().st_size < whole.stat().st_size
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "m"), "--format", "hf", "--int8", str(tmp_path)])
    assert refused.exit_code == 2


def test_a_clip_is_quantised_with_its_convolution_alone(tmp_path: Path) -> None:
    """A range of values before a ReLU6 would be spent on what it cuts off; clips of norms and spectra stay in float."""
    import onnx
    from onnx import TensorProto, helper

    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="conv"),
        node("Clip", ["a"], ["b"], name="relu6"),
        node("Relu", ["b"], ["c"], name="second"),
        node("ReduceL2", ["c"], ["d"], name="norm"),
        node("Clip", ["d"], ["y"], name="floor"),
    ]
    ends = [value(n, TensorProto.FLOAT, None) for n in ("x", "w", "y")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", ends[:2], ends[2:])), tmp_path / "g.onnx")
    assert other_clips(tmp_path / "g.onnx", ["Conv"]) == ["second", "floor"]


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
