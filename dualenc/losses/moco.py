"""InfoNCE against the keys of slow towers and a queue of earlier ones (MoCo, arXiv 1911.05722; Contriever,
arXiv 2112.09118), for any pair of modalities.

For the row q = a_i and the keys k of slow copies of the towers (:mod:`dualenc.memory.slow`), in both directions

    ℓ_i = −s·q·k_i + log( exp(s·q·k_i) + Σ_{j in batch, j ≠ i} exp(s·q·k_j) + Σ_{j in queue} exp(s·q·k_j) )

The queue holds the newest keys of the other side, in the order of the global batch, so it does not depend on the number
of ranks. No gradient reaches a key. ``in_batch: false`` leaves the second sum out: MoCo's and Contriever's form, in
which the keys of one batch are not each other's negatives. ``queue: 0`` without the queue is InfoNCE against a momentum
encoder, as Abbaspourazad et al. 2024 (arXiv 2312.05409) train on two segments of one participant. Two views of one
modality are a pair like any other (``modalities.NAME.shares``).

A queued key of the row's own pair id (its sample was seen a few batches ago) is neither positive nor negative.

``domains`` gives each domain or language a queue of its own, and a row meets keys of its own domain only (CCP,
Lee et al.): rare ones are not washed out by frequent ones. A row of a domain that is not listed has no queue.

``mix`` adds MoCHi's mixtures (arXiv 2010.01028, :mod:`dualenc.losses.mochi`) of the hardest keys in batch and queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dualenc.config import Section, pair_name
from dualenc.data.batch import ABSENT
from dualenc.data.values import stable_id
from dualenc.distributed.gather import gather_ids
from dualenc.distributed.world import world_size
from dualenc.errors import ConfigError
from dualenc.losses.blockwise.row_loss import INF, Side, Tile
from dualenc.losses.contrast import ContrastConfig, FurtherColumns, contrast, hard_negatives, label
from dualenc.losses.loss import Extras, Loss, LossOutput, losses
from dualenc.losses.mochi import mixtures
from dualenc.losses.targets import SoftTarget, Targets
from dualenc.memory import KeyQueue, LossState, RunShape, SlowTowers

KEYS, QUEUED, LANE = "keys", "queued", "lane"


class BatchPair(Targets):
    """T = 1 at keys of the batch with the row's pair id."""

    def __call__(self, tile: Tile) -> Tensor:
        """See the base class."""
        return (tile.positive & ~queued(tile)).to(tile.logits.dtype)


@dataclass(frozen=True, slots=True)
class AgainstKeys(SoftTarget):
    """The loss of the module for one direction.

    Attributes:
        own: [B, S] logits of further negatives of each of this rank's rows, −inf: none; None: no such.
        ids: [B], the rows' pair ids, with ``own``.
    """

    own: Tensor | None = None
    ids: Tensor | None = None

    def loss(self, sums: Sequence[Tensor], rows: Side, scale: Tensor) -> Tensor:
        """See the base class."""
        if self.own is None or self.ids is None:
            return SoftTarget.loss(self, sums, rows, scale)
        own = self.own if len(self.own) == len(sums[0]) else self.own[self.ids >= 0]  # tiles leave absent rows out
        denominator = torch.logsumexp(torch.cat([sums[0][:, None], own], 1), 1)
        return SoftTarget.loss(self, [denominator, *sums[1:]], rows, scale)


def queued(tile: Tile) -> Tensor:
    """Bool [1, w]: which columns are of the queue."""
    return tile.pair(QUEUED)[1] > 0


def against(in_batch: bool, lanes: bool) -> Any:
    """The logits of the denominator: without stale keys of the row's own pair, keys of other domains and, unless
    ``in_batch``, the other keys of the batch."""

    def push(tile: Tile) -> Tensor:
        out = tile.positive & queued(tile)
        if not in_batch:
            out = out | ~(tile.positive | queued(tile))
        if lanes:
            own, other = tile.pair(LANE)
            out = out | (own != other) & ~tile.positive
        return tile.logits.masked_fill(out, -INF)

    return push


