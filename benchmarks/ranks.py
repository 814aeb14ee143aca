"""What 8 to 4,096 ranks would send, wait for and read in a step: formulas and a simulation, checked against real ranks.

    python -m benchmarks.ranks [--ranks 8 64 512 4096] [--batch 32] [--dim 512] [--parameters 151e6] [--gbit 200]
        [--latency-us 10] [--tflops 200] [--samples-per-s 3000] [--write] [--json FILE]
    python -m benchmarks.ranks check [--ranks 2 4]

**Bytes and messages** of info_nce, with columns gathered (plain or tiled) or around the ring, and of the gradients
(all-reduce), with ring collectives: gathering blocks of n bytes costs each rank W − 1 messages of n bytes. ``check``
starts real ranks (gloo) and counts what their collectives were given: the same numbers, to the byte.

**Time** is simulated hop by hop: a rank goes on when it and its neighbour have done the hop before, a hop takes
``latency`` + bytes / ``gbit``, and towers, tiles and gradients take the time that the rates above say. *jitter*: every
rank's towers take a log-normal factor of 5 % longer or shorter each step; *slow rank*: one rank takes 1.5 times as
long. Assumptions, not measurements: no switch is shared, nothing overlaps but the ring's sending with its computing,
and NCCL's trees, which are faster than rings for small messages on many ranks, are not modelled.

**Data**: shards that one machine of 8 ranks reads whole, from the real plan of 10^9 samples in 10^5 shards: bytes
fetched for each byte used, while a window lasts, with one lane and with as many as ranks. ``--write`` puts the tables
into docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.pages import put_block
from dualenc.config import Component
from dualenc.data.order import Plan
from dualenc.distributed.launch import launch
from dualenc.distributed.world import close_world, init_world
from dualenc.errors import DualencError

FP32, ID = 4, 8
WAYS = {
    "plain": {"impl": "plain"},
    "tiled": {"impl": "tiled"},
    "ring": {"impl": "tiled", "columns": "ring"},
}
SMALL = 1024
"""Bytes below which a collective is a counter or a flag and is not counted."""
PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
Times = NDArray[np.float64]


# --- formulas ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Move:
    """One exchange: ``kind`` is gather, scatter, reduce or ring; ``size`` the bytes of a rank's block (reduce: of all).

    ``visits``: of a ring, whether the ranks compute between two hops.
    """

    kind: str
    size: int
    visits: bool = False

    def sent(self, ranks: int) -> int:
        """Bytes that a rank sends."""
        if self.kind == "reduce":
            return 2 * (ranks - 1) * self.size // ranks
        return self.hops(ranks) * self.size

    def hops(self, ranks: int) -> int:
        """Messages that a rank sends, one after another."""
        return {
            "gather": ranks - 1,
            "scatter": ranks - 1,
            "reduce": 2 * (ranks - 1),
            "ring": ranks,
            "fixed": ranks - 1,
        }[self.kind]

    def hop_bytes(self, ranks: int) -> float:
        """Bytes of one message."""
        return self.size / ranks if self.kind == "reduce" else self.size


def loss_moves(way: str, ranks: int, batch: int, dim: int) -> list[Move]:
    """What info_nce of one pair exchanges, ``batch`` rows a rank; forward, then backward."""
    rows, ids, term = batch * dim * FP32, batch * ID, batch * FP32
    everywhere = Move("gather", ids)  # the ids of all slots, which count positives
    if way == "plain":
        return [everywhere, Move("gather", rows), Move("gather", rows), Move("scatter", rows), Move("scatter", rows)]
    terms = [Move("gather", term)] * 3
    if way == "tiled":
        statistics = [Move("reduce", 2 * ranks * term)] * 2
        forward = [everywhere, Move("gather", rows), Move("gather", ids), *statistics]
        return [*forward, Move("gather", rows), Move("gather", ids), *terms, Move("scatter", rows)]
    forward = [everywhere, Move("fixed", rows + ids), Move("ring", 4 * term, visits=True)]
    return [*forward, Move("fixed", rows + ids + 3 * term), Move("ring", rows, visits=True)]


def held(way: str, ranks: int, batch: int, dim: int) -> int:
    """Bytes of features and gradients of other ranks that a rank holds at most."""
    rows = batch * dim * FP32
    return {"plain": 4 * ranks * rows, "tiled": 2 * ranks * rows, "ring": 4 * rows}[way]


# --- the simulation ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates of a rank, all assumed."""

    bytes_per_s: float
    latency_s: float
    flops: float
    samples_per_s: float

    def hop(self, size: float) -> float:
        """Seconds of one message."""
        return self.latency_s + size / self.bytes_per_s


