"""One ONNX graph per tower, with everything after decoding and resizing in it: raw pixels, token ids, waveforms or
series in, unit features out."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.data.modalities.text import TextInput
from dualenc.encoders import Tower
from dualenc.encoders.adapters.hf_naflex import NaflexTower
from dualenc.encoders.audio_front import FrontEnd
from dualenc.encoders.tower import ImageTower
from dualenc.errors import ConfigError
from dualenc.model.bundle import LIBRARIES, Bundle, kind_of
from dualenc.model.export.onnx_audio import GraphFront
from dualenc.model.record import input_facts
from dualenc.versions import versions

_SINGLE_FILE = 1 << 30  # a protobuf holds 2 GiB; above this the weights lie beside the graph
OPSET = 20
"""The newest that torch's exporter writes without conversion and that onnxruntime has run for years."""


class _Pixels(nn.Module):
    """RGB in [0, 1], [n, 3, S, S] → unit features: mean and std are part of the graph."""

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        y = (pixels - self.tower.mean) / self.tower.std
        return nn.functional.normalize(self.tower.features_of(y).float(), dim=-1)


class _Ids(nn.Module):
    """Token ids and which of them are real, [n, L] → unit features."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.normalize(self.tower.encode({"ids": ids, "mask": mask}).float(), dim=-1)


class _Clips(nn.Module):
    """Waveforms of one length and where each clip ends → unit features: the log-mel front-end is part of the graph."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, wave: Tensor, length: Tensor) -> Tensor:
        return nn.functional.normalize(self.tower.encode({"wave": wave, "length": length}).float(), dim=-1)


