"""Global contrastive losses: what a row meets in one batch stands for all samples, through a running mean per sample
(SogCLR, arXiv 2202.12387; iSogCLR, arXiv 2305.11965; FastCLIP, arXiv 2407.01445).

For a row i with positives P(i), in either direction, d_ij = a_i·b_j − mean_{p ∈ P(i)} a_i·b_p and

    g_i = mean_{j ∉ P(i)} exp(d_ij / τ),    u_i ← (1 − γ) u_i + γ g_i,    L_i = c · log(ε + u_i) + …

u_i is kept for every sample of the data, so the mean is over many batches; the gradient is that of g_i, divided by
ε + u_i. They differ in τ and c:

    sogclr         τ of the recipe, not trained                c = τ
    isogclr        τ_i of each sample and side, by momentum    c = τ_i, + ρ τ_i
    fastclip v0    τ learned                                   c = 1
             v1    τ of the recipe, not trained                c = 1
             v2    τ_i of each sample and side, by Adam        c = τ_i, + ρ τ_i
             v3    τ learned                                   c = τ,   + ρ τ

With γ = 1, ε = 1/(n − 1) and c = 1 the gradient is CLIP's, with ε = 0 it is DCL's. A τ_i grows for rows with many near
negatives (its gradient is ρ − KL(softmax ‖ uniform) where u = g) and falls to its floor for all where ρ > log of the
number of negatives that u has seen: below log(n − 1) with γ near 1, below log M for a long memory.

What the releases do differently: u starts at 0, which multiplies the gradient of a first visit by 1/γ (here u_i = g_i
then); FastCLIP counts the implicit part of its temperature's gradient twice (here it is the objective's gradient);
exponentials can overflow (here u is kept as its logarithm); the logged loss is a constant (here it is the objective's
estimate). γ falls over samples seen, not by epochs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualenc.config import Share, pair_name
from dualenc.distributed.world import world_size
from dualenc.errors import ConfigError
from dualenc.losses.blockwise.row_loss import INF, Kind, LogSumExp, Mean, Reduction, RowLoss, Side, Sum, Tile
from dualenc.losses.blockwise.sweeps import Valid
from dualenc.losses.contrast import ContrastConfig, hard_negatives, nothing, summed
from dualenc.losses.loss import Extras, Loss, LossOutput, losses
from dualenc.memory import LossState, RunShape, SampleBuffer

Temperature = Literal["fixed", "learned", "momentum", "adam"]
SIDES = ("a", "b")
FIRST, SECOND, TINY = 0.9, 0.98, 1e-8
"""Adam's decays and ε, for the temperatures of single samples."""


@dataclass(frozen=True, slots=True)
class LogGap(RowLoss):
    """log g_i of the rows of one side.

    Attributes:
        inverse: the value of the slots that holds 1/τ_i; None: the scale is 1/τ. With it the last sum is what the
            gradient of τ_i needs.
    """

    inverse: str | None = None

    @property
    def kinds(self) -> Sequence[Kind]:
        """See the base class."""
        return [LogSumExp, Sum, Sum, Sum, *([] if self.inverse is None else [Mean])]

    def sums(self, tile: Tile) -> Sequence[Reduction | None]:
        """See the base class."""
        z = tile.logits if self.inverse is None else tile.cosine * tile.pair(self.inverse)[0]
        negative = z.masked_fill(tile.positive, -INF)
        out: list[Reduction | None] = [LogSumExp(negative), Sum(torch.where(tile.positive, z, 0.0)), None, None]
        if not tile.backward:
            out[2:] = [Sum(tile.positive.to(z.dtype)), Sum((~tile.positive).to(z.dtype))]
        if self.inverse is not None:
            out.append(None if tile.backward else Mean(tile.cosine.detach(), negative.detach()))
        return out

    def loss(self, sums: Sequence[Tensor], rows: Side, scale: Tensor) -> Tensor:
        """log g_i [n]; −inf for a row without negatives, and no gradient there."""
        negatives, own, count, others = sums[:4]
        alone = negatives.isneginf()
        found = negatives.masked_fill(alone, 0.0) - own / count - others.clamp(min=1).log()
        return found.masked_fill(alone, -INF)


class GlobalConfig(ContrastConfig):
    """Settings of every global contrastive loss."""

    gamma: Annotated[float, Field(gt=0, le=1)] = Field(0.8, description="γ: weight of this batch in a sample's mean")
    gamma_decay_samples: Annotated[int, Field(ge=0)] = Field(
        0, description="γ falls from 1 to its value along half a cosine over this many samples; 0: constant"
    )
    epsilon: Annotated[float, Field(ge=0)] = Field(1e-14, description="ε: added to the mean in the denominator")


class TemperatureConfig(GlobalConfig):
    """With a temperature for every sample and side."""

    rho: Annotated[float, Field(ge=0)] = Field(6.0, description="ρ: cost of a high temperature; a larger ρ lowers them")
    tau: Annotated[float, Field(gt=0)] = Field(0.01, description="temperature of a sample before it is first seen")
    tau_min: Annotated[float, Field(gt=0)] = Field(0.005, description="lower bound of a temperature")
    tau_max: Annotated[float, Field(gt=0)] = Field(1.0, description="upper bound of a temperature")
    tau_lr: Annotated[float, Field(gt=0)] = Field(0.03, description="step size of the temperatures")
    tau_momentum: Share = Field(0.1, description="weight of earlier gradients of a temperature (momentum)")
    tau_clip: Annotated[float, Field(gt=0)] = Field(5.0, description="bound of a temperature's gradient")


