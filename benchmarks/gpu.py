"""What one CUDA machine does, unattended, in 8 minutes: ``make bench-gpu``.

    python -m benchmarks.gpu [--minutes 8] [--out build/bench/gpu.json] [--peak-tflops T] [--device cuda] [--quick]

**Towers**: CLIP B/32 and L/14 with random weights in bf16, without and with torch.compile: the training step of
``dualenc train`` (encode, loss, backward, fused AdamW) on a batch that is on the device already, halved until it fits.
Samples a second, MFU and peak memory. FLOPs are counted by torch's counter on the forward and backward of
one batch (matrix products and attention; nothing is added for recomputation), and divided by the dense bf16 rate.

**Losses**: info_nce and sigmoid, plain, tiled and triton, N = 8,192 … 131,072, D = 512: milliseconds and memory of a
forward and backward; and, where fp64 logits fit, the largest difference of the gradients from an fp64 reference that
is written out here, relative to its largest entry.

Cells go from small to large; what does not fit, fails, or finds the time used up, is a line that says so, and the next
cell goes on. ``--device cpu --quick`` takes the same way with small shapes (Triton is left out): a test runs it. No
GPU was available when this was written, so nothing in it has run on one.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from dualenc.config import Component, load_recipe
from dualenc.data.batch import Batch, map_tensors
from dualenc.distributed.world import World
from dualenc.errors import DualencError
from dualenc.files import write_atomically
from dualenc.flop_counter import counting
from dualenc.shipped import find_recipe

DIM = 512
PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10": 125,
    "RTX A6000": 155,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Dense bf16 TFLOP/s by a part of the card's name, as NVIDIA states them; the first that fits."""
SIZES = (8192, 16384, 32768, 65536, 131072)
CHECKED = 16384
"""Largest N whose gradients are checked: four fp64 matrices of N × N are 8.6 GB there."""
IMPLS = ("plain", "tiled", "triton")
Row = dict[str, Any]


