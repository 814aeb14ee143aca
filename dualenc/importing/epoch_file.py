"""open_clip's ``epoch_N.pt`` → a checkpoint from which ``dualenc train`` goes on: weights, AdamW's state, the step.

open_clip keeps its optimizer's state by position. Its two groups hold, in the order of ``named_parameters``: what has
no weight decay (fewer than two dimensions, or ``bn``, ``ln``, ``bias`` or ``logit_scale`` in the name), then the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dualenc.checkpoint import save as ckpt
from dualenc.config import Recipe, dump_yaml, pair_name
from dualenc.encoders.adapters.open_clip import TEXT_PARTS
from dualenc.encoders.released.migrations import migrate
from dualenc.encoders.released.weights import load_exactly, read_archive
from dualenc.errors import CheckpointError, ConfigError
from dualenc.model import build_bundle
from dualenc.train.loop import run_folder
from dualenc.train.resume import fingerprint

logger = logging.getLogger(__name__)

_NOT_DECAYED = ("bn", "ln", "bias", "logit_scale")
_FIELDS = ("exp_avg", "exp_avg_sq")


def take_over(recipe: Recipe, file: Path, steps_per_epoch: int | None) -> Path:
    """Write ``file`` as the newest checkpoint of the recipe's run; return its folder.

    The step is the number of epochs times ``steps_per_epoch``, else what the optimizer has counted. The data order is
    dualenc's own, from that step on.

    Raises:
        ConfigError: no such file, or the run has checkpoints already.
        CheckpointError: it has no optimizer state, or weights or state do not fit the recipe's model.
    """
    if not file.is_file():
        raise ConfigError(f"--checkpoint: there is no file {file}")
    run_dir = run_folder(recipe)
    if ckpt.list_saves(run_dir):
        raise ConfigError(f"--checkpoint: {run_dir} has checkpoints already; choose another out: in the recipe")
    raw = read_archive(file)
    if not isinstance(raw, Mapping) or not isinstance(raw.get("state_dict"), Mapping) or "optimizer" not in raw:
        raise CheckpointError(
            f"{file} has weights only, not the state_dict and optimizer of an epoch_N.pt; to start from its weights "
            f"write checkpoint.init_from: open_clip:NAME/{file}"
        )
    pair = pair_name(recipe.pairs[0])
    weights = {_own(k, pair): v for k, v in migrate(raw["state_dict"]).items() if not k.endswith("position_ids")}
    bundle = build_bundle(recipe)
    model = bundle.model
    state = model.state_dict()
    load_exactly(
        model,
        {k: v.reshape(state[k].shape) if v.ndim == 0 and k in state else v for k, v in weights.items()},
        str(file),
    )
    tensors, scalars = _optimizer(raw["optimizer"], list(weights), model, file)
    counted = int(max((s["step"] for s in scalars.values()), default=0))
    epochs = int(raw.get("epoch", 0))
    step = epochs * steps_per_epoch if steps_per_epoch is not None else counted
    if abs(step - counted) > 0.02 * max(step, counted):
        said = "%s: its optimizer has taken %d steps, but %d epochs of this recipe are %d: is the number of GPUs right?"
        logger.warning(said, file, counted, epochs, step)
    saved = ckpt.TrainState(
        step=step,
        samples_seen=step * recipe.batch.size,
        optimizer={"name": recipe.optim.name, "scalars": scalars},
        fingerprint=fingerprint(recipe),
    )
    with ckpt.Saver(run_dir, step) as saver:
        saver.tensors("optimizer.safetensors", tensors)
        origin = {"step": step, "samples_seen": saved.samples_seen, "imported": file.name}
        bundle.save(saver.folder / "model", provenance=origin)
        saver.state(saved)
        (saver.folder / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    return ckpt.folder_of(run_dir, step)


def _own(name: str, pair: str) -> str:
    """A tensor's name in a recipe's model."""
    if name in ("logit_scale", "logit_bias"):
        return f"{name}.{pair}"
    if name.startswith("visual."):
        return f"towers.image.trunk.{name.removeprefix('visual.')}"
    if name.startswith(("text.", *TEXT_PARTS)):
        return f"towers.text.net.{name.removeprefix('text.')}"
    return name  # refused as one that the model does not have


def _optimizer(
    raw: Mapping[str, Any], names: list[str], model: nn.Module, file: Path
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """AdamW's moments by parameter name, and its step counts.

    Raises:
        CheckpointError: another optimizer, or other groups than those of this model with these locks.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # A state dict has the parameters in the order of named_parameters, with buffers in between.
    plain = [n for n in names if n in trained and not _decayed(n, trained[n])]
    rest = [n for n in names if n in trained and _decayed(n, trained[n])]
    groups = [list(g["params"]) for g in raw.get("param_groups", [])]
    if [len(g) for g in groups] != [len(plain), len(rest)]:
        raise CheckpointError(
            f"{file}: its optimizer has groups of {[len(g) for g in groups]} parameters, the recipe's model trains "
            f"{len(plain)} without weight decay and {len(rest)} with it: other locks, or another optimizer than AdamW"
        )
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    for name, at in zip([*plain, *rest], [i for g in groups for i in g], strict=True):
        entry = raw["state"].get(at)
        if entry is None:
            continue  # it has never had a gradient
        if not all(field in entry for field in (*_FIELDS, "step")):
            raise CheckpointError(f"{file}: its optimizer state is not AdamW's: it has {', '.join(entry)}")
        for field in _FIELDS:
            value, shape = entry[field].float(), trained[name].shape
            if value.numel() != trained[name].numel() or (value.ndim and value.shape != shape):
                raise CheckpointError(f"{file}: {field} of {name} has shape {list(value.shape)}, not {list(shape)}")
            tensors[f"{name}/{field}"] = value.reshape(shape).clone()
        scalars[name] = {"step": float(entry["step"])}
    return tensors, scalars


def _decayed(name: str, p: Tensor) -> bool:
    """Whether open_clip decays it. What was 0-D there has one dimension here."""
    there = name.removeprefix("towers.image.trunk.").removeprefix("towers.text.net.")
    return p.ndim >= 2 and not any(part in there for part in _NOT_DECAYED)
