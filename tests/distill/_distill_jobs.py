"""What spawned ranks run: a step of the tiny model with heads and a teacher, under any engine and micro-batch."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
from _distill_naive import CASES, Sides, naive
from _tiny import PAIRS, TinyDualEncoder, make_batch, share_of

from dualenc.config import Component, Distill, EngineConfig, Optim, Teacher
from dualenc.data.batch import Batch, TeacherRows, map_tensors
from dualenc.distill.objective import Distillation, TeacherInfo, head_name
from dualenc.distributed.world import World
from dualenc.engine import build_engine
from dualenc.losses import build_loss
from dualenc.train.step import train_step

SIZE, T_DIM = 16, 7
SCALE, BIAS = {"image-text": 9.0, "audio-text": 4.0}, -1.5
ENGINES: dict[str, dict[str, Any]] = {
    "single": {},
    "DDP": {"parallel": "ddp"},
    "FSDP2": {"parallel": "fsdp2"},
    "ZeRO 2": {"kind": "deepspeed", "zero_stage": 2},
    "ZeRO 3": {"kind": "deepspeed", "zero_stage": 3},
}


class Student(TinyDualEncoder):
    """The tiny model with one head, as DualEncoder.add_head makes it."""

    def __init__(self) -> None:
        super().__init__()
        head = nn.ModuleDict({m: nn.Linear(8, T_DIM) for m in self.towers})
        self.heads = nn.ModuleDict({head_name(0, "teacher0"): head})

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        out = super().forward(inputs)
        for name, head in self.heads.items():
            out[name] = {m: head[m](x) for m, x in out["features"].items()}
        return out


def student() -> Student:
    torch.manual_seed(0)
    return Student()


def taught(step: int) -> Batch:
    """A global batch with a teacher's features; of slot 1 the teacher knows no text."""
    batch = make_batch(step, SIZE)
    g = torch.Generator().manual_seed(7 + step)
    features, has = {}, {}
    for m, rows in batch.rows.items():
        known = torch.zeros(SIZE, dtype=torch.bool).index_fill(0, rows, True)
        if m == "text":
            known[1] = False
        x = nn.functional.normalize(torch.randn(SIZE, T_DIM, generator=g), dim=-1)
        features[m], has[m] = torch.where(known[:, None], x, 0.0), known
    return replace(batch, teachers={"teacher0": TeacherRows(has, features)})


def shared(batch: Batch, rank: int, world: int) -> Batch:
    said = batch.teachers["teacher0"]
    has, features = (map_tensors(x, lambda t: t[rank::world]) for x in (said.has, said.features))
    return replace(share_of(batch, rank, world), teachers={"teacher0": TeacherRows(has, features)})


def distillation(case: str) -> Distillation:
    name, options = CASES[case]
    term = Component(name=name, weight=2.0, **options)
    config = Distill(teachers=[Teacher(model="x")], terms=[term], hard=0.5)
    pairs = {p: SCALE["-".join(p)] for p in PAIRS}
    info = TeacherInfo("teacher0", 3.0, pairs, dict.fromkeys(PAIRS, BIAS))
    return Distillation(config, build_loss(Component(name="info_nce")), [info])


def gradients(world: World, engine: str, case: str, micro: int | None) -> dict[str, Tensor]:
    """Gradients as the engine applies them: SGD with rate 1 moves the weights by them."""
    before = {n: p.detach().clone() for n, p in student().named_parameters()}
    optim = Optim(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip_grad_norm=None)
    built = build_engine(EngineConfig(**ENGINES[engine]), optim, student(), world)
    train_step(built, shared(taught(0), world.rank, world.world_size), PAIRS, distillation(case), micro)
    return {n: before[n] - p for n, p in built.model_state().items()}


def sweep(world: World, engines: list[str], cases: list[str], micros: list[int | None]) -> dict[str, dict[str, Tensor]]:
    return {f"{e}/{c}/{m}": gradients(world, e, c, m) for e in engines for c in cases for m in micros}


def reference(case: str) -> dict[str, Tensor]:
    """One process, the whole batch, the naive loops in fp64."""
    from _tiny import naive_info_nce

    model, batch = student(), taught(0)
    out = model(batch.inputs)
    total = torch.zeros((), dtype=torch.float64)
    for m1, m2 in PAIRS:
        pair = f"{m1}-{m2}"

        def slots(x: Tensor, m: str) -> Tensor:
            return torch.zeros(SIZE, x.shape[1], dtype=torch.float64).index_copy(0, batch.rows[m], x.double())

        there = [
            s in batch.rows[m1].tolist() and s in batch.rows[m2].tolist() and int(batch.ids[s]) >= 0
            for s in range(SIZE)
        ]
        a, b = slots(out["features"][m1], m1), slots(out["features"][m2], m2)
        scale, bias = out["logit_scale"][pair].double(), out["logit_bias"][pair].double()
        keep = [s for s in range(SIZE) if there[s]]
        hard = naive_info_nce(a[keep], b[keep], [int(batch.ids[s]) for s in keep], scale)
        head = out[head_name(0, "teacher0")]
        known = batch.teachers["teacher0"].has
        ids = torch.tensor(
            [int(batch.ids[s]) if there[s] and known[m1][s] and known[m2][s] else -1 for s in range(SIZE)]
        )
        t = batch.teachers["teacher0"].features
        sides = Sides(
            a, b, slots(head[m1], m1), slots(head[m2], m2), t[m1].double(), t[m2].double(), ids, scale, bias,
            SCALE[pair], BIAS,
        )  # fmt: skip
        total = total + (0.5 * hard + 2.0 * naive(case, sides)) / len(PAIRS)
    total.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