class Device:
    """Time and memory of a device."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.cuda = self.torch.type == "cuda"

    @property
    def card(self) -> str:
        """Its name."""
        return torch.cuda.get_device_name(self.torch) if self.cuda else f"CPU ({platform.machine()})"

    def seconds(self, run: Callable[[], object], times: int) -> float:
        """Median of some runs, after one that is not counted."""
        found = []
        for _ in range(times + 1):
            self._wait()
            begin = time.perf_counter()
            run()
            self._wait()
            found.append(time.perf_counter() - begin)
        return median(found[1:])

    def peak_mib(self, run: Callable[[], object]) -> float | None:
        """Most memory that was given out meanwhile, beyond what was before; None on a CPU."""
        if not self.cuda:
            run()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch)
        before = torch.cuda.memory_allocated(self.torch)
        run()
        self._wait()
        return (torch.cuda.max_memory_allocated(self.torch) - before) / 2**20

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.torch)


# --- towers --------------------------------------------------------------------------------------------------------


def tower_cell(device: Device, model: str, compiled: bool, batch: int, steps: int, peak: float | None) -> Row:
    """One training step of a model; everything is on the device."""
    import open_clip

    from dualenc.engine import build_engine
    from dualenc.losses import build_loss
    from dualenc.model import build_bundle
    from dualenc.plan.widest_rows import widest
    from dualenc.train.step import train_step

    names = [f"modalities.{m}.encoder.name=open_clip/{model}" for m in ("image", "text")]
    dim = open_clip.get_model_config(model)["embed_dim"]
    said = [f"embed_dim={dim}", f"batch.size={batch}", "batch.micro=null", f"engine.compile={str(compiled).lower()}"]
    said.append("modalities.text.length_groups=false")  # full contexts, so that operations are the same everywhere
    where = [f"engine.device={device.torch.type}", "engine.precision=bf16"]
    recipe = load_recipe(find_recipe("pretrain/clip_vit_b32"), [*names, *said, *where])
    bundle = build_bundle(recipe)
    inputs = {m: map_tensors(widest(x, batch), lambda t: t.to(device.torch)) for m, x in bundle.inputs.items()}
    rows = {m: torch.arange(batch, device=device.torch) for m in inputs}
    given = Batch(batch, inputs, rows, torch.arange(batch, device=device.torch), [""] * batch)
    bundle.model.to(device.torch).train()
    with counting() as counter:
        out = bundle.model(inputs)["features"]
        sum(x.float().sum() for x in out.values()).backward()
    flops = counter.get_total_flops()
    bundle.model.zero_grad(set_to_none=True)
    engine = build_engine(recipe.engine, recipe.optim, bundle.model, World(device=device.torch))
    loss = build_loss(recipe.loss)

    def step() -> None:
        train_step(engine, given, recipe.pairs, loss)

    step()  # compiles
    seconds = device.seconds(step, steps)
    row = {
        "samples/s": batch / seconds,
        "ms": 1e3 * seconds,
        "gflops_per_sample": flops / batch / 1e9,
        "mfu": None if peak is None else flops / seconds / (peak * 1e12),
        "mib": device.peak_mib(step),
    }
    return {"cell": f"{model} bf16{' compiled' if compiled else ''}, batch {batch}", **row}


# --- losses --------------------------------------------------------------------------------------------------------


def reference(kind: str, a: Tensor, b: Tensor, scale: float, bias: float) -> list[Tensor]:
    """Gradients at a and b in fp64, from the formulas (CLIP: arXiv 2103.00020; SigLIP: arXiv 2303.15343)."""
    a, b = (x.detach().double().requires_grad_() for x in (a, b))
    logits = scale * a @ b.T
    if kind == "info_nce":
        own = torch.arange(len(a), device=a.device)
        value = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    else:
        signs = 2 * torch.eye(len(a), dtype=a.dtype, device=a.device) - 1
        value = -logsigmoid(signs * (logits + bias)).sum() / len(a)
    return list(torch.autograd.grad(value, (a, b)))


def loss_cell(device: Device, kind: str, impl: str, size: int, dim: int, times: int, checked: int) -> Row:
    """Forward and backward of a loss."""
    from dualenc.losses import build_loss

    g = torch.Generator().manual_seed(0)
    a, b = (normalize(torch.randn(size, dim, generator=g), dim=1).to(device.torch).requires_grad_() for _ in "ab")
    scale = torch.tensor([20.0], device=device.torch, requires_grad=True)
    bias = torch.tensor([-10.0], device=device.torch, requires_grad=True) if kind == "sigmoid" else None
    ids = torch.arange(size, device=device.torch)
    loss = build_loss(Component.model_validate({"name": kind, "impl": impl}))

    def run() -> None:
        a.grad = b.grad = None
        loss(a, b, ids, scale, bias).value.backward()  # type: ignore[no-untyped-call]

    ms = 1e3 * device.seconds(run, times)
    row: Row = {"cell": f"{kind} {impl}, N = {size:,}", "ms": ms, "mib": device.peak_mib(run), "error": None}
    if size <= checked:
        found = [x.grad for x in (a, b)]
        pairs = zip(found, reference(kind, a, b, 20.0, -10.0), strict=True)
        row["error"] = max(
            float((x.double() - want).abs().max() / want.abs().max()) for x, want in pairs if x is not None
        )
    return row


# --- all of it -----------------------------------------------------------------------------------------------------


def cells(device: Device, quick: bool, peak: float | None) -> Iterator[tuple[str, Callable[[], Row]]]:
    """What is measured, in order: (name, how)."""
    impls = [i for i in IMPLS if device.cuda or i != "triton"]
    dim, times, checked = (32, 1, 512) if quick else (DIM, 5, CHECKED)
    for size in (256, 512) if quick else SIZES:
        for kind in ("info_nce", "sigmoid"):
            for impl in impls:
                job = (kind, impl, size, dim, times, checked)
                yield f"{kind} {impl}, N = {size:,}", lambda job=job: loss_cell(device, *job)  # type: ignore[misc]
        if size == SIZES[1]:
            yield from _towers(device, quick, peak)
    if quick:
        yield from _towers(device, quick, peak)


def _towers(device: Device, quick: bool, peak: float | None) -> Iterator[tuple[str, Callable[[], Row]]]:
    for model, batch in {"ViT-S-32-alt": 4}.items() if quick else {"ViT-B-32": 2048, "ViT-L-14": 256}.items():
        for compiled in (False,) if quick else (False, True):
            job = (model, compiled, batch, 2 if quick else 10, peak)
            yield f"{model}{' compiled' if compiled else ''}", lambda job=job: _fitting(device, *job)  # type: ignore[misc]


def _fitting(device: Device, model: str, compiled: bool, batch: int, steps: int, peak: float | None) -> Row:
    """:func:`tower_cell` with the largest batch, halved from ``batch`` on, that the memory holds."""
    while True:
        try:
            return tower_cell(device, model, compiled, batch, steps, peak)
        except torch.OutOfMemoryError:
            if batch <= 8:
                raise
        batch //= 2
        torch.cuda.empty_cache()


def measure(device: Device, minutes: float, quick: bool, peak: float | None) -> Iterator[Row]:
    """Rows as they come; one of a cell that failed has ``failed``."""
    begin = time.perf_counter()
    for name, run in cells(device, quick, peak):
        if time.perf_counter() - begin > 60 * minutes:
            yield {"cell": name, "failed": "the time was used up"}
            continue
        try:
            yield run()
        except Exception as e:  # noqa: BLE001 – unattended: the next cell may work, and the line says what did not
            yield {"cell": name, "failed": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:200]}
        if device.cuda:
            torch.cuda.empty_cache()


def said(row: Row) -> str:
    """A row as a line."""
    if "failed" in row:
        return f"{row['cell']:<44} {row['failed']}"
    units = {"samples/s": ",.0f", "ms": ".1f", "gflops_per_sample": ".1f", "mfu": ".1%", "mib": ",.0f", "error": ".1e"}
    return f"{row['cell']:<44} " + ", ".join(
        f"{k} {row[k]:{form}}" for k, form in units.items() if row.get(k) is not None
    )


def main(arguments: list[str]) -> int:
    """Measure, print, and write after each cell, so that a machine that goes away leaves what was done."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("build/bench/gpu.json"))
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 rate of the card; known cards need none")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small shapes: to see that it runs")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise DualencError("there is no CUDA device here; --device cpu --quick shows that the script runs")
    device = Device(given.device)
    peak = given.peak_tflops or next((p for part, p in PEAKS.items() if part in device.card), None)
    about = {"card": device.card, "torch": torch.__version__, "cuda": torch.version.cuda, "peak_tflops": peak}
    print(", ".join(f"{k} {v}" for k, v in about.items()), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for row in measure(device, given.minutes, given.quick, peak):
        rows.append(row)
        print(said(row), flush=True)
        write_atomically(given.out, json.dumps({**about, "rows": rows}, indent=1))
    wrong = [r["cell"] for r in rows if (r.get("error") or 0) > 1e-4]
    if wrong:
        print(f"gradients differ from fp64 by more than 1e-4: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except DualencError as e:
        raise SystemExit(f"error: {e}") from None