class Mix(Section):
    """MoCHi's mixtures of the hardest keys."""

    hardest: Annotated[int, Field(ge=1)] = Field(32, description="N_h: hardest keys of each row, which are mixed")
    between: Annotated[int, Field(ge=0)] = Field(16, description="mixtures of two keys per row")
    towards: Annotated[int, Field(ge=0)] = Field(0, description="mixtures of a key with the row itself, per row")


class AgainstSlowTowers(Loss):
    """What losses against keys of slow towers keep: the towers, and queues of their keys."""

    takes_extras = True

    config: Any
    """With ``queue``, keys of each side, and ``decay`` of the slow towers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.queues: dict[str, tuple[KeyQueue, KeyQueue]] = {}

    @property
    def queue_lanes(self) -> int:
        """Queues of each side."""
        return 1

    def memory(self, run: RunShape) -> Mapping[str, LossState]:
        """A queue for each side of each pair."""
        if not self.config.queue:
            return {}
        self.queues = queues_of(run, self.config.queue, self.queue_lanes)
        return by_side(self.queues)

    def slow(self, pairs: Sequence[tuple[str, str]]) -> Mapping[str, SlowTowers]:
        """One slow copy of the pairs' towers."""
        modalities = tuple(dict.fromkeys(m for pair in pairs for m in pair))
        return {KEYS: SlowTowers(self.config.decay, {KEYS: "features"}, modalities)}


@losses.register("moco")
class MoCo(AgainstSlowTowers):
    """InfoNCE against keys of slow towers and a queue of earlier ones.

    Formula: −s·a_i·k_i + log Σ_{j in batch and queue} exp(s·a_i·k_j), k from towers φ ← d·φ + (1−d)·θ
    Paper: MoCo, arXiv 1911.05722; Contriever, arXiv 2112.09118; CCP; MoCHi, arXiv 2010.01028
    Needs: a value with the domain, if domains are listed
    """

    class Config(ContrastConfig):
        """Settings."""

        queue: Annotated[int, Field(ge=0)] = Field(4096, description="keys kept for each side (and domain); 0: none")
        decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="d: decay of the slow towers per step")
        in_batch: bool = Field(True, description="other keys of the batch are negatives; MoCo, Contriever: false")
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
            0.0, description="ε: share of the target spread over all keys of a row"
        )
        domains: list[str | int] = Field(
            default_factory=list, description="values of `label` with a queue of their own; default: one queue for all"
        )
        label: str = Field("domain", description="the value (data.sources.N.values) that names a sample's domain")
        mix: Mix | None = Field(default=None, description="MoCHi's mixtures of the hardest keys; default: none")

        @model_validator(mode="after")
        def _one_way(self) -> Self:
            if self.mix is not None and self.domains:
                raise ValueError("mix takes the hardest keys of all domains; leave out mix or domains")
            return self

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.needs = (config.label,) if config.domains else ()

    @property
    def queue_lanes(self) -> int:
        """A queue for each domain."""
        return max(len(self.config.domains), 1)

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
        keys_a, keys_b = keys_of(extras, "moco")
        assert extras is not None
        lane = self.lanes(extras) if self.config.domains else None
        queues = self.queues.get(pair_name(extras.pair), (None, None))
        value, metrics = logit_scale.new_zeros(()), {}
        for k, (rows, keys, queue, name) in enumerate(((a, keys_b, queues[1], "ab"), (b, keys_a, queues[0], "ba"))):
            wrong = wrong_items(extras, ids, name[1], lane)
            out = self.direction(rows, keys, ids, logit_scale, queue, lane, k + extras.step, wrong)
            value = value + out.value / 2
            metrics[f"top1_{name}"] = out.metrics["top1_ab"]
        for keys, queue in zip((keys_a, keys_b), queues, strict=True):
            if queue is not None:
                queue.propose(keys, ids, lane)
        return LossOutput(value, metrics)

    def direction(
        self,
        rows: Tensor,
        keys: Tensor,
        ids: Tensor,
        scale: Tensor,
        queue: KeyQueue | None,
        lane: Tensor | None,
        salt: int,
        wrong: Sequence[FurtherColumns] = (),
    ) -> LossOutput:
        """Rows [B, D] against the keys [B, D] of all ranks, those of the queue, and ``wrong`` items of samples."""
        c = self.config
        values = {QUEUED: torch.zeros_like(ids), **({} if lane is None else {LANE: lane})}
        columns = [*wrong, *([] if queue is None else [columns_of(queue, lanes=lane is not None)])]
        own = None if c.mix is None else scale * self.mixed(rows, keys, ids, queue, salt)
        push = against(c.in_batch, lane is not None)
        row_loss = AgainstKeys(BatchPair(), push=push, smoothing=c.label_smoothing, own=own, ids=ids)
        how = c.choose(len(rows) * world_size(), rows.device)
        return contrast(rows, keys, ids, scale, row_loss, None, values=values, columns=columns, how=how)

    def mixed(self, rows: Tensor, keys: Tensor, ids: Tensor, queue: KeyQueue | None, salt: int) -> Tensor:
        """Cosines [B, S] of this rank's rows with mixtures of their hardest keys."""
        mix, all_ids = self.config.mix, gather_ids(ids)
        assert mix is not None
        found = [(gather_ids(keys), all_ids)] if self.config.in_batch or queue is None else []
        if queue is not None:
            found.append((queue.keys.to(rows.dtype), queue.ids))
        columns, column_ids = (torch.cat(x) for x in zip(*found, strict=True))
        rows, sizes = torch.where((ids >= 0)[:, None], rows, 0.0), (mix.hardest, mix.between, mix.towards)
        strip = self.config.tile_mb or 8.0
        return mixtures(rows, ids, columns, column_ids, all_ids.sum() + salt, sizes, strip)

    def lanes(self, extras: Extras) -> Tensor:
        """[B]: which of the domains each slot is of, −1 for none of them."""
        said = label(extras, self.config.label)
        known = [stable_id(x) if isinstance(x, str) else x for x in self.config.domains]
        is_lane = said[:, None] == torch.tensor(known, device=said.device)
        return torch.where(is_lane.any(1), is_lane.int().argmax(1), ABSENT)