def passes(start: Times, move: Move, ranks: int, machine: Machine, visit_s: float = 0.0) -> Times:
    """When each rank has finished an exchange that it entered at ``start``."""
    at, hop = start.copy(), machine.hop(move.hop_bytes(ranks))
    for _ in range(move.hops(ranks)):
        at = at + (visit_s if move.visits else 0.0)
        at = np.maximum(at, np.roll(at, 1)) + hop
    return at


def step_s(way: str, ranks: int, batch: int, dim: int, gradient: int, machine: Machine, factors: Times) -> Times:
    """Seconds of one step of each rank: towers forward, loss, towers backward, gradients."""
    towers = batch / machine.samples_per_s * factors
    visit = 4.0 * batch * batch * dim / machine.flops  # a tile's logits, and as much again
    at = towers / 3
    for move in loss_moves(way, ranks, batch, dim):
        if move.kind == "fixed":
            continue  # sent while the rank works on the block before
        at = passes(at, move, ranks, machine, visit)
    if way != "ring":
        at = at + 3 * ranks * visit
    at = at + towers * 2 / 3
    return passes(at, Move("reduce", gradient), ranks, machine)


def scenarios(ranks: int, rng: np.random.Generator) -> dict[str, Times]:
    """How much longer each rank's towers take."""
    slow = np.ones(ranks)
    slow[ranks // 2] = 1.5
    return {"even": np.ones(ranks), "jitter": np.exp(0.05 * rng.standard_normal(ranks)), "slow rank": slow}


def simulate(
    worlds: list[int], batch: int, dim: int, parameters: int, machine: Machine, steps: int = 3
) -> list[dict[str, Any]]:
    """A row for each number of ranks and way."""
    out = []
    for ranks in worlds:
        gradient = Move("reduce", FP32 * parameters)
        for way in WAYS:
            moves = loss_moves(way, ranks, batch, dim)
            row: dict[str, Any] = {
                "ranks": ranks,
                "columns": way,
                "global batch": batch * ranks,
                "loss MiB": sum(m.sent(ranks) for m in moves) / 2**20,
                "messages": sum(m.hops(ranks) for m in moves),
                "held MiB": held(way, ranks, batch, dim) / 2**20,
                "gradient MiB": gradient.sent(ranks) / 2**20,
            }
            rng = np.random.default_rng(0)
            found: dict[str, list[float]] = {}
            for _ in range(steps):
                for name, factors in scenarios(ranks, rng).items():
                    at = step_s(way, ranks, batch, dim, gradient.size, machine, factors)
                    found.setdefault(name, []).append(float(at.max()))
            row |= {f"{name} ms": 1e3 * float(np.mean(s)) for name, s in found.items()}
            out.append(row)
    return out


# --- the data ------------------------------------------------------------------------------------------------------


def reads(ranks: int, lanes: int, batch: int, window: int, shards: int = 100_000, samples: int = 10_000) -> float:
    """Bytes that the first machine (8 ranks) fetches for each byte that it uses, if it reads shards whole and keeps
    them while a window lasts."""
    plan = Plan(["web"], [np.full(shards, samples)], 0, lanes=lanes, window=window)
    total = batch * ranks
    steps = max(1, min(window * lanes, plan.total) // total)
    slots = [j for j in range(total) if j % ranks < 8]
    picked = np.linspace(0, steps - 1, min(steps, 400)).astype(np.int64)  # of the steps: the rest adds no new shards
    at = plan.at((picked[:, None] * total + np.array(slots)[None]).ravel())
    used = len(slots) * steps
    return len(np.unique(at.shard)) * samples / used


def data_table(worlds: list[int], batch: int, window: int) -> list[dict[str, Any]]:
    """A row for each number of ranks."""
    return [
        {
            "ranks": w,
            "machines": -(-w // 8),
            "one lane": reads(w, 1, batch, window),
            "a lane a rank": reads(w, w, batch, window),
        }
        for w in worlds
    ]


# --- real ranks ----------------------------------------------------------------------------------------------------


class Sent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what a rank sends if collectives go round a ring: by the collective's name."""

    def __init__(self, ranks: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ranks, self.bytes, self.messages = ranks, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space == "c10d":
            self._add(name, args)
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, args: Any) -> None:
        around = self.ranks - 1
        first = args[0][0] if isinstance(args[0], list) else args[0]
        size = first.numel() * first.element_size()
        if name == "_allgather_base_" and size >= SMALL:
            self._count("gather", around * size // self.ranks, around)
        elif name == "_reduce_scatter_base_" and size * self.ranks >= SMALL:
            self._count("scatter", around * size, around)
        elif name == "allreduce_" and size >= SMALL:
            self._count("reduce", 2 * around * size // self.ranks, 2 * around)
        elif name == "send" and size:
            self._count("ring", size, 1)

    def _count(self, kind: str, size: int, messages: int) -> None:
        self.bytes[kind] += size
        self.messages[kind] += messages


def counted(way: str, ranks: int, batch: int, dim: int) -> dict[str, int]:
    """Bytes sent in a forward and backward of info_nce on this rank, by kind; shapes were compared before."""
    from dualenc.losses import build_loss

    loss = build_loss(Component.model_validate({"name": "info_nce", **WAYS[way]}))
    g = torch.Generator().manual_seed(torch.distributed.get_rank())
    for last in (False, True):
        a, b = (torch.nn.functional.normalize(torch.randn(batch, dim, generator=g), dim=1) for _ in "ab")
        a.requires_grad_()
        b.requires_grad_()
        ids = torch.arange(batch) + batch * torch.distributed.get_rank()
        scale = torch.tensor([10.0], requires_grad=True)
        with Sent(ranks) as seen:
            loss(a, b, ids, scale, None).value.backward()  # type: ignore[no-untyped-call]
        if last:
            return dict(seen.bytes)
    raise AssertionError


def predicted(way: str, ranks: int, batch: int, dim: int) -> dict[str, int]:
    """What :func:`counted` should find."""
    out: Counter[str] = Counter()
    for move in loss_moves(way, ranks, batch, dim):
        out["ring" if move.kind == "fixed" else move.kind] += move.sent(ranks)
    return dict(out)


def check(worlds: list[int], batch: int = 256, dim: int = 64) -> list[dict[str, Any]]:
    """Real ranks against the formulas: a row for each number of ranks and way."""
    out = []
    for ranks in worlds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.ranks", "rank-of", folder, str(batch), str(dim)]
            if launch(command, ranks):
                raise DualencError("a rank failed")
            found = [json.loads(p.read_text("utf-8")) for p in sorted(Path(folder).glob("rank*"))]
        for way in WAYS:
            want = predicted(way, ranks, batch, dim)
            out.append(
                {
                    "ranks": ranks,
                    "columns": way,
                    "formula": sum(want.values()),
                    "counted": max(sum(f[way].values()) for f in found),
                    "equal": all(f[way] == want for f in found),
                }
            )
    return out


def _rank(folder: Path, batch: int, dim: int) -> None:
    world = init_world("cpu", 120, threads=1)
    found = {way: counted(way, world.world_size, batch, dim) for way in WAYS}
    (folder / f"rank{world.rank}").write_text(json.dumps(found), "utf-8")
    close_world(world)


# --- tables --------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; numbers short."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(_said(r[h]) for h in heads) + " |" for r in rows]
    return "\n".join(lines)


def _said(x: Any) -> str:
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, float):
        return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    return f"{x:,}" if isinstance(x, int) else str(x)


def main(arguments: list[str]) -> None:
    """Print the tables, or check the formulas."""
    if arguments[:1] == ["rank-of"]:
        return _rank(Path(arguments[1]), int(arguments[2]), int(arguments[3]))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks")
    parser.add_argument("what", nargs="?", choices=["simulate", "check"], default="simulate")
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--batch", type=int, default=32, help="samples of a rank")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--parameters", type=float, default=151e6, help="trained")
    parser.add_argument("--gbit", type=float, default=200.0, help="per second, of a rank's link")
    parser.add_argument("--latency-us", type=float, default=10.0, help="of a message")
    parser.add_argument("--tflops", type=float, default=200.0, help="of a rank in the loss")
    parser.add_argument("--samples-per-s", type=float, default=3000.0, help="of a rank's towers, forward and backward")
    parser.add_argument("--window", type=int, default=1_000_000)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args(arguments)
    if given.what == "check":
        checked = check(given.ranks or [2, 4])
        print(table(checked))
        if given.write:
            put_block(PAGE, "check", table(checked))
        if not all(r["equal"] for r in checked):
            raise DualencError("the formulas and the ranks disagree")
        return None
    machine = Machine(given.gbit * 1e9 / 8, given.latency_us / 1e6, given.tflops * 1e12, given.samples_per_s)
    worlds = given.ranks or [8, 64, 512, 4096]
    steps = simulate(worlds, given.batch, given.dim, int(given.parameters), machine)
    read = data_table(worlds, given.batch, given.window)
    print(table(steps), table(read), sep="\n\n")
    if given.write:
        put_block(PAGE, "steps", table(steps))
        put_block(PAGE, "reads", table(read))
    if given.json is not None:
        given.json.write_text(json.dumps({"steps": steps, "reads": read}, indent=1), "utf-8")
    return None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DualencError, subprocess.CalledProcessError) as e:
        raise SystemExit(f"error: {e}") from None
