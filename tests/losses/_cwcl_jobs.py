"""A model of real towers with a locked text tower, CWCL in one process by a naive loop, and what the ranks run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _tiny import PAIRS, Block, make_batch, naive_info_nce, share_of
from gradcheck import CLIP, ENGINES, LR, MOMENTUM, OPTIM, SIZE, STEPS

from dualenc.config import Component, EngineConfig, LogitScale, pair_name
from dualenc.data.batch import Batch
from dualenc.distributed.world import World
from dualenc.encoders import DualEncoder, Tower
from dualenc.engine import build_engine
from dualenc.losses import build_loss
from dualenc.train.step import train_step

WIDTH, DIM = 16, 8


class Small(Tower):
    """A real Tower: an embedding of width 16 and a projection to 8."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem, self.embed_dim = stem, DIM
        self.stack = nn.ModuleList([Block(WIDTH, 0.0) for _ in range(2)])
        self.head = nn.Linear(WIDTH, DIM, bias=False)

    def pooled(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.stack:
            x = block(x)
        return x.mean(1) if x.ndim == 3 else x


def model(lock: str = "trunk") -> DualEncoder:
    """``lock``: "trunk" trains the text tower's projection, "all" does not."""
    torch.manual_seed(0)
    towers: Mapping[str, Tower] = {
        "image": Small(nn.Linear(12, WIDTH)),
        "text": Small(nn.Embedding(20, WIDTH)),
        "audio": Small(nn.Linear(6, WIDTH)),
    }
    heads = ["text"] if lock == "trunk" else []
    return DualEncoder(towers, PAIRS, LogitScale(init=7.0), lock=["text"], heads=heads)


def naive_cwcl(a: Tensor, b: Tensor, ids: list[int], scale: Tensor, f: Tensor, sharpen: float = 1.0) -> Tensor:
    """½ (CWCL of the frozen ``b`` towards ``a`` + InfoNCE of ``a`` towards ``b``), entry by entry from the paper."""
    n = len(ids)
    weighted = torch.zeros((), dtype=a.dtype)
    for i in range(n):
        w = [(((f[i] * f[j]).sum() / 2 + 0.5).clamp(min=0)) ** sharpen for j in range(n)]
        logits = [(scale * (b[i] * a[j]).sum()).squeeze() for j in range(n)]
        z = torch.stack([x.exp() for x in logits]).sum()
        weighted = weighted - sum(w[j] * torch.log(logits[j].exp() / z) for j in range(n)) / sum(w) / n
    plain = torch.zeros((), dtype=a.dtype)
    for i in range(n):
        logits = [(scale * (a[i] * b[j]).sum()).squeeze() for j in range(n)]
        z = torch.stack([x.exp() for x in logits]).sum()
        positives = [j for j in range(n) if ids[j] == ids[i]]
        plain = plain - sum(torch.log(logits[j].exp() / z) for j in positives) / len(positives) / n
    return (weighted + plain) / 2


def whole_batch_loss(twin: DualEncoder, batch: Batch, kind: str) -> Tensor:
    """The mean over pairs, in fp64; the frozen embeddings are taken from the tower itself, not from its outputs."""
    outputs = twin(batch.inputs)
    with torch.no_grad():
        text = twin.towers["text"]
        assert isinstance(text, Tower)
        frozen = nn.functional.normalize(text.pooled(batch.inputs["text"]).double(), dim=-1)
    total = torch.zeros((), dtype=torch.float64)
    for m, _ in PAIRS:
        place, place_text = ({int(s): k for k, s in enumerate(batch.rows[x])} for x in (m, "text"))
        slots = [s for s in range(batch.size) if s in place and s in place_text and int(batch.ids[s]) >= 0]
        a = torch.stack([outputs["features"][m][place[s]] for s in slots]).double()
        b = torch.stack([outputs["features"]["text"][place_text[s]] for s in slots]).double()
        f = torch.stack([frozen[place_text[s]] for s in slots])
        ids, scale = [int(batch.ids[s]) for s in slots], outputs["logit_scale"][pair_name((m, "text"))].double()
        total = total + (naive_cwcl(a, b, ids, scale, f) if kind == "cwcl" else naive_info_nce(a, b, ids, scale))
    return total / len(PAIRS)


def reference(kind: str, lock: str) -> dict[str, Tensor]:
    """Parameters after STEPS SGD steps of one process on whole batches."""
    twin = model(lock)
    trained = [p for p in twin.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, lr=LR, momentum=MOMENTUM)
    for step in range(STEPS):
        sgd.zero_grad()
        whole_batch_loss(twin, make_batch(step, SIZE), kind).backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        sgd.step()
    return {name: p.detach() for name, p in twin.named_parameters()}


def run(world: World, engine: str, kind: str, chunks: int, lock: str) -> dict[str, Tensor]:
    """The same by the real step; whole on rank 0."""
    built = build_engine(EngineConfig(**ENGINES[engine]), OPTIM, model(lock), world)
    loss = build_loss(Component(name=kind))
    for step in range(STEPS):
        batch = share_of(make_batch(step, SIZE), world.rank, world.world_size)
        assert world.world_size == 1 or world.rank == 0 or not len(batch.rows["audio"])  # the others drew no audio
        train_step(built, batch, PAIRS, loss, micro=None if chunks == 1 else batch.size // chunks)
    return built.model_state()


def sweep(world: World, engines: list[str]) -> dict[str, Any]:
    """Rank 0: case → largest relative difference from the reference of any parameter, and its name."""
    out = {}
    for lock, kind in (("trunk", "cwcl"), ("all", "cwcl"), ("all", "info_nce")):
        want = reference(kind, lock) if world.rank == 0 else {}
        for engine in engines:
            for chunks in (1, 4):
                got = run(world, engine, kind, chunks, lock)
                off = {k: float((got[k] - p).abs().max() / p.abs().max().clamp(min=1e-12)) for k, p in want.items()}
                worst = max(off, key=lambda k: off[k], default="")
                out[f"{engine}/{kind}/{lock}/{chunks}"] = [off.get(worst, 0.0), worst]
    return out
