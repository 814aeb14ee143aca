"""What a run resumes from, and what must not have changed since."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dualenc.checkpoint import save as ckpt
from dualenc.config import Recipe, dump_yaml, load_yaml
from dualenc.distributed.world import World
from dualenc.errors import CheckpointError
from dualenc.files import write_atomically


def find_save(recipe: Recipe, run_dir: Path, world: World) -> Path | None:
    """The checkpoint that ``checkpoint.resume`` means; None: start from scratch. All ranks call it.

    Raises:
        CheckpointError: there is no such folder, or it has no finished, undamaged checkpoint.
    """
    resume = recipe.checkpoint.resume
    if resume == "none":
        return None
    if resume == "auto":
        return ckpt.newest_good(run_dir, world)
    path = Path(resume)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint.resume: there is no folder {resume}; use auto, none, or a checkpoint folder")
    if not (path / "checkpoints").is_dir():
        ckpt.refuse_damaged(path, world)
        return path
    save = ckpt.newest_good(path, world)
    if save is None:
        raise CheckpointError(f"checkpoint.resume: {resume} has no finished checkpoint")
    return save


def fingerprint(recipe: Recipe) -> dict[str, Any]:
    """What must stay the same for a resumed run to be the run that was saved."""
    full = recipe.model_dump(mode="json")
    data = {k: full["data"][k] for k in ("sampling", "lanes", "window", "batches") if k in full["data"]}
    named = ("name", "weight", "members", "values")  # values: only where a source has some
    sources = [{k: s[k] for k in named if k in s} for s in full["data"]["sources"]]
    keys = ("seed", "modalities", "pairs", "embed_dim", "loss")
    distill = full["distill"]
    if distill is not None:  # a teacher's location may change; its content is compared by hash
        where = ("model", "cache", "precision", "max_missing")
        distill["teachers"] = [{k: v for k, v in t.items() if k not in where} for t in distill["teachers"]]
    return {k: full[k] for k in keys} | {
        "data": data | {"sources": sources},
        "distill": distill,
        "batch.size": full["batch"]["size"],
        "optim.name": full["optim"]["name"],
    }


def begun(phases: list[list[dict[str, Any]]], step: int) -> list[list[dict[str, Any]]]:
    """Of each list of phases those of which a step was done before ``step``."""
    return [[p for p in some if p["step"] < step] for some in phases]


def refuse_changes(saved: Mapping[str, Any], now: Mapping[str, Any], save: Path, step: int = 0) -> None:
    """Raise CheckpointError naming the first field that differs: continuing with it would be another run.

    Of the phases those count that have begun; later ones may still be changed.
    """
    plain, saved = (_without_layout(json.loads(json.dumps(dict(x)))) for x in (now, saved))
    phases = begun([plain.pop("phases", []), saved.get("phases", [])], step)
    plain |= {f"phases.{k}": phases[0][k] if k < len(phases[0]) else None for k in range(max(map(len, phases)))}
    saved = {**saved, **{f"phases.{k}": x for k, x in enumerate(phases[1])}}
    for key, value in plain.items():
        if saved.get(key) != value:
            where, old, new = first_difference(key, saved.get(key), value)
            raise CheckpointError(
                f"{save} was written with {where} = {old!r}, but the recipe now has {new!r}. Change it back, or start "
                "from scratch with checkpoint.resume=none, or from its weights with checkpoint.init_from=CHECKPOINT."
            )


def _without_layout(said: dict[str, Any]) -> dict[str, Any]:
    """A fingerprint without ``length_groups``, which changes nothing but rounding."""
    for part in said.get("modalities", {}).values():
        part.pop("length_groups", None)
    return said


def check_data(state: ckpt.TrainState, digest: str, save: Path | None, phase: int = 0) -> None:
    """Remember what data the run reads, since ``phase``; refuse to resume with other sample counts, which change the
    data order."""
    saved = state.data.setdefault("plan" if phase == 0 else f"plan of phase {phase}", digest)
    if saved != digest:
        raise CheckpointError(
            f"{save} was written on other data: names, weights or sample counts of the shards differ. Use the shards "
            "the run started with, or start from its weights only: checkpoint.init_from=CHECKPOINT."
        )


def keep_old_recipe(recipe: Recipe, run_dir: Path, step: int) -> list[str]:
    """What the recipe changes since the run was last started, as ``key = new (was old)``.

    If anything does, the old recipe is kept as ``recipe-STEP.yaml``; the new one applies from STEP on.
    """
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        old = load_yaml(text)
    except yaml.YAMLError:
        old = None
    if not isinstance(old, dict):
        return [f"{path} could not be read and is rewritten"]
    now = load_yaml(dump_yaml(recipe))
    found = [f"{k} = {new!r} (was {was!r})" for k, was, new in differences("", old, now) if k not in NO_PART]
    if found:
        write_atomically(run_dir / f"recipe-{step:010d}.yaml", text)
    return found


NO_PART = {"budget.steps", "budget.samples", "budget.passes", "out", "description", "checkpoint.resume"}
"""Keys that say how long, where and from what a run continues, not what it is."""


def differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every value that differs between two mappings."""
    if isinstance(old, dict) and isinstance(new, dict):
        for k in [*new, *(k for k in old if k not in new)]:
            yield from differences(f"{key}.{k}" if key else str(k), old.get(k), new.get(k))
    elif old != new:
        yield key, old, new


def first_difference(key: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The dotted key where two nested values first differ, and both values there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for k in [*new, *(k for k in old if k not in new)]:
            if old.get(k) != new.get(k):
                return first_difference(f"{key}.{k}", old.get(k), new.get(k))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            if a != b:
                return first_difference(f"{key}.{i}", a, b)
    return key, old, new
