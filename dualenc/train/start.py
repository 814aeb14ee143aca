"""Where a run's weights begin: another model's, whole or tower by tower."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dualenc.config import Recipe
from dualenc.errors import CheckpointError, did_you_mean
from dualenc.model import Bundle, load_model


def init_weights(bundle: Bundle, spec: str) -> None:
    """Take over the weights of another model; what does not fit is an error that names the first such tensor."""
    source = load_model(spec).model.state_dict()
    own = bundle.model.state_dict()
    _check(own, source, "checkpoint.init_from", spec)
    bundle.model.load_state_dict({k: source[k] for k in own})


def init_towers(bundle: Bundle, recipe: Recipe) -> None:
    """Take over single towers, as ``modalities.NAME.init_from: MODEL#MODALITY`` says.

    Raises:
        CheckpointError: the model has no such modality, or its tower is another architecture.
    """
    for m, part in recipe.modalities.items():
        if part.init_from is None or part.shares is not None:
            continue
        where = f"modalities.{m}.init_from"
        spec, _, name = part.init_from.partition("#")
        other = load_model(spec)
        name = name or m
        if name not in other.modalities:
            raise CheckpointError(
                f"{where}: {spec} has no modality {name!r}. {did_you_mean(name, other.modalities)} Write {spec}#NAME."
            )
        source, own = other.model.tower(name).state_dict(), bundle.model.tower(m).state_dict()
        _check(own, source, where, part.init_from)
        bundle.model.tower(m).load_state_dict({k: source[k] for k in own})


def _check(own: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str, spec: str) -> None:
    for name, tensor in own.items():
        if name not in source:
            raise CheckpointError(f"{where}: {spec} has no tensor {name}; it is another architecture")
        if source[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(source[name].shape)} in {spec}, {list(tensor.shape)} in this recipe"
            )
