"""AutoTCL (Zheng et al. 2024, arXiv 2402.10434): a series and a view of it that a small network learns to make.

    v = a(x) ⊙ h(x) ⊙ x,    h ∈ {0, 1} for each time (hard concrete, straight through), a ∈ (0, 1) for each value

h parts the series into what informs and what is noise. The tower minimises InfoNCE of x and v. The network minimises an
upper bound of their mutual information, leave-one-out, with the tower as it is,

    U = mean_i [ s_ii − log mean_{j≠i} exp s_ij ] + w · max(0, mean h − keep) + w_s · mean |h_t − h_{t−1}|,   s = cos/τ

so it takes away what the tower need not see to tell series apart. The release trains the network every few epochs and
adds a contrast of windows within a series, which is left out here. ``held_back``: the order of MCLRec (SIGIR 2023), in
which the network learns from the tower after its step. The view is a modality that ``shares`` the series' tower; the
loader's rows of it are replaced before the step. What is random in h is a function of (step, sample, time).

Memory: network, its two moments and a copy of the tower, whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dualenc.config import Positive
from dualenc.distributed.gather import all_sum, total
from dualenc.distributed.world import world_size
from dualenc.errors import ConfigError
from dualenc.losses.dcl import DCL
from dualenc.losses.info_nce import InfoNCE
from dualenc.losses.loss import losses
from dualenc.memory import LearnedView, ViewMaker

TEMPERATURE, STRETCH = 2 / 3, (-0.1, 1.1)
"""Of the hard-concrete distribution (Louizos et al. 2018, arXiv 1712.01312)."""


class Factors(ViewMaker):
    """Two convolutions over time that say h and a of ``{"values": [n, C, T], "length": [n]}``.

    The numbers about a row are the mean of h and of |h_t − h_{t−1}| over its times.
    """

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        super().__init__()
        self.inner = nn.Conv1d(channels, width, kernel, padding=kernel // 2)
        self.outer = nn.Conv1d(width, 1 + channels, kernel, padding=kernel // 2)
        nn.init.constant_(self.outer.bias, 2.0)  # type: ignore[arg-type]  # most is kept at first

    def forward(self, rows: Any, numbers: Tensor, step: int) -> tuple[Any, Tensor]:
        """See the class."""
        x = rows["values"]
        real = (torch.arange(x.shape[2], device=x.device)[None] < rows["length"][:, None])[:, None].to(x.dtype)
        said = self.outer(torch.relu(self.inner(x)) * real).to(x.dtype)
        keep = hard_concrete(said[:, :1], uniform(step, numbers, x.shape[2]).to(x.dtype)[:, None]) * real
        view = said[:, 1:].sigmoid() * keep * x
        times = real.sum((1, 2)).clamp(min=1)
        jumps = ((keep[..., 1:] - keep[..., :-1]).abs() * real[..., 1:]).sum((1, 2)) / times
        return {**rows, "values": view}, torch.stack([keep.sum((1, 2)) / times, jumps], 1)


def hard_concrete(logit: Tensor, u: Tensor) -> Tensor:
    """0 or 1 where ``u`` in (0, 1) falls, with the gradient of the stretched concrete distribution."""
    low, high = STRETCH
    soft = (((u / (1 - u)).log() + logit) / TEMPERATURE).sigmoid() * (high - low) + low
    soft = soft.clamp(0, 1)
    return (soft.detach() > 0.5).to(soft.dtype) + (soft - soft.detach())  # in this order exactly 0 or 1


def uniform(step: int, numbers: Tensor, times: int) -> Tensor:
    """[n, times] in (0, 1), float64: a function of the step, the sample's number and the time alone."""
    t = torch.arange(times, device=numbers.device)
    x = _mixed(numbers + _mixed(torch.full_like(numbers, step)))[:, None] + t * _ODD
    return ((_mixed(x) >> 11 & ((1 << 52) - 1)).double() + 0.5) / (1 << 52)


_ODD = -0x61C8864680B583EB  # 2^64 / golden ratio as a signed number


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer, modulo 2^64, on signed numbers."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift & ((1 << (64 - shift)) - 1))) * factor
    return x ^ (x >> 31 & ((1 << 33) - 1))


@losses.register("autotcl")
class AutoTCL(InfoNCE):
    """InfoNCE with a view of a series that a small network learns to make.

    Formula: NCE(x, a ⊙ h ⊙ x), h and a of a network that minimises a bound of the mutual information
    Paper: AutoTCL, Zheng et al. 2024, arXiv 2402.10434
    Needs: a modality that shares the series' tower, and the pair of both
    """

    class Config(InfoNCE.Config):
        """Settings."""

        of: str = Field("series", description="modality whose rows the view is made of")
        into: str = Field("view", description="modality that is the view; it shares the tower of the other")
        width: Positive = Field(16, description="hidden channels of the network")
        kernel: Positive = Field(5, description="times that each of its convolutions sees; odd")
        tau: Annotated[float, Field(gt=0)] = Field(0.1, description="temperature of the network's objective")
        keep: Annotated[float, Field(ge=0, le=1)] = Field(0.4, description="share of times kept at no cost")
        keep_weight: Annotated[float, Field(ge=0)] = Field(1e-3, description="cost of keeping more")
        smooth_weight: Annotated[float, Field(ge=0)] = Field(1e-3, description="cost of a mask that changes often")
        lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="of the network's own Adam")
        every: Positive = Field(2, description="the network is trained on every so many steps")
        held_back: bool = Field(False, description="it learns from the tower after the step (MCLRec), not before it")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.kernel % 2 == 0:
            raise ConfigError(f"loss.kernel: {config.kernel} must be odd; use {config.kernel + 1}")
        self.names_pairs = ((config.of, config.into),)
        self.apart = DCL(DCL.Config.model_validate({"scale_by": "nothing"}))

    def views(self, pairs: Sequence[tuple[str, str]]) -> Mapping[str, LearnedView]:
        """The view."""
        c = self.config
        return {"factors": LearnedView(c.of, c.into, self._network, self.bound, c.lr, c.every, c.held_back)}

    def _network(self, rows: Any) -> ViewMaker:
        if not isinstance(rows, Mapping) or "values" not in rows or "length" not in rows:
            raise ConfigError(f"loss.of: {self.config.of!r} is not a modality of kind series; autotcl needs one")
        return Factors(rows["values"].shape[1], self.config.width, self.config.kernel)

    def bound(self, a: Tensor, b: Tensor, ids: Tensor, about: Tensor) -> Tensor:
        """What the network minimises; see :class:`dualenc.memory.LearnedView`."""
        c, there = self.config, ids >= 0
        scale = a.new_full((1,), 1 / c.tau)
        count = all_sum(there.sum().to(a.dtype)).clamp(min=1)
        kept, jumps = (torch.where(there, x, 0.0).sum() for x in about.unbind(1))
        too_much = torch.relu(total(kept[None]).squeeze() / count - c.keep)
        smooth = jumps / count * world_size()
        return -self.apart(a, b, ids, scale).value + c.keep_weight * too_much + c.smooth_weight * smooth
