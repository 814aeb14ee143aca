"""Files that come with the package: the recipes, and the quickstart's data below them."""

from __future__ import annotations

from pathlib import Path


def recipes_folder() -> Path:
    """The folder of recipes: that of the checkout this file stands in, else the one installed with the package."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "recipes"
    return checkout if (checkout / "quickstart").is_dir() else package / "recipes"
