"""Files shipped with the package: the recipes, and the quickstart's data below them."""

from __future__ import annotations

import os
from pathlib import Path

from dualenc.errors import ConfigError, did_you_mean


def recipes_folder() -> Path:
    """The folder of recipes: that of the checkout this file is in, else the one installed with the package."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "recipes"
    return checkout if (checkout / "quickstart").is_dir() else package / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name → file of every recipe that comes with the package: ``quickstart``, ``finetune/fashion_lora`` …

    Files that begin with ``_`` are parts that recipes have in common.
    """
    root = recipes_folder()
    out = {}
    for path in sorted(root.rglob("*.yaml")):
        folder, name = path.parent.relative_to(root), path.stem
        if "launch" not in folder.parts and not name.startswith("_"):  # launch: the launchers' own files
            # recipes/quickstart/quickstart.yaml is just "quickstart"
            out[name if folder.name == name else (folder / name).as_posix()] = path
    return out


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        ConfigError: neither exists; names the nearest one.
    """
    path, text = Path(name), os.fspath(name)
    if path.is_file() or path.is_absolute() or path.suffix in (".yaml", ".yml"):
        return path  # a missing file is refused where it is read, with the nearest name
    known = shipped_recipes()
    if text not in known:
        raise ConfigError(
            f"There is no recipe {text!r}. {did_you_mean(text, known)} See dualenc list recipes; "
            "for your own recipe give its .yaml file."
        )
    return known[text]
