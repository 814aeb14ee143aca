"""What a run's loss remembers: built from the loss, handed to it before a step, kept after it, saved and restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dualenc.checkpoint.ranges import Piece, Stored
from dualenc.config import Recipe
from dualenc.data.batch import Batch
from dualenc.encoders import DualEncoder
from dualenc.engine import held
from dualenc.losses import Loss
from dualenc.losses.objective import to_slots
from dualenc.memory import LossState, RunShape, SlowModel

SLOW = "slow"


def slow_models(loss: Loss, model: DualEncoder, device: torch.device | str) -> dict[str, SlowModel]:
    """The slow copies that a loss asks for; call it before an engine cuts the model, on every rank."""
    return {name: SlowModel(model, asked, device) for name, asked in loss.slow(model.pairs).items()}


class Memory:
    """The state of a run's loss.

    Args:
        loss: as the recipe has it; it is told to begin, and keeps its own hold of its states.
        slow: from :func:`slow_models`.
        run: what sizes depend on.
        micro: rows that slow copies encode at once.
        bf16: slow copies run under autocast, as the model does.
    """

    def __init__(
        self,
        loss: Loss,
        slow: Mapping[str, SlowModel],
        run: RunShape,
        micro: int | None = None,
        bf16: bool = False,
    ) -> None:
        self.states: dict[str, LossState] = dict(loss.memory(run))
        self.slow, self.micro, self.bf16 = dict(slow), micro, bf16

    def __bool__(self) -> bool:
        return bool(self.states or self.slow)

    def recall(self, batch: Batch) -> Batch:
        """The batch with what the slow copies say of it, by slot, among its extras; call it before a step."""
        if not self.slow:
            return batch
        extras = dict(batch.extras)
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=self.bf16):
            found = [x for copied in self.slow.values() for x in copied.rows(batch, self.micro).items()]
        for name, rows in found:
            extras[name] = {m: to_slots(x, batch.rows[m], batch.size) for m, x in rows.items()}
        return replace(batch, extras=extras)

    def keep(self, module: nn.Module, skipped: Tensor) -> None:
        """After an engine's step: slow copies follow ``module``, and states take over what the loss proposed.

        Args:
            module: the engine's.
            skipped: a scalar bool on the device: the step changed nothing, so nothing is changed here either. It is not
                read by the host.
        """
        for state in self.states.values():
            state.commit(skipped)
        if self.slow:
            weights = module.state_dict(keep_vars=True)
            for copied in self.slow.values():
                copied.follow(lambda name: held.full(weights[name], held.local(weights[name])), skipped)

    def begin(self, module: nn.Module) -> None:
        """Start slow copies from the weights that an engine's module has now."""
        if self.slow:
            weights = module.state_dict(keep_vars=True)
            for copied in self.slow.values():
                copied.start(lambda name: held.full(weights[name], held.local(weights[name])))

    def pieces(self, rank: int, ranks: int) -> list[Piece]:
        """What this rank writes."""
        return [p for name, x in self._all().items() for p in x.pieces(name, rank, ranks)]

    def load(self, saved: Stored) -> None:
        """Set what any number of ranks saved; each reads its own part.

        Raises:
            CheckpointError: naming what is missing or has another shape.
        """
        for name, x in self._all().items():
            x.load(name, saved)

    def _all(self) -> dict[str, LossState | SlowModel]:
        return {**self.states, **{f"{SLOW}/{name}": x for name, x in self.slow.items()}}

    def bytes(self) -> dict[str, int]:
        """On this rank, by name."""
        return {name: x.bytes() for name, x in self._all().items()}


def goes_on(before: Recipe, now: Recipe) -> bool:
    """Whether what the loss of one phase keeps is kept in the next: the same loss on the same samples and towers."""
    towers = [{m: part.encoder for m, part in r.modalities.items()} for r in (before, now)]
    same = (before.loss, before.pairs, before.embed_dim, before.data.sources) == (
        now.loss,
        now.pairs,
        now.embed_dim,
        now.data.sources,
    )
    return same and towers[0] == towers[1]


def memory_lines(loss: Loss, model: DualEncoder, samples: int, dim: int, ranks: int) -> Sequence[str]:
    """For a person: what a loss remembers and how many bytes of it each of ``ranks`` ranks holds; nothing is built."""
    states = loss.memory(RunShape(dim, model.pairs, samples, 0, ranks, "meta"))
    sizes = {name: (x.bytes(), x.cut) for name, x in states.items()}
    sizes |= {f"{SLOW}/{k}": (x.bytes(), False) for k, x in slow_models(loss, model, "meta").items()}
    return [
        f"the loss keeps {name} in every checkpoint: {_size(size)} on each of {ranks} rank(s), "
        f"{'a part on each' if cut else 'the same on all'}"
        for name, (size, cut) in sizes.items()
    ]


def _size(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB" if n >= 2**20 else f"{n / 2**10:,.1f} KiB"