class _Series(nn.Module):
    """Normalised series of one length and where each ends → unit features."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, values: Tensor, length: Tensor) -> Tensor:
        return nn.functional.normalize(self.tower.encode({"values": values, "length": length}).float(), dim=-1)


@dataclass
class _Graph:
    """What is exported for a modality: the module, an example of two rows, and what the sheet says of the inputs."""

    module: nn.Module
    given: dict[str, Tensor]
    says: dict[str, dict[str, Any]]


def write_onnx(bundle: Bundle, folder: Path) -> None:
    """Write MODALITY.onnx for every tower, preprocess.json, and the tokenizer in transformers' layout.

    The batch is free; text is padded to the context, audio and series to the longest that the input takes. Weights
    above 1 GiB go to MODALITY.onnx.data.

    Raises:
        ConfigError: if onnx is not installed, or for a modality whose tower has no graph, with the reason.
    """
    for name in ("onnx", "onnxscript"):
        if __import__("importlib.util").util.find_spec(name) is None:
            raise ConfigError(f"--format onnx: the package {name} is not installed; pip install 'dualenc[onnx]'.")
    for m in bundle.parts:
        why = _no_graph(bundle, m)
        if why:
            raise ConfigError(f"--format onnx: modalities.{m}: {why}; use --format safetensors.")
    folder.mkdir(parents=True, exist_ok=True)
    bundle.model.eval()
    described = {}
    for m in bundle.parts:
        described[m] = _write_tower(bundle, m, folder)
    with torch.no_grad():
        out = bundle.model({})
    sheet = {
        "format": 1,
        "name": bundle.name,
        "embed_dim": bundle.embed_dim,
        "logits": "logit_scale × (features · features) + logit_bias",
        "logit_scale": {p: float(v) for p, v in out["logit_scale"].items()},
        "logit_bias": {p: float(v) for p, v in out["logit_bias"].items()},
        "modalities": described,
        "versions": versions(LIBRARIES, "absent"),
    }
    (folder / "preprocess.json").write_text(json.dumps(sheet, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _no_graph(bundle: Bundle, m: str) -> str:
    """Why a modality cannot be exported; empty if it can."""
    tower, kind = bundle.model.tower(m), kind_of(m, bundle.parts[m])
    if isinstance(tower, NaflexTower):
        return "the grids of a NaFlex tower (resize: naflex) differ from image to image, which the graph cannot express"
    if kind in ("lidar", "camera"):
        return f"a {kind} tower scatters a varying number of points into a map, which the graph cannot express"
    if kind not in _GRAPHS or (kind == "image" and not isinstance(tower, ImageTower)):
        return f"there are graphs of {', '.join(_GRAPHS)} towers, not of {bundle.parts[m].encoder.name}"
    if kind == "audio":
        config = bundle.inputs[m].describe()["config"]
        if config["long"] == "fusion":
            return "input.long: fusion takes crops of clips of any length, which the graph cannot express"
        if config["ship"] != "float32":
            return "the graph takes float32 samples: set input.ship: float32"
    return ""


def _write_tower(bundle: Bundle, m: str, folder: Path) -> dict[str, Any]:
    tower, source = bundle.model.tower(m), bundle.inputs[m]
    assert isinstance(tower, Tower)
    batch = torch.export.Dim("batch", min=1)
    facts: dict[str, Any] = input_facts(source)["input"]
    with _GRAPHS[kind_of(m, bundle.parts[m])](tower, source) as graph:
        given = tuple(t.to(bundle.device) for t in graph.given.values())
        program = _export(graph.module.eval(), given, list(graph.given), tuple({0: batch} for _ in given))
    if isinstance(source, TextInput):
        source.export_tokenizer(folder / "tokenizer")
        facts |= {"tokenizer": "tokenizer/", "pad_id": source.pad_id, "eot_id": source.eot_id}
    for value in [i for i in program.model.graph.inputs if not i.uses()]:  # causal towers do not look at the mask
        program.model.graph.inputs.remove(value)
    program.model.metadata_props["dualenc"] = json.dumps({"modality": m, "input": facts}, ensure_ascii=False)
    size = sum(p.numel() * p.element_size() for p in tower.parameters())
    program.save(str(folder / f"{m}.onnx"), external_data=size > _SINGLE_FILE)
    kept = {str(i.name) for i in program.model.graph.inputs}
    return {
        "file": f"{m}.onnx",
        "inputs": {k: v for k, v in graph.says.items() if k in kept},
        "output": {"features": {"dtype": "float32", "shape": ["batch", bundle.embed_dim], "is": "unit length"}},
        "preprocessing": facts,
    }


# --- one a modality; examples have two rows, as a batch of one would be taken for a constant ---------------------


@contextmanager
def _image(tower: Tower, source: Any) -> Iterator[_Graph]:
    assert isinstance(tower, ImageTower)
    row = source.collate([source.dummy()] * 2)
    row = row["pixels"] if isinstance(row, Mapping) else row  # a view that says how it was turned
    says = {"pixels": {"dtype": "float32", "shape": ["batch", *row.shape[1:]], "is": "RGB, 0 to 1, resized"}}
    yield _Graph(_Pixels(tower), {"pixels": row.float() / 255}, says)


@contextmanager
def _text(tower: Tower, source: Any) -> Iterator[_Graph]:
    ids, mask = _full(source.collate([source.dummy()] * 2), source)
    shape = ["batch", source.context_length]
    says = {
        "ids": {"dtype": "int64", "shape": shape, "is": f"padded with {source.pad_id}"},
        "mask": {"dtype": "bool", "shape": shape, "is": "true at tokens"},
    }
    yield _Graph(_Ids(tower), {"ids": ids, "mask": mask}, says)


@contextmanager
def _audio(tower: Tower, source: Any) -> Iterator[_Graph]:
    fronts = [(n, x) for n, x in tower.named_modules() if isinstance(x, FrontEnd)]
    row = source.collate([source.dummy()] * 2)
    wave = nn.functional.pad(row["wave"], (0, source.samples - row["wave"].shape[1]))
    rate = source.config.rate
    says = {
        "wave": {"dtype": "float32", "shape": ["batch", source.samples], "is": f"mono, {rate} Hz, ±1, zero at the end"},
        "length": {"dtype": "int64", "shape": ["batch"], "is": "samples of each clip"},
    }
    for name, front in fronts:
        tower.set_submodule(name, GraphFront(front))
    try:
        yield _Graph(_Clips(tower), {"wave": wave, "length": row["length"]}, says)
    finally:
        for name, front in fronts:
            tower.set_submodule(name, front)


@contextmanager
def _series(tower: Tower, source: Any) -> Iterator[_Graph]:
    row = source.collate([source.dummy()] * 2)
    length, channels = source.config.length, source.config.channels
    values = nn.functional.pad(row["values"], (0, length - row["values"].shape[2]))
    says = {
        "values": {"dtype": "float32", "shape": ["batch", channels, length], "is": "normalised, zero at the end"},
        "length": {"dtype": "int64", "shape": ["batch"], "is": "times of each series"},
    }
    yield _Graph(_Series(tower), {"values": values, "length": row["length"]}, says)


_GRAPHS: dict[str, Callable[[Tower, Any], AbstractContextManager[_Graph]]] = {
    "image": _image,
    "text": _text,
    "audio": _audio,
    "series": _series,
}


def _full(row: Mapping[str, Tensor], source: TextInput) -> tuple[Tensor, Tensor]:
    missing = source.context_length - row["ids"].shape[1]
    ids = nn.functional.pad(row["ids"], (0, missing), value=source.pad_id)
    return ids, nn.functional.pad(row["mask"], (0, missing), value=False)


def _export(module: nn.Module, given: tuple[Tensor, ...], names: list[str], dynamic: tuple[Any, ...]) -> Any:
    """torch's exporter, without its log output."""
    quiet = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [q.level for q in quiet]
    try:
        for q in quiet:
            q.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Exported here first: left to itself, the exporter falls back on tracing, which would fix the batch.
            graph = torch.export.export(module, given, dynamic_shapes=dynamic)
            return torch.onnx.export(
                graph, dynamo=True, input_names=names, output_names=["features"], opset_version=OPSET, verbose=False
            )
    finally:
        for q, level in zip(quiet, levels, strict=True):
            q.setLevel(level)