class GlobalContrast(Loss):
    """The family; a subclass says how its temperature works.

    Attributes:
        temperature: see the module; weighted: whether c is τ; rho: ρ.
    """

    takes_extras = True
    Config: ClassVar[type[Any]] = GlobalConfig
    temperature: Temperature = "fixed"
    weighted: bool = True
    rho: float = 0.0

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.samples: dict[str, SampleBuffer] = {}

    @property
    def single(self) -> bool:
        """Whether every sample has temperatures of its own."""
        return self.temperature in ("momentum", "adam")

    def memory(self, run: RunShape) -> Mapping[str, LossState]:
        """For every pair and side log u of each sample; with single temperatures, these and their moments."""
        fields = {"log_u": -INF}
        if self.single:
            fields |= {"tau": self.config.tau, "first": 0.0}
        if self.temperature == "adam":
            fields |= {"second": 0.0, "visits": 0.0}
        both = {f"{name}_{side}": start for side in SIDES for name, start in fields.items()}
        self.samples = {pair_name(pair): SampleBuffer(both, run) for pair in run.pairs}
        return {f"samples/{pair}": buffer for pair, buffer in self.samples.items()}

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; ``logit_bias`` is ignored."""
        pair = "" if extras is None else pair_name(extras.pair)
        if extras is None or extras.numbers is None or pair not in self.samples:
            raise ConfigError(
                f"loss: {type(self).__name__} keeps numbers for every sample, so it needs the samples' numbers and a "
                "memory: dualenc train gives it both; in a loop of your own call loss.memory(…) once and give "
                "Extras.numbers"
            )
        there, c = ids >= 0, self.config
        kept = self.samples[pair].read(extras.numbers, there)
        values = {f"inverse_{s}": 1 / kept[f"tau_{s}"].clamp(min=c.tau_min) for s in SIDES} if self.single else {}
        values = {k: x.to(a.dtype) for k, x in values.items()}
        of = {s: LogGap(f"inverse_{s}" if self.single else None) for s in SIDES}
        scale = logit_scale if self.temperature == "learned" else logit_scale.detach()
        how = c.choose(len(a) * world_size(), a.device)
        columns = [
            replace(x, values={k: nothing(v, len(x.ids)) for k, v in values.items()})
            for x in hard_negatives(extras, ids)
        ]
        found = summed(a, b, ids, scale, of["a"], of["b"], values=values, columns=columns, how=how)
        tiled = None if how is None else Valid(ids)  # tiles leave absent slots out; the whole matrix has a row for each
        gamma, total = self.gamma(extras.samples_seen(len(ids))), found.path
        new: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for s, sums, name in (("a", found.of_a, "ab"), ("b", found.of_b, "ba")):
            side = SideRows(
                {k: x if tiled is None else tiled.of(x) for k in self._fields() for x in (kept[f"{k}_{s}"],)},
                found.rows.values.get(f"inverse_{s}"),
            )
            log_g = of[s].loss(sums.unbind(0), found.rows, scale)
            value, update, shown = self.rows(log_g, sums.detach(), scale, side, gamma)
            total = total + torch.where(found.valid, value, 0.0).sum()
            new |= {f"{k}_{s}": x if tiled is None else tiled.spread(x, len(ids)) for k, x in update.items()}
            masked = {k: torch.where(found.valid, x.detach(), 0.0).sum() for k, x in shown.items()}
            metrics |= {f"{k}_{name}": x / found.share for k, x in masked.items()}
        metrics |= {"top1_ab": found.hits_a / found.share, "top1_ba": found.hits_b / found.share}
        self.samples[pair].propose(extras.numbers, there, new)
        return LossOutput(total / (2 * found.share), metrics)

    def rows(
        self, log_g: Tensor, sums: Tensor, scale: Tensor, side: SideRows, gamma: float
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Of n rows of one side: their loss with the gradient of the module, what is to be kept, and what is shown."""
        g, before = log_g.detach(), side.kept["log_u"].to(log_g.dtype)
        log_u = torch.where(before.isneginf(), g, mixed(before, g, gamma))
        log_u = torch.where(g.isneginf(), before, log_u)
        eps = log_u.new_tensor(math.log(self.config.epsilon) if self.config.epsilon else -INF)
        log_eu = torch.logaddexp(log_u, eps)
        alone = log_u.isneginf()
        log_eu = log_eu.masked_fill(alone, 0.0)
        tau = 1 / (scale if side.inverse is None else side.inverse)
        ratio = (g - log_eu).exp().masked_fill(alone, 0.0)
        weight = ratio * tau.detach() if self.weighted else ratio
        implicit = weight * log_g.masked_fill(g.isneginf(), 0.0)
        value = (tau * (log_eu + self.rho) if self.weighted else log_eu).masked_fill(alone, 0.0)
        update, shown = {"log_u": log_u}, {"log_u": log_eu}
        if self.single:
            far = sums[4] - sums[1] / sums[2] * tau  # the mean of d_ij over row i's softmax
            gradient = (log_eu + self.rho - ratio * far / tau).masked_fill(alone, 0.0)
            update |= self.step(gradient, side.kept)
            shown["tau"] = tau
        return value + implicit - implicit.detach(), update, shown

    def step(self, gradient: Tensor, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Temperatures and their moments after one step on [n] gradients."""
        c = self.config
        gradient = gradient.clamp(-c.tau_clip, c.tau_clip)
        first = kept["first"].to(gradient.dtype)
        if self.temperature == "momentum":
            first = c.tau_momentum * first + (1 - c.tau_momentum) * gradient
            more, direction = {"first": first}, first
        else:
            visits = kept["visits"].to(gradient.dtype) + 1
            first = FIRST * first + (1 - FIRST) * gradient
            second = SECOND * kept["second"].to(gradient.dtype) + (1 - SECOND) * gradient**2
            root = (second / (1 - SECOND**visits)).sqrt()
            direction = first / (1 - FIRST**visits) / (root + TINY)
            more = {"first": first, "second": second, "visits": visits}
        return {"tau": (kept["tau"].to(gradient.dtype) - c.tau_lr * direction).clamp(c.tau_min, c.tau_max), **more}

    def gamma(self, seen: int) -> float:
        """γ after ``seen`` samples."""
        c = self.config
        done = min(seen / c.gamma_decay_samples, 1.0) if c.gamma_decay_samples else 1.0
        return float(c.gamma + 0.5 * (1 + math.cos(math.pi * done)) * (1 - c.gamma))

    def _fields(self) -> list[str]:
        """What is kept of each side."""
        single = {"momentum": ["tau", "first"], "adam": ["tau", "first", "second", "visits"]}
        return ["log_u", *single.get(self.temperature, [])]


@dataclass(frozen=True, slots=True)
class SideRows:
    """What is known of n rows of one side: ``kept`` [n] by name, and ``inverse`` 1/τ_i, None: one for all."""

    kept: Mapping[str, Tensor]
    inverse: Tensor | None


def mixed(before: Tensor, now: Tensor, gamma: float) -> Tensor:
    """log((1 − γ) exp(before) + γ exp(now))."""
    if gamma == 1:
        return now
    return torch.logaddexp(before + math.log1p(-gamma), now + math.log(gamma))


@losses.register("sogclr")
class SogCLR(GlobalContrast):
    """Global contrast with a running mean per sample, at the recipe's temperature, which is not trained.

    Formula: τ·log(ε + u_i), u_i ← (1−γ)·u_i + γ·mean_{j≠i} exp((a_i·b_j − a_i·b_i)/τ)
    Paper: SogCLR, arXiv 2202.12387
    Needs: nothing; it keeps two numbers for every sample and pair
    """

    class Config(GlobalConfig):
        """Settings."""


@losses.register("isogclr")
class ISogCLR(GlobalContrast):
    """Global contrast with a running mean and a temperature for every sample.

    Formula: τ_i·log(ε + u_i) + ρ·τ_i, τ_i by momentum, u_i as in sogclr
    Paper: iSogCLR, arXiv 2305.11965
    Needs: nothing; it keeps six numbers for every sample and pair
    """

    temperature = "momentum"

    class Config(TemperatureConfig):
        """Settings."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.rho = config.rho


@losses.register("fastclip")
class FastCLIP(GlobalContrast):
    """Global contrast with a running mean per sample and a temperature that is learned, constant, or each sample's.

    Formula: v3: τ·log(ε + u_i) + ρ·τ; v0, v1: log(ε + u_i); v2: τ_i·log(ε + u_i) + ρ·τ_i; u_i as in sogclr
    Paper: FastCLIP, arXiv 2407.01445
    Needs: nothing; it keeps two numbers for every sample and pair, v2 ten
    """

    class Config(TemperatureConfig):
        """Settings."""

        version: Literal["v0", "v1", "v2", "v3"] = Field("v3", description="how the temperature works")
        gamma: Annotated[float, Field(gt=0, le=1)] = Field(
            0.2, description="γ: weight of this batch in a sample's mean"
        )
        rho: Annotated[float, Field(ge=0)] = Field(
            6.5, description="ρ of v2 and v3: a larger one lowers the temperature"
        )
        tau: Annotated[float, Field(gt=0)] = Field(
            0.03, description="v2: temperature of a sample before it is first seen"
        )
        tau_min: Annotated[float, Field(gt=0)] = Field(0.01, description="v2: lower bound of a temperature")
        tau_lr: Annotated[float, Field(gt=0)] = Field(0.0133, description="v2: Adam's step size")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        kinds: dict[str, Temperature] = {"v0": "learned", "v1": "fixed", "v2": "adam", "v3": "learned"}
        self.temperature = kinds[config.version]
        self.weighted = config.version in ("v2", "v3")
        self.rho = config.rho if self.weighted else 0.0
