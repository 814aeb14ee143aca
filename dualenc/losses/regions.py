"""Contrast of places in bird's-eye-view maps that belong to regions: CALICO's PRC and RAD (arXiv 2306.00349), and
PointContrast (arXiv 2007.10985) as their control.

Two modalities of a sample (two augmented views of one sweep, or cameras and LiDAR) say what is at the same K places of
the world: ``local`` [B, K, D] features, and ``region`` [B, K]: which object-like cluster a place is in. With q, k the
features of the two sides, s_ij = α q_i·k_j over the places j of the *global* batch, r the regions:

    PLRC_i = −1/|P_i| Σ_{j ∈ P_i} log softmax_j(s_i)          P_i = {j: r_j = r_i}; the softmax is over all places
    RAPC_i = −s_ii + log( e^{s_ii} + Σ_{j: r_j ≠ r_i} e^{s_ij} )
    PRC    = 1/N Σ_i a PLRC_i + (1 − a) RAPC_i                 over the N places in regions
    RAD    = Σ_i w_i NCE_i,  w_i = 1 / (R |r_i|)               cameras against the frozen LiDAR, regions weigh the same
    PointContrast = 1/M Σ_i −log softmax_i(s_i)                over all M places; only the place itself is positive

Places in no region ("poor") are columns only, except in PointContrast. PRC and PointContrast are averaged over the two
directions. RAPC's denominator and RAD's positives (region or place) could not be checked in the paper: both are
settings, and the region is the default, as reviews of the paper describe it.

Rows are local, columns come from every rank; a value is W times this rank's share of the sum, so its mean over ranks is
the loss of the global batch. A sample that is in the batch twice counts as one sample with one set of regions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualenc.config import Section, Share
from dualenc.data.batch import ABSENT
from dualenc.data.driving.places import POOR
from dualenc.distributed.gather import check_equal_shapes, gather, gather_ids
from dualenc.distributed.world import rank, world_size
from dualenc.errors import ConfigError
from dualenc.losses.blockwise.strips import strip_sum
from dualenc.losses.loss import Extras, Loss, LossOutput, losses

_MIX = -7046029254386353131
"""An odd multiplier (2^64 / golden ratio) that spreads region numbers over 64 bits."""
_POSITIVE = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Part:
    """One term of a contrast.

    Attributes:
        weight: in the sum of the parts.
        positive: columns of the row's region (their mean), or the row's own place.
        against: the denominator: all columns, or the positives and the columns of other regions.
    """

    weight: float
    positive: Literal["region", "place"]
    against: Literal["all", "others"] = "all"


def contrast_sum(
    queries: Tensor,
    keys: Tensor,
    parts: list[Part],
    logit_scale: Tensor,
    regions: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor] | None = None,
    weights: Tensor | None = None,
    strip_mb: float | None = 64.0,
) -> Tensor:
    """Σ_i w_i Σ_parts weight · ( log Σ_{denominator} e^{s_ij} − mean_{positives} s_ij ), a scalar.

    Args:
        queries: [n, D] rows; keys: [C, D] columns; all of them take part.
        regions: ([n], [C]) int64; equal numbers are one region.
        places: ([n], [C]) int64, for parts whose positive is the place itself.
        weights: [n] w_i; None: 1.
        strip_mb: MiB of logits held at once.
    """
    row_places, column_places = places if places is not None else regions
    w = queries.new_ones(len(queries)) if weights is None else weights

    def rows_sum(
        q: Tensor, r: Tensor, p: Tensor, w: Tensor, k: Tensor, rk: Tensor, pk: Tensor, scale: Tensor
    ) -> Tensor:
        logits = scale * (q @ k.T)
        same, self_ = r[:, None] == rk[None], p[:, None] == pk[None]
        total = logits.new_zeros(len(q))
        for part in parts:
            positive = same if part.positive == "region" else self_
            inside = logits if part.against == "all" else logits.masked_fill(same & ~positive, -float("inf"))
            share = positive.to(logits.dtype) / positive.sum(1, keepdim=True)
            total = total + part.weight * (torch.logsumexp(inside, 1) - (share * logits).sum(1))
        return (w * total).sum()

    rows = (queries, regions[0], row_places, w)
    return strip_sum(rows_sum, rows, (keys, regions[1], column_places, logit_scale), len(keys), strip_mb)


@dataclass(frozen=True, slots=True)
class Sides:
    """The places that both modalities of a pair have.

    Attributes:
        a, b: [B·K, D] local features.
        region: [B·K] int64, a number for each region of each sample, ``POOR``, ``ABSENT``; place: [B·K] int64, its
            number in the global batch.
        all_region: [W·B·K]; all_place: likewise.
    """

    a: Tensor
    b: Tensor
    region: Tensor
    place: Tensor
    all_region: Tensor
    all_place: Tensor

    @classmethod
    def of(cls, extras: Extras | None, ids: Tensor, name: str) -> Sides:
        """From the extras of a pair; ids: [B] pair ids.

        Raises:
            ConfigError: naming the settings that are missing.
        """
        for side, m in zip((extras.a, extras.b) if extras else (), extras.pair if extras else (), strict=True):
            if "local" not in side or "region" not in side:
                raise ConfigError(
                    f"loss: {name} compares places of bird's-eye-view maps; {m!r} has none: set modalities.{m}.input."
                    f"places and modalities.{m}.encoder.local_dim (of own/pillars or own/lift_splat)"
                )
        assert extras is not None
        a, b = extras.a["local"].float(), extras.b["local"].float()
        check_equal_shapes(a)
        ra, rb = extras.a["region"], extras.b["region"]
        there = (ids >= 0)[:, None] & (ra != ABSENT) & (rb != ABSENT)
        # Region 3 of one sample is not region 3 of another; 63 bits, so that a region's number is never negative.
        named = torch.where(ra >= 0, (ids[:, None] ^ ((ra + 1) * _MIX)) & _POSITIVE, POOR)
        region = torch.where(there, named, ABSENT)
        first = ids.new_tensor(rank() * ra.numel())
        place = first + torch.arange(ra.numel(), device=ra.device)
        flat = region.flatten()
        return cls(a.flatten(0, 1), b.flatten(0, 1), flat, place, gather_ids(flat), gather_ids(place))

    def rows(self, poor: bool = False) -> Tensor:
        """Bool [B·K]: the local places that are rows."""
        return (self.region >= 0) | (poor & (self.region == POOR))

    def columns(self) -> Tensor:
        """Bool [W·B·K]: the places of all ranks."""
        return self.all_region != ABSENT

    def sum(
        self,
        queries: Tensor,
        keys: Tensor,
        parts: list[Part],
        logit_scale: Tensor,
        rows: Tensor,
        weights: Tensor | None = None,
        strip_mb: float | None = 64.0,
    ) -> Tensor:
        """:func:`contrast_sum` of the local rows with ``keys`` [W·B·K, D] of all ranks."""
        c = self.columns()
        return contrast_sum(
            queries[rows],
            keys[c],
            parts,
            logit_scale,
            (self.region[rows], self.all_region[c]),
            (self.place[rows], self.all_place[c]),
            weights,
            strip_mb,
        )

    @torch.no_grad()
    def top1(self, queries: Tensor, keys: Tensor, rows: Tensor, strip: int = 1024) -> Tensor:
        """How many of the rows have a column of their own region as the nearest; [] float."""
        c = self.columns()
        k, rk = keys[c].detach(), self.all_region[c]
        q, r = queries[rows].detach(), self.region[rows]
        hits = [(rk[(q[i : i + strip] @ k.T).argmax(1)] == r[i : i + strip]).sum() for i in range(0, len(q), strip)]
        return torch.stack(hits).sum().to(q.dtype) if hits else q.new_zeros(())


class RegionConfig(Section):
    """Settings that these losses share."""

    strip_mb: Annotated[float, Field(gt=0)] = Field(64.0, description="MiB of logits held at once")


def both_ways(s: Sides, parts: list[Part], logit_scale: Tensor, poor: bool, strip_mb: float) -> LossOutput:
    """The mean of both directions over the rows of the global batch, and how often the nearest has the same region."""
    rows = s.rows(poor)
    found = (s.all_region >= 0).sum().clamp(min=1) / world_size()
    share = s.columns().sum().clamp(min=1) / world_size() if poor else found
    all_a, all_b = gather(s.a), gather(s.b)
    value = s.sum(s.a, all_b, parts, logit_scale, rows, strip_mb=strip_mb)
    value = value + s.sum(s.b, all_a, parts, logit_scale, rows, strip_mb=strip_mb)
    rich = s.rows()
    metrics = {"region_top1_ab": s.top1(s.a, all_b, rich) / found, "region_top1_ba": s.top1(s.b, all_a, rich) / found}
    return LossOutput(value / (2 * share), metrics)


@losses.register("prc")
class PRC(Loss):
    """CALICO's stage 1 on two views of one sweep: ``loss: {name: prc}``; the temperature is ``logit_scale`` (1 / τ).

    Formula: mean_i α·(log Z_i − mean_{same region} s_ij) + (1 − α)·(log(e^{s_ii} + Σ_{other regions} e^{s_ij}) − s_ii)
    Paper: CALICO, arXiv 2306.00349
    Needs: towers that say what is at places (local_dim and input.places), and regions
    """

    takes_extras = True

    class Config(RegionConfig):
        """Settings."""

        alpha: Share = Field(0.5, description="share of PLRC; 1 − alpha: RAPC")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module; a and b, the features of whole sweeps, are not used."""
        alpha = self.config.alpha
        parts = [Part(alpha, "region"), Part(1 - alpha, "place", "others")]
        s = Sides.of(extras, ids, "prc")
        return both_ways(s, [p for p in parts if p.weight], logit_scale, poor=False, strip_mb=self.config.strip_mb)


