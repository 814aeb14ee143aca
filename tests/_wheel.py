"""The wheel as a stranger gets it: built from a copy of the repository, installed into an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from _shared import ROOT

_PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the installed package: nothing of the checkout is on its path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"COLUMNS": "160", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def build_wheel(folder: Path) -> Path:
    """Built from a copy, as building leaves folders behind; with the setuptools that is here, so without an index."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("dualenc", "evals", "data_tools", "recipes", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    built = run(sys.executable, *_PIP, "wheel", ".", "--no-deps", "--no-build-isolation", "-w", folder, cwd=source)
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("dualenc-*.whl")
    return found


def install_wheel(wheel: Path, venv: Path) -> Path:
    """The interpreter of a fresh environment with the wheel, whose dependencies are those of the environment that runs
    the tests."""
    assert run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv).returncode == 0
    python = venv / "bin" / "python"
    assert (
        run(sys.executable, *_PIP, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=venv).returncode
        == 0
    )
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python
