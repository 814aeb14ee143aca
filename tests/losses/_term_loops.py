"""The losses between towers' rows, written from their papers as loops in double precision over the valid rows.

Each takes the valid rows of a batch (lists of vectors), their ids, the scale, what the loss is given besides, and its
settings; nothing of the package is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rows = list[Tensor]


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum().sqrt()


def nce(a: Rows, b: Rows, ids: list[int], scale: Tensor) -> Tensor:
    total = torch.zeros(1, dtype=torch.float64)
    for x, y in ((a, b), (b, a)):
        for i in range(len(ids)):
            logits = [scale * (x[i] * y[j]).sum() for j in range(len(ids))]
            log_z = torch.log(sum(torch.exp(z) for z in logits))
            positive = [j for j in range(len(ids)) if ids[j] == ids[i]]
            total = total - sum(logits[j] - log_z for j in positive) / len(positive) / len(ids) / 2
    return total


def koleo(a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x in (a, b):
        for i in range(len(ids)):
            away = [((x[i] - x[j]) ** 2).sum().sqrt() for j in range(len(ids)) if ids[j] != ids[i]]
            total = total - torch.log(min(away)) / len(ids) / 2
    return total


def uniformity(a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any, t: float = 2.0) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x in (a, b):
        pairs = [(i, j) for i in range(len(ids)) for j in range(len(ids)) if ids[i] != ids[j]]
        kernel = sum(torch.exp(-t * ((x[i] - x[j]) ** 2).sum()) for i, j in pairs)
        total = total + torch.log(kernel / len(pairs)) / 2
    return total


def matryoshka(a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any, dims: list[int]) -> Tensor:
    return sum(nce([unit(x[:d]) for x in a], [unit(x[:d]) for x in b], ids, scale) for d in dims) / len(dims)


def barlip(a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any, **sizes: int) -> Tensor:
    p, q = more["a"]["projected"], more["b"]["projected"]
    n, width = len(ids), len(p[0])

    def standardised(z: Rows, k: int) -> list[Tensor]:
        mean = sum(x[k] for x in z) / n
        var = sum((x[k] - mean) ** 2 for x in z) / n
        return [(x[k] - mean) / torch.sqrt(var + 1e-5) for x in z]

    left, right = ([standardised(z, k) for k in range(width)] for z in (p, q))
    total = torch.zeros((), dtype=torch.float64)
    for k in range(width):
        for m in range(width):
            c = sum(x * y for x, y in zip(left[k], right[m], strict=True)) / n
            total = total + ((1 - c) ** 2 if k == m else 5e-3 * c**2)
    return 0.025 * total


def siamlip(a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any, **sizes: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for one, two in (("a", "b"), ("b", "a")):
        for x, y in zip(more[one]["predicted"], more[two]["predicted"], strict=True):
            half = len(x) // 2
            total = total - (unit(x[half:]) * unit(y[:half].detach())).sum() / len(ids) / 2
    return total


def swalip(a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any, **sizes: int) -> Tensor:
    sides = {m: more[m]["prototypes"] for m in "ab"}
    n, count = len(ids), len(sides["a"][0])
    assigned = {}
    for m, scores in sides.items():
        q = [[math.exp(s.item() / 0.05) for s in row] for row in scores]
        for _ in range(3):
            for k in range(count):
                column = sum(row[k] for row in q)
                for row in q:
                    row[k] *= n / count / column
            q = [[x / sum(row) for x in row] for row in q]
        assigned[m] = q
    total = torch.zeros((), dtype=torch.float64)
    for one, two in (("a", "b"), ("b", "a")):
        for i in range(n):
            log_z = torch.log(sum(torch.exp(s / 0.1) for s in sides[one][i]))
            total = total - sum(assigned[two][i][k] * (sides[one][i][k] / 0.1 - log_z) for k in range(count)) / n / 2
    return total


def hallucinator(a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any) -> Tensor:
    made_a = [unit(x + 0.3 * (x - y.detach())) for x, y in zip(a, b, strict=True)]
    made_b = [unit(y + 0.3 * (y - x.detach())) for x, y in zip(a, b, strict=True)]
    return nce(a, b, ids, scale) + 0.25 * (nce(made_a, b, ids, scale) + nce(a, made_b, ids, scale))


def pair_gate(a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any) -> Tensor:
    group = "gate_audio_image"
    return nce([unit(x) for x in more["a"][group]], [unit(x) for x in more["b"][group]], ids, scale)


def private_space(a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any, **sizes: int) -> Tensor:
    total, n = torch.zeros((), dtype=torch.float64), len(ids)
    for c, s in ((a, more["a"]["private"]), (b, more["b"]["private"])):
        s = [unit(x) for x in s]
        for i in range(n):
            other = [j for j in range(n) if ids[j] != ids[i]]
            alone = [torch.exp(-((s[i] - s[j]) ** 2).sum() / (2 * 0.5)) for j in other]
            joint = [k * torch.exp(-((c[i] - c[j]) ** 2).sum() / (2 * 0.5)) for k, j in zip(alone, other, strict=True)]
            total = total + (torch.log(sum(joint) / len(other)) + torch.log(sum(alone) / len(other))) / n / 2
    return total


def whitened(
    a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any, groups: int, shuffles: int = 2, eps: float = 1e-3
) -> Tensor:
    n, dim = len(ids), len(a[0])
    draw = torch.Generator().manual_seed(more["step"])
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(shuffles):
        order = torch.randperm(dim, generator=draw).tolist()
        sides = []
        for x in (a, b):
            mean = sum(x) / n
            out = [torch.zeros(dim, dtype=torch.float64) for _ in range(n)]
            for g in range(groups):
                at = order[g * dim // groups : (g + 1) * dim // groups]
                rows = [(r - mean)[at] for r in x]
                cov = sum(torch.outer(r, r) for r in rows) / n
                cov = cov + eps * cov.diagonal().mean() * torch.eye(len(at), dtype=torch.float64)
                values, vectors = torch.linalg.eigh(cov)
                root = vectors @ torch.diag(values**-0.5) @ vectors.T
                out = [o.index_add(0, torch.tensor(at), root @ r) for o, r in zip(out, rows, strict=True)]
            sides.append([unit(o) for o in out])
        total = total + nce(*sides, ids, scale).squeeze() / shuffles
    return total


def local_contrast(a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any) -> Tensor:
    total, used = torch.zeros(1, dtype=torch.float64), 0
    for i in range(len(ids)):
        p, q = more["a"]["local"][i], more["b"]["local"][i]
        there = [k for k in range(len(p)) if more["a"]["region"][i][k] != -1 and more["b"]["region"][i][k] != -1]
        used += bool(there)
        for x, y in ((p, q), (q, p)):
            for k in there:
                across = sum(torch.exp(scale * (x[k] * y[m]).sum()) for m in there)
                within = sum(torch.exp(scale * (x[k] * x[m]).sum()) for m in there if m != k)
                total = total - (scale * (x[k] * y[k]).sum() - torch.log(across + within)) / len(there) / 2
    return total / used


def supremix(
    a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any, same: float, window: float, mixed: int
) -> Tensor:
    """λ is looked up in the package's table of draws (``more["drawn"]``): which one it is, is no part of the paper."""
    labels = more["label"]
    use = [i for i in range(len(ids)) if not math.isnan(labels[i])]
    total = torch.zeros(1, dtype=torch.float64)
    values = sorted({labels[i] for i in use})
    for x, y in ((a, b), (b, a)):
        mean = {v: sum(y[j] for j in use if labels[j] == v) / sum(labels[j] == v for j in use) for v in values}
        for i in use:
            positive = [j for j in use if abs(labels[j] - labels[i]) <= same or ids[j] == ids[i]]
            negative = [j for j in use if j not in positive]
            below = [v for v in values if v < labels[i] - same][::-1]
            above = [v for v in values if v > labels[i] + same]
            pulled = [scale * (x[i] * y[j]).sum() for j in positive]
            z = sum(torch.exp(scale * (x[i] * y[j]).sum()) for j in use)
            for low, high in list(zip(below, above, strict=False))[:mixed]:
                if labels[i] - low <= window and high - labels[i] <= window:
                    mu = (high - labels[i]) / (high - low)
                    s = scale * (x[i] * unit(mu * mean[low] + (1 - mu) * mean[high])).sum()
                    pulled.append(s)
                    z = z + torch.exp(s)
            gaps = [abs(labels[j] - labels[i]) for j in negative]
            for gap, j in zip(gaps, negative, strict=True):
                lam = more["drawn"][i][j]
                s = (x[i] * unit(lam * x[i] + (1 - lam) * y[j])).sum()
                z = z + gap / (sum(gaps) / len(gaps)) * torch.exp(scale * s)
            total = total - sum(s - torch.log(z) for s in pulled) / len(pulled) / len(use) / 2
    return total


def layers(a: Rows, b: Rows, ids: list[int], scale: Tensor, more: Any, depths: list[float]) -> Tensor:
    at, tau = [f"hidden{round(1000 * d)}" for d in depths], torch.tensor(1 / 0.07, dtype=torch.float64)
    return sum(nce([unit(x) for x in more["a"][k]], [unit(x) for x in more["b"][k]], ids, tau) for k in at)


LOOPS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "koleo": (koleo, {}),
    "uniformity": (uniformity, {}),
    "matryoshka": (matryoshka, {"dims": [2, 4, 8]}),
    "layers": (layers, {"depths": [0.5, 1.0]}),
    "barlip": (barlip, {"project": 4, "hidden": 5}),
    "siamlip": (siamlip, {"project": 4, "hidden": 5}),
    "swalip": (swalip, {"prototypes": 5}),
    "hallucinator": (hallucinator, {}),
    "pair_gate": (pair_gate, {}),
    "private_space": (private_space, {"width": 4}),
    "whitened": (whitened, {"groups": 2}),
    "local_contrast": (local_contrast, {}),
    "supremix": (supremix, {"same": 0.5, "window": 4.0, "mixed": 2}),
}
"""Name → loop and the settings that it and the loss are given."""
