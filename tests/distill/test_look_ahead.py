"""The look-ahead teacher: a mean teacher at 0 steps, the present at rate 0, one on two ranks of every engine, in
micro-batches, and after a resume on another engine and world size."""

from __future__ import annotations

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
from dualenc.data.loader import Loader
from dualenc.distill import Distiller
from dualenc.distributed.world import World
from dualenc.losses import build_loss
from dualenc.model import build_bundle
from dualenc.train import loop
from dualenc.train.loop import train
from dualenc.train.memory import whole_weights

HERE = Path(__file__).parent
TERM = [{"name": "soft_labels", "weight": 0.5}]


def distill(**settings: Any) -> dict[str, Any]:
    return {"look_ahead": settings, "terms": TERM}


def followed(world: World, shards: str, out: str, steps: int, lr: float, micro: int = 20) -> dict[str, Tensor]:
    """The average after two batches, between which the student moved."""
    batch = {"size": 20, "micro": micro}
    recipe = student_recipe(shards, Path(out), batch=batch, distill=distill(steps=steps, lr=lr, decay=0.6))
    bundle = build_bundle(recipe)
    distiller = Distiller(recipe, bundle, torch.device("cpu"))
    loss = distiller.loss(build_loss(recipe.loss))
    loader = Loader(recipe.data, bundle.inputs, recipe.pairs, 0, 20, world.rank, world.world_size)
    for _, batch in zip(range(2), loader, strict=False):
        features = distiller.prepare(batch, whole_weights(bundle.model), loss).teachers["look_ahead"].features
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
    assert off(followed(World(), shards, str(tmp_path), 1, 0.5, micro=6), ahead) <= 1e-5


def off(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to its largest entry."""
    assert got.keys() == want.keys()
    found = ((got[k].double(), x.double()) for k, x in want.items())
    return max(float((y - x).abs().max() / x.abs().max().clamp(min=1e-2)) for y, x in found)


def taught(shards: str, out: str | Path, steps: int, **changes: Any) -> Any:
    return student_recipe(shards, Path(out), budget={"steps": steps}, distill=distill(steps=1, lr=0.1), **changes)


def saved(run: Path) -> dict[str, Tensor]:
    """Weights and average of the newest checkpoint."""
    save = ckpt.newest_good(run)
    assert save is not None
    return {**ckpt.trained_weights(save).all(), **load_file(str(save / "teachers.safetensors"))}


def test_a_resumed_run_is_the_unbroken_one(shards: str, tmp_path: Path) -> None:
    def run(out: str, steps: int) -> dict[str, Tensor]:
        return saved(train(taught(shards, tmp_path / out, steps)))

    whole = run("whole", 4)
    run("parts", 2)
    assert all(torch.equal(x, whole[n]) for n, x in run("parts", 4).items())


ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {"parallel": "ddp"},
    "FSDP2": {"parallel": "fsdp2"},
    **{f"ZeRO {z}": {"kind": "deepspeed", "zero_stage": z} for z in (1, 2, 3)},
}


def under_engines(world: World, shards: str, out: str, every: bool) -> None:
    """Runs of 4 steps under engines that cut weights, FSDP2 in micro-batches, and 2 steps of one continued by another;
    ``every``: under all engines."""

    def run(name: str, steps: int, engine: str, **changes: Any) -> None:
        recipe = taught(shards, Path(out) / name, steps, engine={"threads": 1, **ENGINES[engine]}, **changes)
        with loop._folder(loop.run_folder(recipe), world):
            loop.run_phases(recipe, loop.run_folder(recipe), world)

    run("FSDP2 in parts of 3", 4, "FSDP2", batch={"size": 20, "micro": 3})
    run("from one process", 4, "ZeRO 3")
    run("FSDP2, then one process", 2, "FSDP2")
    if not every:
        return
    run("ZeRO 1, then DDP", 2, "ZeRO 1")
    run("ZeRO 1, then DDP", 4, "DDP")
    for engine in ENGINES:
        run(engine, 4, engine)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.extra)])
def test_every_engine_and_its_resume_is_one_process(every: bool, shards: str, tmp_path: Path) -> None:
    want = saved(train(taught(shards, tmp_path / "alone", 4)))
    train(taught(shards, tmp_path / "from one process", 2))
    spawn(__file__, "under_engines", 2, {"shards": shards, "out": str(tmp_path), "every": every})
    train(taught(shards, tmp_path / "FSDP2, then one process", 4))
    found = {p.name: off(saved(p), want) for p in tmp_path.iterdir() if p.name != "alone"}
    assert len(found) == (9 if every else 3)
    assert {name: x for name, x in found.items() if not x <= 1e-5} == {}
