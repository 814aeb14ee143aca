"""The wheel, built and installed away from the repository: recipes and tasks by name in an empty folder."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from _shared import ROOT
from _wheel import run

sys.path.insert(0, str(ROOT / "tests" / "train"))
from _runs import SMALL

pytestmark = pytest.mark.slow


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        metadata = z.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    tops = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert tops == {"dualenc", "dualenc_evals", "dualenc_data_tools"}
    for top in tops:
        assert f"{top}/py.typed" in names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "dualenc").rglob("*.py")}
    assert modules <= names
    recipes = {p.relative_to(ROOT).as_posix() for p in (ROOT / "recipes").rglob("*") if p.is_file()}
    assert {f"dualenc/{r}" for r in recipes if "__pycache__" not in r} <= names
    tasks = ROOT / "evals" / "dualenc_evals"
    assert {p.relative_to(tasks.parent).as_posix() for p in (tasks / "tasks").rglob("*.yaml")} <= names
    assert any(n.endswith("dist-info/licenses/LICENSE") for n in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "matplotlib" not in metadata
    assert "deepspeed<0.20,>=0.17" in metadata


def test_it_works_in_an_empty_folder(installed_python: Path, tmp_path: Path) -> None:
    dualenc = installed_python.parent / "dualenc"
    where = run(installed_python, "-c", "import dualenc; print(dualenc.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(installed_python.parents[1])
    assert not any(installed_here(module, installed_python) for module in ("evals", "data_tools", "recipes", "tests"))
    listed = run(dualenc, "list", "recipes", cwd=tmp_path).stdout
    assert "quickstart" in listed
    assert "finetune/fashion_lora" in listed
    assert "cannot be used" not in listed
    assert "quickstart_val_style" in run(dualenc, "list", "tasks", cwd=tmp_path).stdout

    small = [*SMALL, "batch.size=16", "data.workers=0", "budget.steps=2"]
    trained = run(dualenc, "train", "quickstart", *small, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    evaluated = run(dualenc, "eval", "runs/quickstart", "--tasks", "quickstart_val_style", "--no-cache", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]
    wrong = run(dualenc, "train", "finetune/fashion_lore", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "Did you mean 'finetune/fashion_lora'?" in " ".join(wrong.stderr.split())


def installed_here(module: str, python: Path) -> bool:
    """Whether ``module`` came with the wheel, not with another package beside it."""
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    return (site / module).exists() or (site / f"{module}.py").exists()
