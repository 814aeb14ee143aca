"""What can be checked before anything large is built: settings of a recipe's components, and what it points to."""

from __future__ import annotations

from pathlib import Path

from dualenc.config import Recipe, phase_recipes
from dualenc.data.batches import chosen_batches
from dualenc.data.batches.composed import check_sampling
from dualenc.data.plans import chosen
from dualenc.distributed.devices import check_device
from dualenc.encoders.released.find_released import FORMS, find_released
from dualenc.errors import CheckpointError, ConfigError, DataError, DualencError, did_you_mean
from dualenc.losses import build_loss, check_loss
from dualenc.model.load import model_folder
from dualenc.train.phases import check_models, refuse_engine, timeline


def check_recipe(recipe: Recipe) -> None:
    """Build what is small and look up what is named; the run itself would find the same errors, only later.

    Raises:
        ConfigError: an unknown loss, term or plan, a label that a loss needs and no source has, a wrong setting,
            a model that does not exist, no CUDA.
        DataError: a teacher's cache that does not exist.
        CheckpointError: a checkpoint to resume from that does not exist.
    """
    if recipe.phases:
        refuse_engine(recipe)
        for one in phase_recipes(recipe):
            check_recipe(one)
        timeline(recipe)
        check_models(recipe)
        return
    check_device(recipe.engine.device)
    chosen(recipe.data.sampling)
    if recipe.data.batches is not None:
        chosen_batches(recipe.data.batches)
        check_sampling(recipe.data)
    check_loss(build_loss(recipe.loss), recipe.data, recipe.pairs)
    if recipe.distill is not None:
        from dualenc.distill.objective import build_terms

        build_terms(recipe.distill)
        for k, teacher in enumerate(recipe.distill.teachers):
            where = f"distill.teachers.{k}"
            _check_model(f"{where}.model", teacher.model if teacher.fusion is None else None)
            if teacher.cache is not None and not Path(teacher.cache).is_dir():
                raise DataError(
                    f"{where}.cache: there is no folder {teacher.cache}; write it with dualenc embed --recipe"
                )
    _check_model("checkpoint.init_from", recipe.checkpoint.init_from)
    for m, part in recipe.modalities.items():
        _check_model(f"modalities.{m}.init_from", part.init_from and part.init_from.partition("#")[0])
    resume = recipe.checkpoint.resume
    if resume not in ("auto", "none") and not Path(resume).is_dir():
        near = did_you_mean(resume, ("auto", "none"))
        raise CheckpointError(f"checkpoint.resume: there is no folder {resume}. {near}")


def check_length(recipe: Recipe, total_steps: int, samples: int | None = None) -> None:
    """Refuse a warm-up that is as long as the run, or longer.

    Args:
        samples: of these steps, where they are not of one size.

    Raises:
        ConfigError: naming both lengths.
    """
    if recipe.phases:
        for span in timeline(recipe):
            steps, seen = (x[1] - x[0] for x in (span.schedule, span.rates))
            check_length(span.recipe, steps, seen)
        return
    samples = total_steps * recipe.batch.size if samples is None else samples
    warmup = recipe.schedule.warmup_samples
    if warmup >= samples:
        raise ConfigError(
            f"schedule.warmup_samples: {warmup:,} is as long as the whole run ({total_steps:,} steps of "
            f"{recipe.batch.size:,} = {samples:,} samples), so the learning rate would never reach its peak; shorten it"
        )


def _check_model(where: str, spec: str | None) -> None:
    """Find a model without loading it."""
    if spec is None:
        return
    try:
        if spec.startswith(FORMS):
            find_released(spec)
        else:
            model_folder(spec)
    except DualencError as e:
        raise type(e)(f"{where}: {e}") from e
