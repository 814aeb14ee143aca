"""The terms' formulas, row by row and column by column, in fp64; and random inputs for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "feature": ("feature", {}),
    "cosine": ("feature", {"distance": "cosine"}),
    "soft_labels": ("soft_labels", {"teacher_temperature": 2.0, "student_temperature": 2.0}),
    "affinity": ("affinity", {}),
    "within": ("affinity", {"across": False, "within": True}),
    "interactive": ("interactive", {}),
    "gradient": ("gradient", {}),
    "soft_sigmoid": ("soft_sigmoid", {}),
    "dcd_kl": ("dcd", {"candidates": 3, "temperature": 2.0, "dynamic": "student", "a": 0.3}),
    "dcd_mse": ("dcd", {"candidates": 2, "kd": "mse", "dynamic": "teacher", "weight_temperature": 0.1}),
    "dcd_plain": ("dcd", {"candidates": "all", "dynamic": "none"}),
}


@dataclass
class Sides:
    """A pair: student [n, 5] (a, b), projections [n, 7] (pa, pb), teacher [n, 7] (ta, tb)."""

    a: Tensor
    b: Tensor
    pa: Tensor
    pb: Tensor
    ta: Tensor
    tb: Tensor
    ids: Tensor
    scale: Tensor
    bias: Tensor
    t_scale: float = 9.0
    t_bias: float = -1.5


def make_sides(ids: list[int], seed: int) -> Sides:
    g = torch.Generator().manual_seed(seed)

    def draw(dim: int) -> Tensor:
        return normalize(torch.randn(len(ids), dim, generator=g, dtype=torch.float64), dim=-1)

    a, b, pa, pb = (draw(d).requires_grad_() for d in (5, 5, 7, 7))
    scale, bias = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (6.0, -2.0))
    return Sides(a, b, pa, pb, draw(7), draw(7), torch.tensor(ids), scale, bias)


def naive(case: str, s: Sides) -> Tensor:
    """The term on the whole batch."""
    keep = [i for i, x in enumerate(s.ids.tolist()) if x >= 0]
    if not keep:
        return torch.zeros((), dtype=torch.float64)
    ids = [int(s.ids[i]) for i in keep]
    # Heads give vectors of any length; the term takes them as directions.
    v = {
        "a": s.a[keep], "b": s.b[keep], "ta": s.ta[keep], "tb": s.tb[keep],
        "pa": normalize(s.pa[keep], dim=-1), "pb": normalize(s.pb[keep], dim=-1),
    }  # fmt: skip
    name, options = CASES[case]
    return globals()[f"_{name}"](v, ids, s, options) / len(keep)


def _kl(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    q, p = (torch.stack([x.exp() for x in xs]) / sum(x.exp() for x in xs) for xs in (teacher, student))
    return sum(q[j] * (q[j].log() - p[j].log()) for j in range(len(q)))


def _logits(x: Tensor, y: Tensor, scale: Any, bias: float = 0.0) -> list[list[Tensor]]:
    return [[(scale * (x[i] * y[j]).sum() + bias).squeeze() for j in range(len(y))] for i in range(len(x))]


def _both(v: dict[str, Tensor], s: Sides) -> list[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    """Student's and teacher's logits, a → b and b → a."""
    return [
        (_logits(v["a"], v["b"], s.scale), _logits(v["ta"], v["tb"], s.t_scale)),
        (_logits(v["b"], v["a"], s.scale), _logits(v["tb"], v["ta"], s.t_scale)),
    ]


def _feature(v: dict[str, Tensor], ids: list[int], s: Sides, o: dict[str, Any]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(ids)):
        for p, t in (("pa", "ta"), ("pb", "tb")):
            x, y = v[p][i], v[t][i]
            total = total + (1 - (x * y).sum() if o.get("distance") == "cosine" else ((x - y) ** 2).sum()) / 2
    return total


def _soft_labels(v: dict[str, Tensor], ids: list[int], s: Sides, o: dict[str, Any]) -> Tensor:
    tt, ts = o.get("teacher_temperature", 1.0), o.get("student_temperature", 1.0)
    total = torch.zeros((), dtype=torch.float64)
    for student, teacher in _both(v, s):
        for i in range(len(ids)):
            total = total + tt * ts * _kl([x / tt for x in teacher[i]], [x / ts for x in student[i]]) / 2
    return total


def _affinity(v: dict[str, Tensor], ids: list[int], s: Sides, o: dict[str, Any]) -> Tensor:
    if not o.get("within"):
        return _soft_labels(v, ids, s, {})
    total = torch.zeros((), dtype=torch.float64)
    if len(ids) < 2:
        return total
    for x, t in (("a", "ta"), ("b", "tb")):
        student, teacher = _logits(v[x], v[x], s.scale), _logits(v[t], v[t], s.t_scale)
        for i in range(len(ids)):
            others = [j for j in range(len(ids)) if j != i]
            total = total + _kl([teacher[i][j] for j in others], [student[i][j] for j in others]) / 2
    return total


def _nce(logits: list[Tensor], positives: list[int]) -> Tensor:
    z = torch.log(sum(x.exp() for x in logits))
    return -sum(logits[j] - z for j in positives) / len(positives)


def _interactive(v: dict[str, Tensor], ids: list[int], s: Sides, o: dict[str, Any]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for q, k in (("pa", "tb"), ("pb", "ta")):
        logits = _logits(v[q], v[k], s.scale)
        for i in range(len(ids)):
            total = total + _nce(logits[i], [j for j in range(len(ids)) if ids[j] == ids[i]]) / 2
    return total


def _gradient(v: dict[str, Tensor], ids: list[int], s: Sides, o: dict[str, Any]) -> Tensor:
    """The gradient by autograd, of the sum over rows of the symmetric InfoNCE, written as loops."""

    def gradient(x: Tensor, y: Tensor, scale: Any) -> tuple[Tensor, Tensor]:
        x, y = (t if t.requires_grad else t.clone().requires_grad_() for t in (x, y))
        loss = torch.zeros((), dtype=torch.float64)
        for p, q in ((x, y), (y, x)):
            logits = _logits(p, q, scale)
            for i in range(len(ids)):
                loss = loss + _nce(logits[i], [j for j in range(len(ids)) if ids[j] == ids[i]]) / 2
        gx, gy = torch.autograd.grad(loss, (x, y), create_graph=True)
        return gx, gy

    mine, wanted = gradient(v["pa"], v["pb"], s.scale), gradient(v["ta"], v["tb"], s.t_scale)
    total = torch.zeros((), dtype=torch.float64)
    for g, w in zip(mine, wanted, strict=True):
        for i in range(len(ids)):
            total = total + ((g[i] - w[i].detach()) ** 2).sum() / 2
    return total


def _soft_sigmoid(v: dict[str, Tensor], ids: list[int], s: Sides, o: dict[str, Any]) -> Tensor:
    student = _logits(v["a"], v["b"], s.scale, s.bias)
    teacher = _logits(v["ta"], v["tb"], s.t_scale, s.t_bias)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(ids)):
        for j in range(len(ids)):
            q, p = (1 / (1 + torch.exp(-x[i][j])) for x in (teacher, student))
            total = total + q * (q.log() - p.log()) + (1 - q) * ((1 - q).log() - (1 - p).log())
    return total


def _dcd(v: dict[str, Tensor], ids: list[int], s: Sides, o: dict[str, Any]) -> Tensor:
    n, a, t = len(ids), o.get("a", 0.5), o.get("temperature", 1.0)
    total = torch.zeros((), dtype=torch.float64)
    for student, teacher in _both(v, s):
        sets = []
        for i in range(n):
            positives = [j for j in range(n) if ids[j] == ids[i]]
            negatives = sorted((j for j in range(n) if ids[j] != ids[i]), key=lambda j: -float(teacher[i][j]))
            hard = negatives if o["candidates"] == "all" else negatives[: o["candidates"]]
            sets.append((positives, hard))
        entropies, ce_s, ce_t = [], [], []
        for i, (positives, hard) in enumerate(sets):
            c = positives + hard
            w = [math.exp(float(teacher[i][j]) / t) for j in c]
            q = [x / sum(w) for x in w]
            entropies.append(-sum(x * math.log(x) for x in q))
            ce_t.append(-sum(math.log(x) for x in q[: len(positives)]) / len(positives))
            ce_s.append(float(_nce([student[i][j].detach() for j in c], list(range(len(positives))))))
        e = [h / sum(entropies) if sum(entropies) > 0 else 1 / n for h in entropies]
        tau = o.get("weight_temperature", 1.0)
        z = sum(math.exp((1 - x) ** 2 / tau) for x in e)
        for i, (positives, hard) in enumerate(sets):
            c = positives + hard
            k, own = 1.0, n * e[i]
            if o["dynamic"] == "none":
                own = 1.0
            elif o["dynamic"] == "teacher":
                k = n * math.exp((1 - e[i]) ** 2 / tau) / z
            else:
                k = 1 - math.exp(-ce_s[i] / max(ce_t[i], 1e-6))
            ls, lt = [student[i][j] for j in c], [teacher[i][j] for j in c]
            if o.get("kd", "kl") == "kl":
                kd = t * t * _kl([x / t for x in lt], [x / t for x in ls])
            else:
                kd = sum((x - y) ** 2 for x, y in zip(ls, lt, strict=True)) / len(c)
            nce = _nce(ls, list(range(len(positives))))
            total = total + (a * k * kd + (1 - a) * own * nce) / 2
    return total