@losses.register("point_contrast")
class PointContrast(Loss):
    """PointContrast on the same places, regions unused: the control of ``prc``.

    Formula: mean_i log Σ_j e^{s_ij} − s_ii over places
    Paper: PointContrast, arXiv 2007.10985
    Needs: towers that say what is at places (local_dim and input.places)
    """

    takes_extras = True

    Config = RegionConfig

    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module."""
        s = Sides.of(extras, ids, "point_contrast")
        return both_ways(s, [Part(1.0, "place")], logit_scale, poor=True, strip_mb=self.config.strip_mb)


@losses.register("rad")
class RAD(Loss):
    """CALICO's stage 2: the first modality of the pair learns from the second, whose tower is locked.

    Formula: Σ_i w_i (log Z_i − mean_{same region} s_ij), w_i = 1 / (R |r_i|)
    Paper: CALICO, arXiv 2306.00349
    Needs: towers that say what is at places, regions, and a locked second tower
    """

    takes_extras = True

    class Config(RegionConfig):
        """Settings."""

        positive: Literal["region", "place"] = Field(
            default="region", description="what a place is matched with: its region, or the same place"
        )
        against: Literal["all", "others"] = Field(
            default="all", description="the denominator: all places, or the positives and the places of other regions"
        )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See the module."""
        s = Sides.of(extras, ids, "rad")
        keys = gather_ids(s.b.detach())
        rows = s.rows()
        parts = [Part(1.0, self.config.positive, self.config.against)]
        value = s.sum(s.a, keys, parts, logit_scale, rows, region_weights(s), self.config.strip_mb)
        found = (s.all_region >= 0).sum().clamp(min=1) / world_size()
        return LossOutput(world_size() * value, {"region_top1_ab": s.top1(s.a, keys, rows) / found})


def region_weights(s: Sides) -> Tensor:
    """1 / (R |r|) of each local row, [n]: over the global batch they sum to 1, each of its R regions equally."""
    names, sizes = torch.unique(s.all_region[s.all_region >= 0], return_counts=True)
    mine = s.region[s.rows()]
    if not len(names):
        return s.a.new_zeros(0)
    share: Tensor = 1 / (len(names) * sizes[torch.searchsorted(names, mine)]).to(s.a.dtype)
    return share
