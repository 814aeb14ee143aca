"""One ONNX graph per tower, with everything after the resize in it: raw pixels or token ids in, unit features out."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualenc.data.modalities.text import TextInput
from dualenc.encoders import Tower
from dualenc.encoders.adapters.hf_naflex import NaflexTower
from dualenc.encoders.tower import ImageTower
from dualenc.errors import ConfigError
from dualenc.model.bundle import LIBRARIES, Bundle
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
        return nn.functional.normalize(self.tower.head(self.tower.trunk(y)).float(), dim=-1)


class _Ids(nn.Module):
    """Token ids and which of them are real, [n, L] → unit features."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.normalize(self.tower.encode({"ids": ids, "mask": mask}).float(), dim=-1)


def write_onnx(bundle: Bundle, folder: Path) -> None:
    """Write MODALITY.onnx for every tower, preprocess.json, and the tokenizer in transformers' layout.

    The batch is free, text is padded to the context. Weights above 1 GiB go to MODALITY.onnx.data.

    Raises:
        ConfigError: if onnx is not installed, or for a modality that is neither image nor text or a grid of patches.
    """
    for name in ("onnx", "onnxscript"):
        if __import__("importlib.util").util.find_spec(name) is None:
            raise ConfigError(f"--format onnx: the package {name} is not installed; pip install 'dualenc[onnx]'.")
    for m in bundle.parts:
        if not isinstance(bundle.model.tower(m), ImageTower) and not isinstance(bundle.inputs[m], TextInput):
            raise ConfigError(
                f"--format onnx: modalities.{m}: only image and text towers have ONNX graphs; use --format safetensors."
            )
        if isinstance(bundle.model.tower(m), NaflexTower):
            raise ConfigError(
                f"--format onnx: modalities.{m}: NaFlex towers (resize: naflex) cannot be exported to ONNX; "
                "use --format hf or safetensors."
            )
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


def _write_tower(bundle: Bundle, m: str, folder: Path) -> dict[str, Any]:
    tower, source = bundle.model.tower(m), bundle.inputs[m]
    assert isinstance(tower, Tower)
    batch = torch.export.Dim("batch", min=1)
    # Two rows, as a batch of one would be taken for a constant.
    row: Any = source.collate([source.dummy()] * 2)
    facts: dict[str, Any] = input_facts(source)["input"]
    if isinstance(tower, ImageTower):
        module: nn.Module = _Pixels(tower)
        given: tuple[Tensor, ...] = (row.float().to(bundle.device) / 255,)
        names = ["pixels"]
        says = {"pixels": {"dtype": "float32", "shape": ["batch", *row.shape[1:]], "is": "RGB, 0 to 1, resized"}}
    else:
        assert isinstance(source, TextInput)
        module = _Ids(tower)
        given = tuple(t.to(bundle.device) for t in _full(row, source))
        names = ["ids", "mask"]
        says = {
            "ids": {"dtype": "int64", "shape": ["batch", source.context_length], "is": f"padded with {source.pad_id}"},
            "mask": {"dtype": "bool", "shape": ["batch", source.context_length], "is": "true at tokens"},
        }
        source.export_tokenizer(folder / "tokenizer")
        facts |= {"tokenizer": "tokenizer/", "pad_id": source.pad_id, "eot_id": source.eot_id}
    program = _export(module.eval(), given, names, tuple({0: batch} for _ in given))
    for value in [i for i in program.model.graph.inputs if not i.uses()]:  # causal towers do not look at the mask
        program.model.graph.inputs.remove(value)
    program.model.metadata_props["dualenc"] = json.dumps({"modality": m, "input": facts}, ensure_ascii=False)
    size = sum(p.numel() * p.element_size() for p in tower.parameters())
    program.save(str(folder / f"{m}.onnx"), external_data=size > _SINGLE_FILE)
    kept = {str(i.name) for i in program.model.graph.inputs}
    return {
        "file": f"{m}.onnx",
        "inputs": {k: v for k, v in says.items() if k in kept},
        "output": {"features": {"dtype": "float32", "shape": ["batch", bundle.embed_dim], "is": "unit length"}},
        "preprocessing": facts,
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
