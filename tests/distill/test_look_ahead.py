"""The look-ahead teacher: a mean teacher at 0 steps, the present at rate 0, one on two ranks and after a resume."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
from _distill_runs import shards_fixture, student_recipe  # noqa: F401
from _spawn import spawn

from dualenc.checkpoint import save as ckpt
from dualenc.config import Recipe
from dualenc.data.loader import Loader
from dualenc.distill import Distiller
from dualenc.distributed.world import World
from dualenc.errors import ConfigError
from dualenc.losses import build_loss
from dualenc.model import build_bundle
from dualenc.train.loop import train

HERE = Path(__file__).parent
TERM = [{"name": "soft_labels", "weight": 0.5}]


def distill(**settings: Any) -> dict[str, Any]:
    return {"look_ahead": settings, "terms": TERM}


def followed(world: World, shards: str, out: str, steps: int, lr: float) -> dict[str, Tensor]:
    """The average after two batches, between which the student moved."""
    recipe = student_recipe(shards, Path(out), distill=distill(steps=steps, lr=lr, decay=0.6))
    bundle = build_bundle(recipe)
    distiller = Distiller(recipe, bundle, torch.device("cpu"))
    loss = distiller.loss(build_loss(recipe.loss))
    loader = Loader(recipe.data, bundle.inputs, recipe.pairs, 0, 20, world.rank, world.world_size)
    for _, batch in zip(range(2), loader, strict=False):
        features = distiller.prepare(batch, bundle.model, loss).teachers["look_ahead"].features
        with torch.no_grad():
            for p in bundle.model.parameters():
                p.mul_(1.01)
    loader.close()
    assert distiller.follower is not None
    assert distiller.follower.updates == 2
    return {**distiller.state_dict(), "features": features["image"][:1].clone()}


def test_mean_teacher_and_rate_zero(shards: str, tmp_path: Path) -> None:
    none = followed(World(), shards, str(tmp_path), 0, 0.1)
    still = followed(World(), shards, str(tmp_path), 1, 0.0)
    ahead = followed(World(), shards, str(tmp_path), 1, 0.5)
    start = build_bundle(student_recipe(shards, tmp_path)).model.state_dict()
    name = "towers.text.head.weight"
    # decay 0 at first (φ = θ), then min(1 − 1/2, 0.6) = 0.5
    torch.testing.assert_close(none[name], 0.5 * start[name] + 0.5 * 1.01 * start[name])
    assert all(torch.equal(x, still[n]) for n, x in none.items())
    assert float((ahead[name] - none[name]).abs().max()) > 1e-4


@pytest.mark.dist
def test_two_ranks_look_at_one_future(shards: str, tmp_path: Path) -> None:
    alone = followed(World(), shards, str(tmp_path), 2, 0.5)
    arguments = {"shards": shards, "out": str(tmp_path), "steps": 2, "lr": 0.5}
    both = spawn(HERE / "test_look_ahead.py", "followed", 2, arguments)
    for name, x in alone.items():
        if name != "features" and x.is_floating_point():
            assert float((both[0][name] - x).abs().max()) <= 1e-5 * max(float(x.abs().max()), 1.0), name
            assert torch.equal(both[0][name], both[1][name])


def test_a_resumed_run_is_the_unbroken_one(shards: str, tmp_path: Path) -> None:
    def run(out: str, steps: int) -> dict[str, Tensor]:
        recipe = student_recipe(shards, tmp_path / out, budget={"steps": steps}, distill=distill(steps=1, lr=0.1))
        save = ckpt.newest_good(train(recipe))
        assert save is not None
        return {**ckpt.trained_weights(save).all(), **load_file(str(save / "teachers.safetensors"))}

    whole = run("whole", 4)
    run("parts", 2)
    assert all(torch.equal(x, whole[n]) for n, x in run("parts", 4).items())


def test_engines_that_cut_weights_are_refused(shards: str, tmp_path: Path) -> None:
    recipe = student_recipe(shards, tmp_path, distill=distill())

    def changed(**update: Any) -> Recipe:
        raw = copy.deepcopy(recipe.model_dump(mode="json"))
        return Recipe.model_validate({**raw, **update})

    with pytest.raises(ConfigError, match="needs whole weights on every rank"):
        train(changed(engine={"parallel": "fsdp2"}))
    with pytest.raises(ConfigError, match=r"leave batch\.micro out"):
        train(changed(batch={"size": 20, "micro": 5}))
