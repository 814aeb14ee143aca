"""The wheel, built and installed away from the repository: recipes and tasks by name in an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from _shared import ROOT

sys.path.insert(0, str(ROOT / "tests" / "train"))
from _runs import SMALL

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"COLUMNS": "160", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as building leaves folders behind; with the setuptools that is here, so without an index."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dualenc", "evals", "data_tools", "recipes", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    built = run(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", folder, cwd=source)
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("dualenc-*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; its dependencies are those of the environment that runs the tests."""
    venv = tmp_path_factory.mktemp("venv")
    assert run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv).returncode == 0
    out = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", out)
    assert run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=venv).returncode == 0
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return out


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


def test_it_works_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    dualenc = python.parent / "dualenc"
    where = run(python, "-c", "import dualenc; print(dualenc.__file__)", cwd=tmp_path).stdout
    assert Path(where.strip()).is_relative_to(python.parents[1])
    assert not any(installed_here(module, python) for module in ("evals", "data_tools", "recipes", "tests"))
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
