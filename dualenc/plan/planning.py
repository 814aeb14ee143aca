"""``dualenc plan``: what a step of a recipe needs on each rank under each engine, and which of them to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from dualenc.config import Recipe
from dualenc.errors import ConfigError
from dualenc.losses import build_loss
from dualenc.plan.activations import Timeline, timeline
from dualenc.plan.engine_memory import DDP, FP32, FSDP2, KINDS, ONE, ZERO, EngineKind, holding
from dualenc.plan.loss_memory import bytes_per_sample, loss_bytes, remembered
from dualenc.plan.weights import Weights, count
from dualenc.plan.wire import Wire, wire

RESERVE = 0.1
"""Share of a device's memory that is not planned: CUDA's context, NCCL's buffers, fragments of the allocator."""
MICROS = 6
"""How many micro-batches are planned: the rank's whole batch, its half, its quarter …"""
PREFERRED = (ONE, DDP, FSDP2, ZERO[2], ZERO[1], ZERO[3], ZERO[0])
"""Engines for the same micro-batch, the one to take first: least traffic, then no further dependency."""


@dataclass(frozen=True, slots=True)
class Need:
    """What one rank needs at the moment of a step when it needs most, in bytes.

    Attributes:
        kind, micro: the engine, and how many slots are encoded at a time.
        moment: forward and backward, loss, or optimizer.
        parameters, gradients, optimizer: weights and buffers; complete gradients; moments, masters and an average.
        activations: with the batch and the temporaries of the operators.
        features: those that GradCache stores, and their gradients.
        loss: gathered features and logits, and what the loss remembers from step to step.
        working: buckets and gathered weights.
        wire: bytes sent.
    """

    kind: EngineKind
    micro: int
    moment: str
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    features: float
    loss: float
    working: float
    wire: Wire

    @property
    def total(self) -> float:
        """All of it."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.features
            + self.loss
            + self.working
        )


@dataclass(frozen=True, slots=True)
class Planned:
    """What was planned for a recipe.

    Attributes:
        memory: bytes of a device; ``usable`` of them are planned.
        needs: for each engine and micro-batch.
        host: bytes of batches that the data workers hold ready, on one machine.
        chosen: the one to take; None if none fits.
        helps: changes of the recipe with which something fits, and what then does.
        notes: what is not in the numbers.
    """

    recipe: Recipe
    ranks: int
    memory: float
    weights: Weights
    needs: list[Need]
    host: float
    chosen: Need | None
    helps: list[tuple[str, Need]]
    notes: list[str]

    @property
    def usable(self) -> float:
        """Bytes that a rank may need."""
        return (1 - RESERVE) * self.memory

    def fits(self, need: Need) -> bool:
        """Whether a device holds it."""
        return need.total <= self.usable

    @property
    def nearest(self) -> Need:
        """What needs least."""
        return min(self.needs, key=lambda n: n.total)


def plan(
    recipe: Recipe, ranks: int, memory: float, ranks_per_node: int = 8, kinds: Sequence[EngineKind] | None = None
) -> Planned:
    """Plan a recipe for ``ranks`` devices of ``memory`` bytes.

    Args:
        kinds: the engines to plan; default: all that the recipe can run under on so many ranks.

    Raises:
        ConfigError: the global batch cannot be dealt out to so many ranks; or as building the run's model does.
    """
    if recipe.batch.size % ranks:
        raise ConfigError(f"batch.size ({recipe.batch.size}) must be a multiple of the {ranks} ranks.")
    shard = recipe.engine.shard_size
    if shard is not None and ranks % shard:
        raise ConfigError(f"engine.shard_size: {ranks} ranks cannot be parted into groups of {shard}; use a divisor")
    when, model = timeline(recipe)
    weights = count(model)
    kinds = kinds_for(recipe, ranks) if kinds is None else kinds
    needs = needs_of(recipe, ranks, when, weights, kinds)
    usable = (1 - RESERVE) * memory
    chosen = best(needs, usable)
    helps = [] if chosen is not None else _what_helps(recipe, ranks, usable)
    local = recipe.batch.size // ranks
    ahead = max(recipe.data.workers * recipe.data.prefetch, 1) + 1
    host = float(ahead * local * when.batch * min(ranks, ranks_per_node))
    return Planned(recipe, ranks, memory, weights, needs, host, chosen, helps, _notes(recipe, when))


def micros(local: int) -> list[int]:
    """The rank's whole batch, and halves of it."""
    found = [local]
    while len(found) < MICROS and found[-1] > 1:
        found.append(-(-found[-1] // 2))
    return found


def kinds_for(recipe: Recipe, ranks: int) -> list[EngineKind]:
    """The engines that the recipe can run under on so many ranks."""
    kinds = [k for k in KINDS if k.sharded == (ranks > 1)]
    return [k for k in kinds if k not in ZERO] if recipe.optim.name == "muon" else kinds  # DeepSpeed cuts matrices


def needs_of(recipe: Recipe, ranks: int, when: Timeline, weights: Weights, kinds: Sequence[EngineKind]) -> list[Need]:
    """What each engine needs, for each micro-batch."""
    local = recipe.batch.size // ranks
    cuda = recipe.engine.device != "cpu"
    loss = loss_bytes(recipe, local, ranks, torch.device("cuda" if cuda else "cpu"))
    kept = remembered(recipe, ranks)
    return [need_of(k, micro, recipe, ranks, when, weights, loss, kept, cuda) for k in kinds for micro in micros(local)]


def need_of(
    kind: EngineKind,
    micro: int,
    recipe: Recipe,
    ranks: int,
    when: Timeline,
    weights: Weights,
    loss: float,
    remembered: float,
    cuda: bool,
) -> Need:
    """What a rank needs under one engine: at the worst of three moments.

    Args:
        loss: bytes at its peak; remembered: bytes that it keeps from step to step.
    """
    local = recipe.batch.size // ranks
    chunks = -(-local // micro)
    chunked = chunks > 1
    held = holding(kind, weights, recipe.optim, ranks, chunked, cuda, recipe.engine.shard_size)
    batch = float(local * when.batch)
    features = 2.0 * FP32 * local * when.features if chunked else 0.0
    sent = wire(kind, weights, recipe, ranks, chunks)
    run = when.peak(micro, held.gradients) - when.peak(micro, lambda done: 0 * done)
    activations = when.peak(micro, lambda done: 0 * done)
    if chunked:
        batch += micro * when.batch
    at_loss = 0.0 if chunked else when.after_forward(local)
    none = float(held.gradients(np.zeros(1))[0]) if not chunked else 0.0
    moments = [
        ("forward and backward", max(run, 0.0), activations + batch, features, 0.0, held.working),
        ("loss", none, at_loss + batch, features, loss, held.working),
        ("optimizer", held.stepping, batch, features / 2, 0.0, 0.0),
    ]
    name, gradients, acts, kept, logits, working = max(moments, key=lambda m: sum(m[1:]))
    return Need(
        kind,
        micro,
        name,
        held.parameters,
        gradients,
        held.optimizer + held.average,
        acts,
        kept,
        logits + remembered,
        working,
        sent,
    )


def best(needs: Sequence[Need], usable: float) -> Need | None:
    """Of those that fit, the largest micro-batch; of equals, the first of ``PREFERRED``."""
    fitting = [n for n in needs if n.total <= usable]
    return min(fitting, key=lambda n: (-n.micro, PREFERRED.index(n.kind)), default=None)


def _what_helps(recipe: Recipe, ranks: int, usable: float) -> list[tuple[str, Need]]:
    """Settings of the engine, one more after the other, until something fits."""
    changes: dict[str, object] = {}
    said: list[str] = []
    for key, value in (("precision", "bf16"), ("grad_checkpointing", True)):
        if getattr(recipe.engine, key) == value:
            continue
        changes[key] = value
        said.append(f"engine.{key}={str(value).lower()}")
        changed = recipe.model_copy(update={"engine": recipe.engine.model_copy(update=changes)})
        when, model = timeline(changed)
        found = best(needs_of(changed, ranks, when, count(model), kinds_for(changed, ranks)), usable)
        if found is not None:
            return [(" ".join(said), found)]
    return []


def _notes(recipe: Recipe, when: Timeline) -> list[str]:
    out = []
    if recipe.distill is not None and recipe.distill.teachers:
        out.append("Teachers are not in these numbers: an online teacher adds its own weights and activations.")
    if each := bytes_per_sample(recipe):
        out.append(
            f"The loss keeps {each:,.0f} bytes for every sample of the data, divided among the ranks. They are not in "
            "these numbers; train --dry-run, which reads how many samples there are, prints them."
        )
    if build_loss(recipe.loss).views(recipe.pairs):
        out.append("Networks that learn to make views are not in these numbers: train --dry-run prints their size.")
    if recipe.engine.compile:
        out.append("Planned without torch.compile, which keeps fewer activations than the operators do one by one.")
    if when.real:
        out.append("This model was run on the CPU to be measured, as the shapes in it depend on values.")
    if recipe.engine.offload_optimizer or recipe.engine.offload_params:
        out.append("Planned without offloading: the optimizer and weights are counted on the device.")
    return out


def as_json(planned: Planned) -> dict[str, object]:
    """Everything that was planned, bytes and keys."""

    def row(need: Need) -> dict[str, object]:
        out = asdict(need)
        out["wire"] = {**asdict(need.wire), "total": need.wire.total}
        return {
            **{k: v if k in ("micro", "moment", "wire") else round(v) for k, v in out.items() if k != "kind"},
            "engine": need.kind.name,
            "total": round(need.total),
            "fits": planned.fits(need),
            "keys": keys_of(need, planned),
        }

    return {
        "recipe": planned.recipe.name,
        "ranks": planned.ranks,
        "memory": round(planned.memory),
        "usable": round(planned.usable),
        "parameters": planned.weights.total,
        "trained": planned.weights.trained,
        "host": round(planned.host),
        "plans": [row(n) for n in planned.needs],
        "recommended": None if planned.chosen is None else row(planned.chosen),
        "helps": [{"keys": said.split(), **row(n)} for said, n in planned.helps],
        "notes": planned.notes,
    }


def keys_of(need: Need, planned: Planned) -> list[str]:
    """What to write in the recipe."""
    local = planned.recipe.batch.size // planned.ranks
    shards = [] if need.kind is FSDP2 or planned.recipe.engine.shard_size is None else ["engine.shard_size=null"]
    return [*need.kind.keys, *shards, f"batch.micro={'null' if need.micro >= local else need.micro}"]
