"""The phases of a run: when each begins, and what goes on from one to the next.

At the step where a phase begins, the run writes a checkpoint, takes everything down, and resumes from that checkpoint
with the phase's recipe: a run that was killed anywhere does the same, so both have the same samples and parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualenc.config import Recipe, phase_recipes
from dualenc.data.batches import prepare
from dualenc.data.shards.index import samples_per_pass
from dualenc.errors import ConfigError
from dualenc.model import build_bundle
from dualenc.model.carry import check_fits
from dualenc.seeds import derive_seed

NOT_ORDER = (
    "workers", "prefetch", "retries", "connect_s", "idle_s", "allow_pipe", "max_bad_share", "cache_dir", "cache_gb",
    "stall_s",
)  # fmt: skip
"""Keys of ``data`` that say how samples are read, not which."""


@dataclass(frozen=True)
class Span:
    """One phase of a run; a run without phases is one span.

    Attributes:
        number: 0 is the recipe itself, k the k-th entry of ``phases`` counted from 1.
        recipe: what is trained in it.
        start, stop: its steps are start … stop − 1.
        total: steps of the whole run.
        data_from: the step at which its data's order began, and ``data_phase`` the phase: data that a phase leaves as
            they are go on where they were.
        schedule: the steps over which its learning-rate schedule runs: from the phase that set it to the one that sets
            another, or the end.
    """

    number: int
    recipe: Recipe
    start: int
    stop: int
    total: int
    data_from: int
    data_phase: int
    schedule: tuple[int, int]

    @property
    def data_seed(self) -> int:
        """Of order and augmentation: data that begin in a phase are drawn anew."""
        return self.recipe.seed if self.data_phase == 0 else derive_seed(self.recipe.seed, "phase", self.data_phase)


def timeline(recipe: Recipe) -> list[Span]:
    """The spans of a recipe with phases, in order.

    Raises:
        ConfigError: phases that do not follow each other within the run.
        DataError: the data must be counted and are not there.
    """
    recipes = phase_recipes(recipe)
    size = recipe.batch.size
    budget = recipe.budget
    per_epoch = 0
    if budget.passes is not None or any(p.in_epochs for p in recipe.phases):
        data = recipe.data
        per_epoch = (
            samples_per_pass(data) if data.batches is None else prepare(data, size, recipe.seed).samples_per_pass
        )
    if budget.steps is not None:
        total = budget.steps
    else:
        total = max((budget.samples or int((budget.passes or 0) * per_epoch)) // size, 1)
    starts = [0, *(int(p.samples(size, per_epoch, total * size)) // size for p in recipe.phases)]
    for k in range(1, len(starts)):
        at = recipe.phases[k - 1].at
        if starts[k] <= starts[k - 1]:
            after = "the first step" if k == 1 else f"phase {k - 1}, which begins at step {starts[k - 1]:,}"
            raise ConfigError(f"phases.{k - 1}.at: {at!r} is step {starts[k]:,} of {size:,} samples, not after {after}")
        if starts[k] >= total:
            raise ConfigError(
                f"phases.{k - 1}.at: {at!r} is step {starts[k]:,}, but the run ends after {total:,} steps of {size:,} "
                "samples; raise the budget or begin the phase earlier"
            )
    return _spans(recipes, [*starts, total])


def _spans(recipes: list[Recipe], starts: list[int]) -> list[Span]:
    total = starts[-1]
    new_data = [k for k in range(len(recipes)) if k == 0 or _order(recipes[k]) != _order(recipes[k - 1])]
    new_rates = [k for k in range(len(recipes)) if k == 0 or recipes[k].schedule != recipes[k - 1].schedule]
    spans = []
    for k, one in enumerate(recipes):
        data, rate = max(x for x in new_data if x <= k), max(x for x in new_rates if x <= k)
        ends = starts[min((x for x in new_rates if x > k), default=len(recipes))]
        spans.append(Span(k, one, starts[k], starts[k + 1], total, starts[data], data, (starts[rate], ends)))
    return spans


def _order(recipe: Recipe) -> dict[str, Any]:
    return {k: v for k, v in recipe.data.model_dump(mode="json").items() if k not in NOT_ORDER}


def span_at(spans: list[Span], step: int) -> Span:
    """The phase in which ``step`` is done; of a finished run the last."""
    return next((s for s in spans if step < s.stop), spans[-1])


def refuse_engine(recipe: Recipe) -> None:
    """Refuse phases that unlock weights where the optimizer keeps one step count for all of them.

    Raises:
        ConfigError: naming phase and engine.
    """
    engine = recipe.engine
    if engine.kind != "deepspeed" or engine.zero_stage == 0:
        return
    for number, phase in enumerate(recipe.phases):
        parts = phase.changes.get("modalities", {})
        for m, part in parts.items() if isinstance(parts, Mapping) else ():
            if isinstance(part, Mapping) and "lock" in part:
                raise ConfigError(
                    f"phases.{number}.modalities.{m}.lock: DeepSpeed's ZeRO {engine.zero_stage} counts the steps of "
                    "all weights together, so weights that are unlocked later cannot begin at zero; use engine.kind: "
                    "accelerate (parallel: fsdp2 shards as ZeRO 3 does) or zero_stage: 0"
                )


def refuse_newcomers(recipe: Recipe, number: int, new: set[str]) -> None:
    """As :func:`refuse_engine`, once it is known which trained weights have no optimizer state yet.

    Raises:
        ConfigError: naming one of them.
    """
    if new and recipe.engine.kind == "deepspeed" and recipe.engine.zero_stage > 0:
        raise ConfigError(
            f"phases.{number - 1}: {min(new)} begins to be trained here or has another shape, and DeepSpeed's ZeRO "
            f"{recipe.engine.zero_stage} counts the steps of all weights together; use engine.kind: accelerate or "
            "zero_stage: 0"
        )


def check_models(recipe: Recipe) -> list[tuple[int, int]]:
    """Build the model of every phase, one after the other, and see that its weights can go on from the one before.

    Returns:
        (parameters, trained parameters) of each.

    Raises:
        ConfigError, CheckpointError: a model cannot be built, or a tensor cannot go on in another shape.
    """
    before: dict[str, tuple[int, ...]] = {}
    out = []
    for one in phase_recipes(recipe):
        model = build_bundle(one).model
        now = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        for name, shape in now.items() if before else ():
            check_fits(name, before.get(name), shape)
        before = now
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        out.append((sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)))
    return out
