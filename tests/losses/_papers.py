"""A loss of a recipe against a loop written from its paper: value and gradient, in fp64, both directions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import _every_jobs as jobs

from dualenc.config import Component
from dualenc.losses import build_loss

RowLoop = Callable[[int, list[Tensor], Tensor, "Items"], Tensor]
"""(row i, its cosine with each column, the scale, the items) → ℓ_i."""


class Items:
    """What a loop may know of the slots that take part: ``ids``, labels by name, ``frozen`` embeddings [n, W]."""

    def __init__(self, ids: list[int], labels: dict[str, list[Any]], frozen: Tensor) -> None:
        self.ids, self.labels, self.frozen = ids, labels, frozen

    def positives(self, i: int) -> list[int]:
        return [j for j, x in enumerate(self.ids) if x == self.ids[i]]

    def negatives(self, i: int) -> list[int]:
        return [j for j, x in enumerate(self.ids) if x != self.ids[i]]


def total(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum()


def nce(i: int, c: list[Tensor], s: Tensor, positives: list[int]) -> Tensor:
    """−mean over positives of the log softmax."""
    log_z = torch.log(total([torch.exp(s * x) for x in c]))
    return -total([s * c[j] - log_z for j in positives]) / len(positives)


def compare(settings: dict[str, Any], loop: RowLoop, n: int = 11, rtol: float = 1e-9) -> None:
    """Value and gradients of features and scale are the loop's, plain and in tiles; slots 2 and n − 1 are absent."""
    inputs, ids, extras = jobs.made(n, slice(0, n), seed=3)
    keep = [k for k in range(n) if int(ids[k]) >= 0]
    labels = {k: x[keep].tolist() for k, x in extras.both.items()}
    items = Items([int(ids[k]) for k in keep], labels, extras.b["frozen"][keep])
    for x in inputs:
        x.requires_grad_()
    a, b, scale = inputs
    rows = []
    for x, y in ((a, b), (b, a)):
        for i, k in enumerate(keep):
            cosines = [(x[k] * y[m]).sum() for m in keep]
            rows.append(loop(i, cosines, scale.squeeze(), items))
    want = total(rows) / (2 * len(keep))
    expected = torch.autograd.grad(want, inputs, allow_unused=True)
    for how in ("plain", "tiled"):
        ways = jobs.settings_of(settings, how)
        if ways is None:
            continue
        got = jobs.call(build_loss(Component(**settings, **ways)), a, b, ids, scale, extras).value
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12)
        found = torch.autograd.grad(got, inputs, allow_unused=True)
        for g, w in zip(found, expected, strict=True):
            x = torch.zeros_like(g if w is None else w) if g is None else g
            torch.testing.assert_close(x, torch.zeros_like(x) if w is None else w, rtol=rtol, atol=1e-11)


def value(settings: dict[str, Any], n: int = 12, **changed: Any) -> Tensor:
    """The value of a batch of ``_every_jobs.made`` without shared ids; ``changed``: labels or ``ids`` instead."""
    inputs, ids, extras = jobs.made(n, slice(0, n), seed=5)
    inputs = [x.nan_to_num(0.3) for x in inputs]
    inputs[:2] = [torch.nn.functional.normalize(x, dim=1) for x in inputs[:2]]
    extras.b["frozen"] = torch.nn.functional.normalize(extras.b["frozen"].nan_to_num(0.1), dim=1)
    ids = changed.pop("ids", torch.arange(n))
    extras.both.update(changed)
    return jobs.call(build_loss(Component(**settings)), *inputs[:2], ids, inputs[2], extras).value
