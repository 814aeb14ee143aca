"""The phases of a run: when each begins, and what goes on from one to the next.

At the step where a phase begins, the run writes a checkpoint, takes everything down, and resumes from that checkpoint
with the phase's recipe: a run that was killed anywhere does the same, so both have the same samples and parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        total: steps of the whole run; total_samples: the samples of these.
        data_from: the step from which on its batches are counted, after the first ``data_offset`` positions of its
            data's order, which began in the phase ``data_phase``: data that a phase leaves as they are go on where they
            were, also where it changes the batch.
        schedule: the steps over which its learning-rate schedule runs: from the phase that set it to the one that sets
            another, or the end; ``rates``: the samples seen at both.
        samples: seen when it begins.
    """

    number: int
    recipe: Recipe
    start: int
    stop: int
    total: int
    data_from: int
    data_phase: int
    schedule: tuple[int, int]
    samples: int
    total_samples: int
    data_offset: int
    rates: tuple[int, int]

    @classmethod
    def whole(cls, recipe: Recipe, total: int) -> Span:
        """A run of ``total`` steps without phases."""
        samples = total * recipe.batch.size
        return cls(0, recipe, 0, total, total, 0, 0, (0, total), 0, samples, 0, (0, samples))

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
    size, budget = recipe.batch.size, recipe.budget
    per_epoch = 0
    if budget.passes is not None or any(p.in_epochs for p in recipe.phases):
        data = recipe.data
        per_epoch = (
            samples_per_pass(data) if data.batches is None else prepare(data, size, recipe.seed).samples_per_pass
        )
    wanted = budget.samples or int((budget.passes or 0) * per_epoch)  # 0: the budget is in steps
    whole = wanted // size * size if budget.steps is None else budget.steps * size
    starts, seen = [0], [0]
    for k, phase in enumerate(recipe.phases):
        at = int(phase.samples(size, per_epoch, max(whole, size)))
        if phase.in_steps or (phase.in_percent and budget.steps is not None):
            step = at // size
        else:
            step = starts[k] + (at - seen[k]) // recipes[k].batch.size
        if step <= starts[k]:
            after = "the first step" if k == 0 else f"phase {k}, which begins at step {starts[k]:,}"
            raise ConfigError(f"phases.{k}.at: {phase.at!r} is step {step:,} of {size:,} samples, not after {after}")
        seen.append(seen[k] + (step - starts[k]) * recipes[k].batch.size)
        starts.append(step)
    last = recipes[-1].batch.size
    total = max(starts[-1] + (wanted - seen[-1]) // last, 1) if budget.steps is None else budget.steps
    for k, start in enumerate(starts[1:]):
        if start >= total:
            raise ConfigError(
                f"phases.{k}.at: {recipe.phases[k].at!r} is step {start:,}, but the run ends after {total:,} steps of "
                f"{size:,} samples; raise the budget or begin the phase earlier"
            )
    return _spans(recipes, [*starts, total], [*seen, seen[-1] + (total - starts[-1]) * last])


def _spans(recipes: list[Recipe], starts: list[int], seen: list[int]) -> list[Span]:
    """The spans from the steps and samples at which they begin; the end of the run stands last in both."""

    def new(what: Callable[[Recipe], Any]) -> list[int]:
        return [k for k in range(len(recipes)) if k == 0 or what(recipes[k]) != what(recipes[k - 1])]

    new_data, new_rates = new(_order), new(lambda r: r.schedule)
    new_size = sorted({*new_data, *new(lambda r: r.batch.size)})
    spans = []
    for k, one in enumerate(recipes):
        data, size, rate = (max(x for x in found if x <= k) for found in (new_data, new_size, new_rates))
        end = min((x for x in new_rates if x > k), default=len(recipes))
        spans.append(
            Span(
                number=k,
                recipe=one,
                start=starts[k],
                stop=starts[k + 1],
                total=starts[-1],
                data_from=starts[size],
                data_phase=data,
                schedule=(starts[rate], starts[end]),
                samples=seen[k],
                total_samples=seen[-1],
                data_offset=seen[size] - seen[data],
                rates=(seen[rate], seen[end]),
            )
        )
    return spans


def _order(recipe: Recipe) -> dict[str, Any]:
    """What the order of the data depends on; with a batch plan also the size of a batch."""
    found = {k: v for k, v in recipe.data.model_dump(mode="json").items() if k not in NOT_ORDER}
    return found if recipe.data.batches is None else found | {"batch.size": recipe.batch.size}


def span_at(spans: list[Span], step: int) -> Span:
    """The phase in which ``step`` is done; of a finished run the last."""
    return next((s for s in spans if step < s.stop), spans[-1])


def spans_on(recipe: Recipe, ranks: int) -> list[Span] | None:
    """:func:`timeline` of a recipe with phases, whose batches must all divide among the ranks; None without phases.

    Raises:
        ConfigError: naming the phase; and as :func:`timeline`.
    """
    if not recipe.phases:
        return None
    spans = timeline(recipe)
    for span in spans[1:]:
        if (size := span.recipe.batch.size) % ranks:
            raise ConfigError(f"phases.{span.number - 1}.batch.size: {size} must be a multiple of the {ranks} ranks")
    return spans


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
