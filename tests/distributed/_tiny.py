"""A small dual encoder with the contract of DualEncoder, batches with absent rows, and the one-process reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dualenc.data.batch import Batch

PAIRS = [("image", "text"), ("audio", "text")]
NAMES = ["image-text", "audio-text"]


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.dropout(nn.functional.gelu(self.up(self.norm(x)))))


class Tower(nn.Module):
    def __init__(self, stem: nn.Module, width: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList([Block(width, dropout) for _ in range(2)])
        self.head = nn.Linear(width, dim)
        self.never_used = nn.Linear(width, 3)  # as poolers of released models: no gradient, in no engine

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1) if x.ndim == 3 else x)


class TinyDualEncoder(nn.Module):
    def __init__(self, dropout: float = 0.0, width: int = 16, dim: int = 8, max_scale: float = 100.0) -> None:
        super().__init__()
        self.max_scale = max_scale
        self.towers = nn.ModuleDict(
            {
                "image": Tower(nn.Linear(12, width), width, dim, dropout),
                "text": Tower(nn.Embedding(20, width), width, dim, dropout),
                "audio": Tower(nn.Linear(6, width), width, dim, dropout),
            }
        )
        self.logit_scale = nn.ParameterDict({n: nn.Parameter(torch.full([1], 2.0)) for n in NAMES})
        self.logit_bias = nn.ParameterDict({n: nn.Parameter(torch.full([1], -1.0)) for n in NAMES})

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        features = {m: nn.functional.normalize(self.towers[m](x).float(), dim=-1) for m, x in inputs.items()}
        scale = {n: s.float().exp().clamp(max=self.max_scale) for n, s in self.logit_scale.items()}
        return {"features": features, "logit_scale": scale, "logit_bias": dict(self.logit_bias.items())}


def tiny(dropout: float = 0.0, seed: int = 0, **kw: Any) -> TinyDualEncoder:
    torch.manual_seed(seed)
    return TinyDualEncoder(dropout, **kw)


def make_batch(step: int, size: int = 16) -> Batch:
    """A global batch: every third slot lacks the image, audio stands in slots 0 mod 4 only, slot 5 is lost, and slots
    1, 2 and 9 are one pair id."""
    g = torch.Generator().manual_seed(100 + step)
    slots = torch.arange(size)
    rows = {"image": slots[slots % 3 != 2], "text": slots[slots % 8 != 7], "audio": slots[slots % 4 == 0]}
    ids = slots + 1000 * step
    ids[[2, 9]] = ids[1].item()
    ids[5] = -1
    inputs = {
        "image": torch.randn(len(rows["image"]), 12, generator=g),
        "text": torch.randint(0, 20, (len(rows["text"]), 5), generator=g),
        "audio": torch.randn(len(rows["audio"]), 6, generator=g),
    }
    return Batch(size, inputs, rows, ids, [f"s/{i}" for i in range(size)], step)


def share_of(batch: Batch, rank: int, world: int) -> Batch:
    """The slots j with j % world == rank, with a dummy row where a modality is absent."""
    inputs, rows = {}, {}
    for m, r in batch.rows.items():
        take = torch.nonzero(r % world == rank).flatten()
        rows[m] = r[take] // world
        inputs[m] = batch.inputs[m][take] if len(take) else torch.zeros_like(batch.inputs[m][:1])
    return Batch(batch.size // world, inputs, rows, batch.ids[rank::world], batch.keys[rank::world], batch.step)


def naive_loss(kind: str, features: dict[str, Tensor], outputs: Any, batch: Batch) -> Tensor:
    """The mean over pairs of the loss of the whole batch, row by row and column by column, in fp64, from the papers."""
    total = torch.zeros((), dtype=torch.float64)
    for (m1, m2), name in zip(PAIRS, NAMES, strict=True):
        place1 = {int(s): k for k, s in enumerate(batch.rows[m1])}
        place2 = {int(s): k for k, s in enumerate(batch.rows[m2])}
        slots = [s for s in range(batch.size) if s in place1 and s in place2 and int(batch.ids[s]) >= 0]
        a = torch.stack([features[m1][place1[s]] for s in slots]).double()
        b = torch.stack([features[m2][place2[s]] for s in slots]).double()
        ids = [int(batch.ids[s]) for s in slots]
        scale, bias = outputs["logit_scale"][name].double(), outputs["logit_bias"][name].double()
        total = total + (
            naive_info_nce(a, b, ids, scale) if kind == "info_nce" else naive_sigmoid(a, b, ids, scale, bias)
        )
    return total / len(PAIRS)


def naive_info_nce(a: Tensor, b: Tensor, ids: list[int], scale: Tensor, smoothing: float = 0.0) -> Tensor:
    n = len(ids)
    total = torch.zeros((), dtype=torch.float64)
    for x, y in ((a, b), (b, a)):
        for i in range(n):
            logits = [(scale * (x[i] * y[j]).sum()).squeeze() for j in range(n)]
            log_z = torch.log(torch.stack([z.exp() for z in logits]).sum())
            positives = [j for j in range(n) if ids[j] == ids[i]]
            for j in range(n):
                target = (1 - smoothing) * (j in positives) / len(positives) + smoothing / n
                total = total - target * (logits[j] - log_z) / n / 2
    return total


def naive_sigmoid(a: Tensor, b: Tensor, ids: list[int], scale: Tensor, bias: Tensor) -> Tensor:
    n = len(ids)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            z = 1.0 if ids[i] == ids[j] else -1.0
            logit = (scale * (a[i] * b[j]).sum() + bias).squeeze()
            total = total + torch.log(1 + torch.exp(-z * logit)) / n
    return total
