"""Losses that compare rows with columns: one function for value and gradient, whatever the number of ranks and tiles.

A loss is a :class:`~dualenc.losses.blockwise.row_loss.RowLoss` for each direction. :func:`contrast` gathers columns
with the project's gather (or sends them around the ring), works on tiles or on the whole matrix, leaves absent slots
out, takes further columns, and divides so that the mean over ranks is the loss of the global batch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualenc.config import Section
from dualenc.data.batch import ABSENT
from dualenc.distributed.gather import check_equal_shapes, gather, gather_ids
from dualenc.distributed.world import world_size
from dualenc.errors import ConfigError, did_you_mean
from dualenc.losses.blockwise.row_loss import RowLoss, Side, Tile, only, reduce_whole
from dualenc.losses.blockwise.row_sums import NO_PAIR, FurtherColumns, SumPlan, tiled_sums
from dualenc.losses.blockwise.sweeps import How, Valid
from dualenc.losses.loss import Extras, Loss, LossOutput, SideName, TiledConfig

__all__ = [
    "NO_PAIR",
    "ContrastConfig",
    "Contrastive",
    "FurtherColumns",
    "contrast",
    "frozen_features",
    "hard_negatives",
    "label",
    "summed",
]


class ContrastConfig(TiledConfig):
    """As :class:`TiledConfig`; tiles are torch's on every device."""

    impl: Literal["auto", "plain", "tiled"] = Field(  # type: ignore[assignment]
        "auto", description="auto: the plain matrix below a global batch of 2048, else tiles"
    )


def contrast(
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    logit_scale: Tensor,
    ab: RowLoss,
    ba: RowLoss | None,
    *,
    values: Mapping[str, Tensor] | None = None,
    row_values: Mapping[str, Tensor] | None = None,
    columns: Sequence[FurtherColumns] = (),
    how: How | None = None,
) -> LossOutput:
    """This rank's share of a loss of rows, for the batch of all ranks.

    Args:
        a, b: [B, D] L2-normalised features of this rank's slots; B is equal on all ranks.
        ids: [B] pair ids: equal ids are positives of each other, −1 takes no part.
        logit_scale: [1].
        ab: the loss of rows of ``a`` against columns of ``b``; ba: the reverse; None: that direction is left out.
        values: name → [B, …] of the slots, without gradient, int64 or floating; the columns' come from all ranks.
        row_values: likewise, of rows only: they stay on this rank, so a row may have as many as there are columns.
        columns: further columns, in the same order on all ranks.
        how: tiled, or None for the whole matrix.

    Returns:
        value = Σ over local valid rows of ℓ (halved where there are two directions) / (valid rows of the global batch /
        W); ``top1_ab``, ``top1_ba``: the share of rows with a positive above every negative; the row losses' metrics.

    Raises:
        ValueError: further columns without a value that the slots have, or ``row_values`` and two directions: in a
            tile of both, rows of the second come from other ranks.
    """
    given = {"values": values, "row_values": row_values}
    found = summed(a, b, ids, logit_scale, ab, ba, **given, columns=columns, how=how)
    share = found.share
    total = found.path
    metrics: dict[str, Tensor] = {}
    of_sides = ((ab, found.of_a, found.hits_a, "ab"), (ba, found.of_b, found.hits_b, "ba"))
    for row_loss, sums, hits, name in of_sides:
        if row_loss is not None:
            of_rows = row_loss.loss(sums.unbind(0), found.rows, logit_scale)
            total = total + torch.where(found.valid, of_rows, 0.0).sum()
            shown = row_loss.metrics(sums.detach().unbind(0), found.rows, logit_scale.detach())
            masked = {k: torch.where(found.valid, x.detach(), 0.0).sum() for k, x in shown.items()}
            metrics |= {f"{k}_{name}": x / share for k, x in masked.items()}
            metrics[f"top1_{name}"] = hits / share
    return LossOutput(total / (share if ba is None else 2 * share), metrics)


@dataclass(frozen=True, slots=True)
class Summed:
    """Sums over all columns, before they become a loss.

    Attributes:
        of_a, of_b: [K, n] of this rank's rows of either side, as the row losses order them; hits_a, hits_b: how many of
            the valid rows have a positive above every negative.
        rows: ids and values of these rows.
        valid: [n], which of them count: the whole matrix has rows of absent slots too, as leaving them out would wait
            for the device.
        share: valid rows of the global batch / W.
    """

    of_a: Tensor
    of_b: Tensor
    hits_a: Tensor
    hits_b: Tensor
    rows: Side
    valid: Tensor
    share: Tensor

    @property
    def path(self) -> Tensor:
        """A zero that runs the backward's collectives on a rank without rows, too."""
        return self.of_a.new_zeros(()) + self.of_a.flatten()[:0].sum() + self.of_b.flatten()[:0].sum()


