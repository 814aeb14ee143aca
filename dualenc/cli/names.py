"""Names that the shell completes: recipes, tasks, models, what can be listed. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel

SOURCES = ("folder", "jsonl", "json", "csv", "parquet", "hf", "kitti", "kitti_raw", "nuscenes", "quickstart")
LISTS = ("recipes", "encoders", "losses", "terms", "plans", "sources", "tasks")


def recipes(incomplete: str) -> list[str]:
    """Shipped recipes and YAML files of the working folder."""
    from dualenc.shipped import shipped_recipes

    return _fitting([*shipped_recipes(), *_files(incomplete, (".yaml", ".yml"))], incomplete)


def tasks(incomplete: str) -> list[str]:
    """Shipped tasks and YAML files; the last of a comma-separated list."""
    before, comma, last = incomplete.rpartition(",")
    spec = find_spec("dualenc_evals")
    folders = [Path(f) / "tasks" for f in (spec.submodule_search_locations or ())] if spec is not None else []
    names = [p.stem for f in folders for p in f.rglob("*.yaml") if not p.stem.startswith("_")]
    return [before + comma + n for n in _fitting([*sorted(names), *_files(last, (".yaml", ".yml"))], last)]


def models(incomplete: str) -> list[str]:
    """Run folders below runs/, and the forms that name a released model."""
    runs = (
        [p.parent.as_posix() for p in Path("runs").rglob("checkpoints") if p.is_dir()] if Path("runs").is_dir() else []
    )
    return _fitting([*sorted(runs), "hf:", "open_clip:", "laion_clap:"], incomplete)


def lists(incomplete: str) -> list[str]:
    """What dualenc list lists."""
    return _fitting(LISTS, incomplete)


def overrides(incomplete: str) -> list[str]:
    """Keys of a recipe up to the next dot, and names behind loss.name=."""
    from dualenc.config import Recipe

    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={n}" for n in _fitting(_losses() if key in ("loss", "loss.name") else (), value)]
    parent, _, last = key.rpartition(".")
    model = _section(Recipe, parent.split(".") if parent else [])
    if model is None:
        return []
    prefix = f"{parent}." if parent else ""
    fields = [f"{n}{'.' if _section(model, [n]) is not None else '='}" for n in model.model_fields]
    return [prefix + n for n in _fitting(fields, last)]


def losses(incomplete: str) -> list[str]:
    """Losses, as ``dualenc list losses`` shows them."""
    return _fitting(_losses(), incomplete)


def sources(incomplete: str) -> list[str]:
    """Sources that can be packed."""
    return _fitting(SOURCES, incomplete)


def _losses() -> list[str]:
    from dualenc.cli.listing import docstrings

    return sorted(docstrings("losses", Path(__file__).parents[1] / "losses"))


def _section(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """The section of settings at a dotted path; None where there is none."""
    from pydantic import BaseModel

    found: type[BaseModel] | None = model
    for part in path:
        if found is None or part not in found.model_fields:
            return None
        inner = [a for a in _leaves(found.model_fields[part].annotation) if isinstance(a, type)]
        found = next((a for a in inner if issubclass(a, BaseModel)), None)
    return found


def _leaves(annotation: Any) -> list[Any]:
    args = get_args(annotation)
    return [leaf for a in args for leaf in _leaves(a)] if args else [annotation]


def _fitting(names: Iterable[str], incomplete: str) -> list[str]:
    return [n for n in names if n.startswith(incomplete)]


def _files(incomplete: str, endings: tuple[str, ...]) -> Iterator[str]:
    folder = Path(incomplete).parent if "/" in incomplete else Path()
    if folder.is_dir():
        for p in sorted(folder.iterdir()):
            if p.suffix in endings:
                yield p.as_posix()
