"""A training step of somebody's own on every rank, with plain DDP and with accelerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dualenc
from dualenc.distributed.world import World

LOSSES = {
    "info_nce": lambda a, b, scale, bias, ids: dualenc.losses.info_nce(a, b, scale, ids),
    "info_nce, its own pairs": lambda a, b, scale, bias, ids: dualenc.losses.info_nce(a, b, scale, label_smoothing=0.1),
    "info_nce, tiled": lambda a, b, scale, bias, ids: dualenc.losses.info_nce(a, b, scale, ids, impl="tiled"),
    "sigmoid": lambda a, b, scale, bias, ids: dualenc.losses.sigmoid(a, b, scale, bias, ids),
    "cwcl": lambda a, b, scale, bias, ids: dualenc.losses.cwcl(a, b, scale, frozen_b=b.detach() + 0.1, ids=ids),
    "mse": lambda a, b, scale, bias, ids: dualenc.losses.mse(a, b, ids),
}
ROWS = 12


class Pair(nn.Module):
    """Two towers and a temperature, as anybody would write them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 8)), nn.Linear(5, 8)
        self.log_scale, self.bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.a(x), self.b(y), self.log_scale.exp(), self.bias.clone()


def data() -> tuple[Tensor, Tensor, Tensor]:
    """A global batch in which rows 1 and 8 (of two ranks) are one pair, and row 5 takes no part."""
    g = torch.Generator().manual_seed(1)
    ids = torch.arange(ROWS)
    ids[8], ids[5] = 1, -1
    return torch.randn(ROWS, 6, generator=g), torch.randn(ROWS, 5, generator=g), ids


def gradients(world: World, name: str, wrapper: str) -> dict[str, Tensor]:
    """The averaged gradients of one step on this rank's rows."""
    x, y, ids = (t.chunk(world.world_size)[world.rank] for t in data())
    net: Any = Pair()
    backward = None
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(net, find_unused_parameters=True) if world.world_size > 1 else net
    else:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        accelerator = Accelerator(
            cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
        )
        wrapped, backward = accelerator.prepare(net), accelerator.backward
    loss = LOSSES[name](*wrapped(x, y), ids)
    backward(loss) if backward is not None else loss.backward()
    return {k: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for k, p in net.named_parameters()}


def all_gradients(world: World, wrapper: str) -> dict[str, dict[str, Tensor]]:
    return {name: gradients(world, name, wrapper) for name in LOSSES}
