"""Graphs in int8 beside those in float.

Static for images, audio and series, whose ranges are measured on items of the user; dynamic for text, whose
activations are measured at each call. The log-mel front-end of an audio graph stays in float.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualenc.data.modalities import ModalityInput
from dualenc.errors import ConfigError
from dualenc.model.bundle import Bundle

Feed = dict[str, NDArray[Any]]
_BATCH = 8


def feed_of(source: ModalityInput, items: Sequence[Any], sheet: Mapping[str, Any]) -> Feed:
    """Raw items of a modality → the inputs of its graph, as preprocess.json describes them."""
    rows: Any = source.collate([source.eval(source.decode(x)) for x in items])
    if isinstance(rows, Tensor):
        return {"pixels": (rows.float() / 255).numpy()}
    feed = {}
    for name, about in sheet["inputs"].items():
        x = rows[name]
        if x.ndim > 1:
            fill = int(sheet["preprocessing"].get("pad_id", 0)) if name == "ids" else 0
            x = torch.nn.functional.pad(x, (0, about["shape"][-1] - x.shape[-1]), value=fill)
        feed[name] = x.numpy()
    return feed


def run_graph(path: Path, feed: Feed) -> NDArray[np.float32]:
    """Features [n, D] of a graph in onnxruntime."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    out: NDArray[np.float32] = session.run(None, feed)[0]
    return out


def write_int8(bundle: Bundle, folder: Path, items: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """Write MODALITY.int8.onnx beside MODALITY.onnx for every modality of ``items`` and of the text towers.

    Args:
        items: modality → raw items to calibrate with; 50 to 500 typical ones. Text needs none, but is compared on them.

    Returns:
        Modality → the mean cosine between features in int8 and in float of the items (text without items: nothing).

    Raises:
        ConfigError: onnxruntime is not installed, or there are no items of a modality other than text.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ConfigError("--int8: the package onnxruntime is not installed; pip install 'dualenc[onnx]'.")
    path = folder / "preprocess.json"
    sheet = json.loads(path.read_text(encoding="utf-8"))
    cosines = {}
    for m, about in sheet["modalities"].items():
        given = list(items.get(m, ()))
        text = "ids" in about["inputs"]
        if not text and not given:
            raise ConfigError(f"--int8: there are no items of modality {m} to calibrate its graph with")
        float_graph, out = folder / about["file"], folder / f"{m}.int8.onnx"
        source = bundle.inputs[m]
        feeds = [feed_of(source, given[i : i + _BATCH], about) for i in range(0, len(given), _BATCH)]
        if text:
            _dynamic(float_graph, out)
        else:
            _static(float_graph, out, feeds)
        about["int8"] = out.name
        if feeds:
            pairs = [(run_graph(float_graph, f), run_graph(out, f)) for f in feeds]
            cosines[m] = float(np.mean(np.concatenate([(a * b).sum(1) for a, b in pairs])))
            about["int8_cosine"] = round(cosines[m], 6)
    path.write_text(json.dumps(sheet, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return cosines


def _dynamic(graph: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(graph, out, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"])


def _static(graph: Path, out: Path, feeds: Sequence[Feed]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[Feed] = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self.left, None)

    products = ["Conv", "Gemm"] if "wave" in feeds[0] else ["Conv", "Gemm", "MatMul"]
    with tempfile.TemporaryDirectory() as temporary, _quiet():
        ready = Path(temporary) / "ready.onnx"
        quant_pre_process(graph, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            out,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=[*products, "Clip", "Relu"],
            nodes_to_exclude=other_clips(ready, products),
        )


def other_clips(graph: Path, products: Sequence[str]) -> list[str]:
    """Names of the Clip and Relu nodes that do not follow a product.

    Those that do share its scale: a range taken before the clip would spend most of its 256 values on what is cut off
    (EfficientNet-Lite0: a cosine of 0.75 to the float features instead of 0.99). Others clamp norms and spectra.
    """
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph.node
    made = {name for node in nodes if node.op_type in products for name in node.output}
    return [node.name for node in nodes if node.op_type in ("Clip", "Relu") and node.input[0] not in made]


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantiser advises on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


__all__ = ["feed_of", "other_clips", "run_graph", "write_int8"]