def keys_of(extras: Extras | None, name: str) -> tuple[Tensor, Tensor]:
    """What the slow towers say of both sides, [B, D] each.

    Raises:
        ConfigError: nobody keeps slow towers for this loss.
    """
    if extras is None or KEYS not in extras.a or KEYS not in extras.b:
        raise ConfigError(
            f"loss: {name} needs the keys of slow towers: dualenc train keeps them; in a loop of your own give "
            "Extras.a['keys'] and Extras.b['keys']"
        )
    return extras.a[KEYS], extras.b[KEYS]


def wrong_items(extras: Extras, ids: Tensor, of: str, lane: Tensor | None = None) -> list[FurtherColumns]:
    """The hard negatives that samples bring for side ``of``, for rows of the other side; of their samples' domains."""
    out = []
    for x in hard_negatives(extras, ids):
        if x.side == of:
            values = {QUEUED: torch.ones_like(x.ids)}
            if lane is not None:
                values[LANE] = lane.repeat_interleave(len(x.ids) // len(ids))
            out.append(replace(x, side="b", values=values))
    return out


def queues_of(run: RunShape, capacity: int, lanes: int = 1) -> dict[str, tuple[KeyQueue, KeyQueue]]:
    """Pair → the queues of its first and second side."""
    return {pair_name(p): (KeyQueue(capacity, run, lanes), KeyQueue(capacity, run, lanes)) for p in run.pairs}


def by_side(queues: Mapping[str, tuple[KeyQueue, KeyQueue]]) -> dict[str, LossState]:
    """The queues by a name for each."""
    return {f"queue/{pair}/{side}": q for pair, both in queues.items() for side, q in zip("ab", both, strict=True)}


def columns_of(queue: KeyQueue, side: Any = "b", lanes: bool = False) -> FurtherColumns:
    """A queue as further columns: the same on every rank, without gradient."""
    values = {QUEUED: torch.ones_like(queue.ids), **({LANE: queue.lane} if lanes else {})}
    return FurtherColumns(queue.keys, queue.ids, side, values, shared=True)
