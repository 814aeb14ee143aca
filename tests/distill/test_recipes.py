"""The shipped recipes: they are read, one line makes the control, and a student is at least 5 times smaller."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))

from dualenc.cli import app
from dualenc.config import load_recipe
from dualenc.distill.objective import build_terms
from dualenc.model import build_bundle

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "distill").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_read(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.description
    if recipe.distill is not None:
        assert build_terms(recipe.distill)


@pytest.mark.parametrize("data", ["flickr8k", "fashion"])
def test_the_control_differs_in_one_line(data: str) -> None:
    dcd, kd = (load_recipe(ROOT / "recipes" / "distill" / f"{data}_{k}.yaml") for k in ("dcd", "kd"))
    assert dcd.distill is not None
    assert kd.distill is not None
    assert dcd.distill.terms != kd.distill.terms
    same = {"name": "", "description": "", "distill": dcd.distill.model_copy(update={"terms": kd.distill.terms})}
    assert dcd.model_copy(update=same) == kd.model_copy(update={**same, "distill": kd.distill})


def test_the_student_is_small() -> None:
    """The teacher's MiniLM alone has 22.7 M parameters."""
    student = build_bundle(load_recipe(ROOT / "recipes" / "distill" / "flickr8k.yaml")).model
    assert sum(p.numel() for p in student.parameters()) < 22.7e6 / 5


def test_terms_are_listed_and_embed_wants_one_source() -> None:
    text = CliRunner().invoke(app, ["list", "terms"]).output
    assert all(name in text for name in ("dcd", "feature", "soft_labels", "gradient", "interactive", "affinity"))
    result = CliRunner().invoke(app, ["embed", "runs/x", "a.tar", "--recipe", "r.yaml"])
    assert "give either shards or --recipe" in str(result.exception)