def summed(
    a: Tensor,
    b: Tensor,
    ids: Tensor,
    logit_scale: Tensor,
    ab: RowLoss,
    ba: RowLoss | None,
    *,
    values: Mapping[str, Tensor] | None = None,
    row_values: Mapping[str, Tensor] | None = None,
    columns: Sequence[FurtherColumns] = (),
    how: How | None = None,
) -> Summed:
    """What :func:`contrast` makes its losses of, for a loss that does more with it; the same arguments."""
    check_equal_shapes(a)
    values, row_values = ({k: x.detach().contiguous() for k, x in (v or {}).items()} for v in (values, row_values))
    if row_values and ba is not None:
        raise ValueError("row_values need ba=None; call contrast once for each direction")
    for extra in columns:
        check_equal_shapes(extra.x)
        if lacking := [k for k in values if k not in extra.values]:
            raise ValueError(f"further columns have no {lacking[0]!r}, which this loss reads of every column")
    plan, further = SumPlan(ids, values, ab, ba, tuple(columns), row_values), [extra.x for extra in columns]
    all_ids = gather_ids(ids)
    share = (all_ids >= 0).sum().clamp(min=1).to(a.dtype) / world_size()
    if how is None:
        valid = ids >= 0
        first = _StandIn.of(all_ids, {k: gather_ids(x) for k, x in values.items()})
        of_a, hits_a = _whole(a, b, logit_scale, plan, "b", first)
        of_b, hits_b = _whole(b, a, logit_scale, plan, "a", first)
        rows = first.rows(valid, plan)
    else:
        of_a, of_b, hits_a, hits_b = tiled_sums(a, b, logit_scale, plan, how, further)
        chosen = Valid(ids)
        rows = Side(chosen.of(ids), {k: chosen.of(x) for k, x in {**values, **row_values}.items()})
        valid = rows.ids >= 0
    return Summed(of_a, of_b, hits_a, hits_b, rows, valid, share)


