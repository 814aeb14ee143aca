"""What a run's loss remembers: built from the loss, handed to it before a step, kept after it, saved and restored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dualenc.checkpoint.ranges import Piece, Stored
from dualenc.config import Recipe
from dualenc.data.batch import Batch
from dualenc.encoders import DualEncoder
from dualenc.engine import held
from dualenc.errors import ConfigError, did_you_mean
from dualenc.losses import Loss
from dualenc.losses.objective import to_slots
from dualenc.memory import LossState, RunShape, SlowModel
from dualenc.model import Bundle
from dualenc.model.bundle import seeded
from dualenc.train.learned_views import ViewLearner

SLOW, VIEWS = "slow", "views"


def slow_models(loss: Loss, model: DualEncoder, device: torch.device | str) -> dict[str, SlowModel]:
    """The slow copies that a loss asks for; call it before an engine cuts the model, on every rank."""
    return {name: SlowModel(model, asked, device) for name, asked in loss.slow(model.pairs).items()}


def view_learners(loss: Loss, bundle: Bundle, device: torch.device | str, seed: int) -> dict[str, ViewLearner]:
    """The networks of the views that a loss asks for; call it as :func:`slow_models`.

    Raises:
        ConfigError: a modality that the model does not have, or that another one's tower does not encode.
    """
    out = {}
    for name, asked in loss.views(bundle.model.pairs).items():
        for m in (asked.of, asked.into):
            if m not in bundle.inputs:
                raise ConfigError(f"loss: there is no modality {m!r}. {did_you_mean(m, bundle.inputs)}")
        inputs = bundle.inputs[asked.of]
        with seeded(seed, VIEWS, name):
            out[name] = ViewLearner(asked, bundle.model, inputs.collate([inputs.dummy(), inputs.dummy()]), device)
    return out


class Memory:
    """The state of a run's loss.

    Args:
        loss: as the recipe has it; it is told to begin, and keeps its own hold of its states.
        slow: from :func:`slow_models`.
        run: what sizes depend on.
        micro: rows that slow copies encode at once.
        bf16: slow copies run under autocast, as the model does.
        views: from :func:`view_learners`.
    """

    def __init__(
        self,
        loss: Loss,
        slow: Mapping[str, SlowModel],
        run: RunShape,
        micro: int | None = None,
        bf16: bool = False,
        views: Mapping[str, ViewLearner] | None = None,
    ) -> None:
        self.states: dict[str, LossState] = dict(loss.memory(run))
        self.slow, self.micro, self.bf16 = dict(slow), micro, bf16
        self.views = dict(views or {})
        self._batch: Batch | None = None

    def __bool__(self) -> bool:
        return bool(self.states or self.slow or self.views)

    def recall(self, batch: Batch, module: nn.Module | None = None) -> Batch:
        """The batch with the views that are made of it, and what the slow copies say of it, by slot, among its extras;
        call it before a step.

        Args:
            module: the engine's; learned views need it.
        """
        for view in self.views.values():
            if view.due(batch.step, held_back=False):
                if module is None:
                    raise RuntimeError("learned views are trained with the engine's module; give it to recall")
                view.train(batch, whole_weights(module), self.micro, self.bf16)
            batch = view.make(batch, self.micro)
        self._batch = batch if self.views else None
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
        for view in self.views.values():
            if self._batch is not None and view.due(self._batch.step, held_back=True):
                view.train(self._batch, whole_weights(module), self.micro, self.bf16)
        self._batch = None
        if self.slow:
            weights = whole_weights(module)
            for copied in self.slow.values():
                copied.follow(weights, skipped)

    def begin(self, module: nn.Module) -> None:
        """Start slow copies from the weights that an engine's module has now."""
        if self.slow:
            weights = whole_weights(module)
            for copied in self.slow.values():
                copied.start(weights)

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

    def _all(self) -> dict[str, LossState | SlowModel | ViewLearner]:
        slow, views = (
            {f"{room}/{name}": x for name, x in found.items()}
            for room, found in ((SLOW, self.slow), (VIEWS, self.views))
        )
        return {**self.states, **slow, **views}

    def bytes(self) -> dict[str, int]:
        """On this rank, by name."""
        return {name: x.bytes() for name, x in self._all().items()}


def whole_weights(module: nn.Module) -> Callable[[str], Tensor]:
    """A name of an engine's module → the whole tensor, however the engine cut it. All ranks ask for the same ones in
    turn."""
    weights = module.state_dict(keep_vars=True)
    return lambda name: held.full(weights[name], held.local(weights[name]))


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


def memory_lines(loss: Loss, bundle: Bundle, samples: int, ranks: int) -> Sequence[str]:
    """For a person: what a loss remembers and how many bytes of it each of ``ranks`` ranks holds; nothing is built."""
    model = bundle.model
    states = loss.memory(RunShape(bundle.embed_dim, model.pairs, samples, 0, ranks, "meta"))
    sizes = {name: (x.bytes(), x.cut) for name, x in states.items()}
    sizes |= {f"{SLOW}/{k}": (x.bytes(), False) for k, x in slow_models(loss, model, "meta").items()}
    sizes |= {f"{VIEWS}/{k}": (x.bytes(), False) for k, x in view_learners(loss, bundle, "meta", 0).items()}
    return [
        f"the loss keeps {name} in every checkpoint: {_size(size)} on each of {ranks} rank(s), "
        f"{'a part on each' if cut else 'the same on all'}"
        for name, (size, cut) in sizes.items()
    ]


def _size(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB" if n >= 2**20 else f"{n / 2**10:,.1f} KiB"
