"""Finding evaluation tasks, shipped ones and your own, and reading their YAML.

``include:`` names a task it starts from. Paths that begin with ``./`` or ``../`` are relative to the file;
``${DUALENC_DATA}/…`` is the folder where you keep data sets that cannot be shipped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualenc.config import parse, read_yaml
from dualenc.errors import ConfigError, did_you_mean
from dualenc.plugins import import_plugins, named_in
from dualenc_evals.kinds import kinds
from dualenc_evals.task import Task

TASKS = Path(__file__).parent / "tasks"


def task_files(root: Path = TASKS) -> dict[str, Path]:
    """Name → file of every built-in task; files that begin with ``_`` are shared parts."""
    return {p.stem: p for p in sorted(root.rglob("*.yaml")) if not p.name.startswith("_")}


def load_task(name: str | Path) -> Task:
    """A built-in task by name, or a YAML file by path.

    Raises:
        ConfigError: an unknown name or key (with the nearest), a wrong value.
    """
    text = str(name)
    if text.endswith((".yaml", ".yml")) or os.sep in text:
        path = Path(text)
    else:
        files = task_files()
        if text not in files:
            raise ConfigError(
                f"There is no task {text!r}. {did_you_mean(text, files)} For your own task, give its .yaml file."
            )
        path = files[text]
    raw, origin = read_yaml(path, key="include")
    # A name in an included file is that file's: a task is called what its own file is called, unless it says otherwise.
    if origin.get("name") != str(path):
        raw["name"] = path.stem
    source = origin.get("plugins", str(path))
    import_plugins(named_in(raw, source), f"plugins (in {source})")
    return parse_task(raw, origin, str(path))


def list_tasks() -> list[Task]:
    """Every built-in task, by name."""
    return [load_task(n) for n in sorted(task_files())]


def parse_task(raw: Mapping[str, Any], origin: Mapping[str, str] | None = None, where: str = "the task") -> Task:
    """Check ``raw`` as a task of the kind it names.

    Args:
        origin: dotted key → the file that said it; ``where``: the file of all other keys.

    Raises:
        ConfigError: no such kind, a key of another kind, an unknown key, a wrong value.
    """
    origin = origin or {}
    if "kind" not in raw:
        raise ConfigError(f"kind: this key is needed (in {where}). Write one of {', '.join(kinds)}.")
    kind = str(raw["kind"])
    said = origin.get("kind", where)
    try:
        known = kind in kinds
    except ConfigError as e:  # a plugin that cannot be imported
        raise ConfigError(f"kind (in {said}): {e}") from e
    if not known:
        raise ConfigError(f"kind: unknown kind of task {kind!r} (in {said}). {did_you_mean(kind, kinds)}")
    cls = kinds[kind].Task
    others = kinds.loaded()  # kinds of plugins that are not named stay unloaded
    foreign = {k: [n for n in others if k in others[n].Task.model_fields] for k in raw if k not in cls.model_fields}
    wrong = {k: owners for k, owners in foreign.items() if owners and raw[k] is not None}
    if wrong:
        raise ConfigError(
            "\n".join(
                f"{k}: not a key of a {kind} task, only of {_listed(owners)} (in {origin.get(k, where)})."
                for k, owners in wrong.items()
            )
        )
    return parse(cls, {k: v for k, v in raw.items() if not foreign.get(k)}, origin, where)


def _listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