class Contrastive(Loss):
    """A loss of a recipe that is a row loss for each direction: a subclass says which, and which values they read."""

    Config: ClassVar[type[Section]] = ContrastConfig
    takes_extras = True

    config: Any
    """Of the subclass's own ``Config``."""

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__()
        self.config = config

    def gathers(self, global_batch: int, device: torch.device) -> Collection[SideName]:
        """As ``impl`` and ``columns`` say."""
        found: Collection[SideName] = self.config.gathers(global_batch, device)
        return found

    @abstractmethod
    def directions(self, inputs: RowInputs) -> tuple[RowLoss, RowLoss | None]:
        """The row losses of a → b and of b → a, for one batch."""

    def values(self, inputs: RowInputs) -> Mapping[str, Tensor]:
        """What tiles read of slots: the labels of ``needs``."""
        return {name: label(inputs.extras, name) for name in self.needs}

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        ids: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        extras: Extras | None = None,
    ) -> LossOutput:
        """See :func:`contrast`; ``logit_bias`` is ignored, as it adds the same to all logits of a row."""
        how = self.config.choose(len(a) * world_size(), a.device)
        inputs = RowInputs(a, b, ids, logit_scale, extras)
        values, columns = self.values(inputs), hard_negatives(extras, ids)
        if columns:
            columns = [replace(x, values=self.values_of_columns(values, len(x.ids))) for x in columns]
        row_losses = self.directions(inputs)
        return contrast(a, b, ids, logit_scale, *row_losses, values=values, columns=columns, how=how)

    def values_of_columns(self, values: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        """``values`` of n further columns: they have no label.

        Raises:
            ConfigError: the loss reads embeddings by a frozen encoder, which they lack.
        """
        if frozen := [k for k in values if k.startswith(FROZEN)]:
            raise ConfigError(
                f"loss: it compares items in a locked tower ({frozen[0]}), and hard negatives have no such embedding; "
                "leave out input.negatives, or use a loss that needs no locked tower"
            )
        return {k: nothing(x, n) for k, x in values.items()}


@dataclass(frozen=True, slots=True)
class RowInputs:
    """What a loss was called with."""

    a: Tensor
    b: Tensor
    ids: Tensor
    logit_scale: Tensor
    extras: Extras | None


def label(extras: Extras | None, name: str) -> Tensor:
    """The label ``name`` of every slot, [B] or [B, width].

    Raises:
        ConfigError: the batch has none.
    """
    if extras is None or name not in extras.both:
        known = [] if extras is None else list(extras.both)
        hint = did_you_mean(name, known) if known else f"Name one: data.sources.N.values: {{{name}: json:{name}}}"
        raise ConfigError(f"loss: the batch has no label {name!r}. {hint}")
    return extras.both[name]


FROZEN = "frozen_"
"""What the names of embeddings by a frozen encoder begin with."""


def nothing(like: Tensor, n: int) -> Tensor:
    """A value of n columns that lack it."""
    return like.new_full((n, *like.shape[1:]), math.nan if like.is_floating_point() else ABSENT)


def hard_negatives(extras: Extras | None, ids: Tensor) -> list[FurtherColumns]:
    """The further columns that the samples bring: ``negatives`` [B, K, D] of either side, features of wrong items.

    ``negatives_there`` [B, K], if it is given, is 0 for one that a sample lacks. Those of a slot that takes no part are
    not there either.
    """
    out = []
    sides: list[tuple[Literal["a", "b"], dict[str, Tensor]]]
    sides = [] if extras is None else [("a", extras.a), ("b", extras.b)]
    for side, found in sides:
        if "negatives" in found:
            x = found["negatives"]
            there = (ids >= 0)[:, None].expand(x.shape[:2])
            if "negatives_there" in found:
                there = there & (found["negatives_there"] > 0)
            out.append(FurtherColumns(x.flatten(0, 1), torch.where(there, NO_PAIR, ABSENT).flatten(), side))
    return out


def frozen_features(extras: Extras | None, what: str) -> dict[str, Tensor]:
    """The embeddings [B, W] by the pair's frozen encoders, as ``frozen_a`` and ``frozen_b``, those that there are.

    Raises:
        ConfigError: neither tower is locked; ``what`` names the loss.
    """
    found = {} if extras is None else {f"{FROZEN}{n}": side for n, side in (("a", extras.a), ("b", extras.b))}
    out = {name: side["frozen"] for name, side in found.items() if "frozen" in side}
    if not out:
        raise ConfigError(
            f"loss: {what} compares items in a locked tower, and neither tower of this pair is locked: "
            "set modalities.NAME.lock: true for one of them"
        )
    return out


@dataclass(frozen=True, slots=True)
class _StandIn:
    """All ranks' slots, and the first that takes part: it stands in for those that do not, whose sums are then masked.

    So the sizes of all tensors are known without waiting for the device, and no number made of an absent slot can be
    infinite or NaN. In a batch without any slot that takes part, slot 0 stands in.

    Attributes:
        ids: [N]; values: name → [N, …]; at: [1] the slot; own: name → [1, …] its values.
    """

    ids: Tensor
    values: Mapping[str, Tensor]
    at: Tensor
    own: Mapping[str, Tensor]

    @classmethod
    def of(cls, ids: Tensor, values: Mapping[str, Tensor]) -> _StandIn:
        at = (ids >= 0).to(torch.uint8).argmax(0, keepdim=True)
        found = (ids >= 0)[at]
        # Of no value where nothing takes part: a label of slot 0 may then be NaN.
        own = {k: torch.where(_like(found, x), x[at], torch.zeros_like(x[at])) for k, x in values.items()}
        return cls(ids, values, at, own)

    def rows(self, valid: Tensor, plan: SumPlan) -> Side:
        """This rank's slots."""
        ids = torch.where(valid, plan.ids, self.ids[self.at].clamp(min=0))
        own = {k: torch.where(_like(valid, x), x, self.own[k]) for k, x in plan.values.items()}
        return Side(ids, own | {k: x.masked_fill(_like(~valid, x), 0) for k, x in plan.row_values.items()})


def _like(mask: Tensor, x: Tensor) -> Tensor:
    """A mask [n] in the shape of x [n, …]."""
    return mask.view(-1, *[1] * (x.ndim - 1))


def _whole(x: Tensor, y: Tensor, scale: Tensor, plan: SumPlan, side: str, slots: _StandIn) -> tuple[Tensor, Tensor]:
    """The sums [K, B] of rows of ``x`` against all columns of ``side``, at once and by autograd, and the hits. The sums
    of rows that take no part are those of some other row."""
    row_loss = plan.ab if side == "b" else plan.ba
    features, ids = [gather(y)], [slots.ids]
    values = {k: [v] for k, v in slots.values.items()}
    for extra in plan.columns:
        if extra.side == side:
            features.append(extra.x.detach() if extra.shared else gather(extra.x))
            ids.append(extra.ids if extra.shared else gather_ids(extra.ids))
            for k, parts in values.items():
                parts.append(extra.values[k] if extra.shared else gather_ids(extra.values[k]))
    valid, every, all_ids = plan.ids >= 0, torch.cat(features), torch.cat(ids)
    if row_loss is None:
        return x.new_zeros(0, len(x)) + 0 * every[:0].sum(), x.new_zeros(())
    number = torch.arange(len(all_ids), device=all_ids.device)
    there = (all_ids >= 0) | (number == slots.at)
    pick = torch.where(there, number, slots.at)
    rows = torch.where(valid[:, None], x, every.detach()[slots.at])
    logits = scale * (rows @ every.index_select(0, pick).T)
    taken = {
        k: torch.where(_like(there & (all_ids >= 0), x := torch.cat(v)), x, slots.own[k]) for k, v in values.items()
    }
    columns = Side(all_ids.clamp(min=0)[pick], taken)
    tile = Tile(logits, scale, slots.rows(valid, plan), columns)
    sums = torch.stack([reduce_whole(only(r, there)) for r in row_loss.sums(tile) if r is not None])
    seen = logits.detach()
    best = [seen.masked_fill(m | ~there, -float("inf")).amax(1) for m in (~tile.positive, tile.positive)]
    return sums, ((best[0] > best[1]) & valid).sum().to(seen.dtype)
