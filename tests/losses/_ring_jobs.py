"""What the spawned ranks of the ring's tests run."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _tiny import naive_info_nce, naive_sigmoid

from dualenc.config import Component
from dualenc.distributed.ring import circulate
from dualenc.distributed.world import World
from dualenc.losses import build_loss
from dualenc.losses.blockwise import tiled
from dualenc.losses.blockwise.sweeps import How
from dualenc.losses.info_nce import info_nce
from dualenc.losses.sigmoid import sigmoid_loss

SETTINGS: dict[str, dict[str, str]] = {
    "plain": {"impl": "plain"},
    "gathered": {"impl": "tiled"},
    "ring": {"impl": "auto", "columns": "ring"},
}
PATTERNS = {
    "plain ids": lambda n: torch.arange(n),
    "positives on several ranks": lambda n: torch.arange(n) * 7 % max(n // 2, 1),
    "absent slots": lambda n: torch.where(torch.arange(n) % 3 == 1, -1, torch.arange(n) // 2),
    "a rank without any": lambda n: torch.where(torch.arange(n) < n // 2, -1, torch.arange(n)),
    "all one": lambda n: torch.zeros(n, dtype=torch.long),
    "none": lambda n: torch.full((n,), -1),
}


def features(n: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(n)
    return [torch.nn.functional.normalize(torch.randn(n, dim, generator=g, dtype=dtype), dim=-1) for _ in "ab"]


def sum_over_ranks(x: Tensor) -> None:
    if dist.is_initialized():  # not in a world of one
        dist.all_reduce(x)


def outcome(settings: dict[str, Any], world: World, size: int, ids: Tensor, dtype: torch.dtype, upstream: float) -> Any:
    """Value, metrics and gradients of this rank (scale, bias: the mean). Slots of absent ids hold NaN."""
    r, dim = world.rank, 6
    mine = slice(r * size, (r + 1) * size)
    a, b = (
        x[mine].masked_fill(ids[mine, None] < 0, float("nan")) for x in features(size * world.world_size, dim, dtype)
    )
    inputs = [a, b, torch.tensor([9.0], dtype=dtype), torch.tensor([-3.0], dtype=dtype)]
    for x in inputs:
        x.requires_grad_()
    out = build_loss(Component(**settings))(a, b, ids[mine], *inputs[2:])
    (out.value * upstream).backward()
    grads = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in zip("abst", inputs, strict=True)}
    # A rank's gradient of the scale is of the logits it computed, in whichever direction; engines take the mean.
    scalars = torch.cat([grads.pop("s"), grads.pop("t")])
    sum_over_ranks(scalars)
    return {"value": out.value.detach(), **out.metrics, **grads, "scale and bias": scalars / world.world_size}


def compare(world: World) -> dict[str, float]:
    """Largest difference from the plain gathered loss, by case; equal and unequal upstream gradients."""
    found = {}
    for name, pattern in PATTERNS.items():
        for loss in ({"name": "info_nce"}, {"name": "info_nce", "label_smoothing": 0.2}, {"name": "sigmoid"}):
            for size, dtype, slope in ((1, torch.float64, 0.0), (7, torch.float64, 1.0), (16, torch.float32, 1.0)):
                ids, upstream = pattern(size * world.world_size), 1.0 + slope * world.rank
                want = outcome(loss | SETTINGS["plain"], world, size, ids, dtype, upstream)
                for how in ("gathered", "ring"):
                    got = outcome(loss | SETTINGS[how], world, size, ids, dtype, upstream)
                    off = max(float((got[k] - x).abs().max() / x.abs().max().clamp(min=1)) for k, x in want.items())
                    found[f"{how} {dtype} {loss} {name} {size}"] = off if off == off else float("inf")
    return found


def against_the_papers(world: World) -> dict[str, float]:
    """The mean over ranks of value and scale gradient, and b's gradient / W, against one fp64 loop over everything."""
    size, found = 5, {}
    n = size * world.world_size
    ids = PATTERNS["absent slots"](n)
    mine = slice(world.rank * size, (world.rank + 1) * size)
    for kind in ("info_nce", "sigmoid"):
        got = outcome({"name": kind, **SETTINGS["ring"]}, world, size, ids, torch.float64, 1.0)
        inputs = [x.requires_grad_() for x in features(n, 6, torch.float64)]
        inputs += [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (9.0, -3.0)]
        keep = torch.nonzero(ids >= 0).flatten()
        a, b, kept = inputs[0][keep], inputs[1][keep], ids[keep].tolist()
        loss = naive_info_nce(a, b, kept, inputs[2]) if kind == "info_nce" else naive_sigmoid(a, b, kept, *inputs[2:])
        loss.backward()
        value = got["value"].clone()
        sum_over_ranks(value)
        found[f"{kind} value"] = abs(float(value / world.world_size - loss))
        found[f"{kind} scale"] = abs(float(got["scale and bias"][0] - inputs[2].grad))
        for k, x in zip("ab", inputs, strict=False):
            found[f"{kind} {k}"] = float((got[k] / world.world_size - x.grad[mine]).abs().max())
    return found


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time, and the largest single tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[int, list[Any]]] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive = {k: v for k, v in self.alive.items() if any(r() is not None for r in v[1])}
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                held = self.alive.setdefault(storage.data_ptr(), (storage.nbytes(), []))
                held[1].append(weakref.ref(x))
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(n for n, _ in self.alive.values()))
        return out


def memory(world: World) -> dict[str, list[int]]:
    """Peak and largest bytes of forward and backward, 16 rows of 2048 numbers a rank."""
    size, dim = 16, 2048
    n = size * world.world_size
    mine = slice(world.rank * size, (world.rank + 1) * size)
    found = {}
    for kind in ("info_nce", "sigmoid"):
        for ring in (False, True):
            a, b = (x[mine].clone().requires_grad_() for x in features(n, dim, torch.float32))
            s, t = (torch.tensor([x], requires_grad=True) for x in (9.0, -3.0))
            how, ids = How(8.0, ring, tiled), torch.arange(n)[mine]
            with Live() as live:
                out = info_nce(a, b, ids, s, 0.0, how) if kind == "info_nce" else sigmoid_loss(a, b, ids, s, t, how)
                out.value.backward()
            found[f"{kind} {'ring' if ring else 'gathered'}"] = [live.peak, live.largest]
    return found


def meetings(world: World) -> dict[str, Any]:
    """Every rank adds its number + 1 to every block, and notes whom it met."""
    met = []

    def visit(fixed: Sequence[Tensor], found: Tensor) -> None:
        met.append(fixed[0].tolist())
        found += world.rank + 1

    home = circulate(visit, [torch.arange(3) + 10 * world.rank], torch.zeros(3))
    return {"met": met, "home": home}
