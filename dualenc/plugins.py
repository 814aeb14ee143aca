"""Plugins: modules that register losses, encoders, modalities … of their own, and where they were named.

There are three ways to use one, none of which edits this package:

* ``plugins: [mypkg]`` in a recipe or task: the module is imported before names are looked up, and registers its parts;
* ``pkg.mod:Name`` wherever a recipe or task takes a name;
* an entry point of an installed package (groups ``dualenc.losses``, ``dualenc.encoders`` …), imported when its name is
  first looked up.

Importing a module runs its code. A recipe, a task and a command line are the user's own and may name any module. A
checkpoint is data, perhaps somebody else's: what it names is imported only if it is allowed: by an entry point of an
installed package, by a recipe or task read before it, by ``--plugins``, or by the environment variable DUALENC_PLUGINS.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from typing import Any

from dualenc.errors import CheckpointError, ConfigError, DualencError, did_you_mean

ENV = "DUALENC_PLUGINS"
"""Allowed modules, comma-separated. Imported plugins are added, so that every process started from here has them."""
OURS = ("dualenc", "dualenc_evals", "dualenc_data_tools", "benchmarks")
GROUPS = "dualenc."
"""Prefix of the groups of entry points."""

_MODULE = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_NAMED = re.compile(rf"({_MODULE}):([A-Za-z_]\w*)")
_allowed: set[str] = set()


def import_plugins(names: Iterable[str], where: str) -> None:
    """Import modules that the user named; they are allowed from here on, in child processes too.

    Args:
        names: dotted names of modules.
        where: who named them, for messages ("plugins in my.yaml").

    Raises:
        ConfigError: if one cannot be found, or needs a package that is not installed.
    """
    for name in names:
        if not isinstance(name, str) or re.fullmatch(_MODULE, name) is None:
            raise ConfigError(f"{where}: {name!r} is not a module name; write for example plugins: [mypkg]")
        _import(name, f"{where} names the plugin {name!r}", ConfigError)
        _allow(name)


def named_in(raw: Mapping[str, Any], where: str) -> list[str]:
    """The ``plugins`` of a recipe or task as it was read.

    Raises:
        ConfigError: if it is not a list of names.
    """
    names = raw.get("plugins") or []
    if not isinstance(names, list):
        raise ConfigError(f"plugins (in {where}): write a list of modules, such as [mypkg], got {names!r}")
    return names


def import_allowed() -> None:
    """Import what ``--plugins`` and DUALENC_PLUGINS name.

    Raises:
        ConfigError: as :func:`import_plugins`.
    """
    names = [n for n in _environment() if n not in _allowed]
    import_plugins(names, f"{ENV} (or --plugins)")


def are_named() -> bool:
    """Whether ``--plugins`` or DUALENC_PLUGINS names any, or one was imported already."""
    return bool(_allowed or _environment())


def is_reference(name: str) -> bool:
    """Whether a name is written ``pkg.mod:Name``."""
    return _NAMED.fullmatch(name) is not None


def referenced(name: str, what: str) -> tuple[str, Any]:
    """The module of ``pkg.mod:Name`` and the object of that name in it.

    Args:
        what: "loss", "encoder" …, for messages.

    Raises:
        ConfigError: if there is no such module, or no such name in it.
    """
    found = _NAMED.fullmatch(name)
    assert found is not None, name
    module, attribute = found.group(1), found.group(3)
    loaded = _import(module, f"{what} {name!r}", ConfigError)
    known = vars(loaded)
    if attribute not in known:
        classes = [k for k, v in known.items() if isinstance(v, type)]
        raise ConfigError(f"{what} {name!r}: {module} has no {attribute!r}. {did_you_mean(attribute, classes)}")
    _allow(module)
    return module, known[attribute]


@cache
def entry_points(group: str) -> dict[str, list[metadata.EntryPoint]]:
    """Name → the entry points of installed packages under it; read once per process."""
    out: dict[str, list[metadata.EntryPoint]] = {}
    for e in metadata.entry_points(group=group):
        same = out.setdefault(e.name, [])
        if e.value not in {other.value for other in same}:  # one package may be found twice on the path
            same.append(e)
    return out


def entry(group: str, name: str, what: str) -> tuple[str, Any] | None:
    """The module and object of the entry point ``name``, or None if no package has it.

    Raises:
        ConfigError: if two packages have it, or its module cannot be imported.
    """
    found = sorted(entry_points(group).get(name, []), key=lambda e: e.value)
    if not found:
        return None
    if len(found) > 1:
        raise ConfigError(
            f"{what} {name!r} is provided by {' and by '.join(_brought_by(e) for e in found)}; choose with "
            f"{' or '.join(e.value for e in found)}"
        )
    (e,) = found
    loaded = _import(e.module, f"{what} {name!r} of {_brought_by(e)}", ConfigError)
    if e.attr not in vars(loaded):
        raise ConfigError(
            f"{what} {name!r} of {_brought_by(e)}: {e.module} has no {e.attr!r}; report this to its authors"
        )
    return e.module, vars(loaded)[e.attr]


def _brought_by(e: metadata.EntryPoint) -> str:
    return f"{e.dist.name} {e.dist.version}" if e.dist is not None else e.module


# --- checkpoints --------------------------------------------------------------------------------------------------


def about(modules: Iterable[str]) -> dict[str, dict[str, str]]:
    """What a checkpoint records about its plugins: module → distribution and version, as far as known."""
    brought = metadata.packages_distributions() if modules else {}
    out: dict[str, dict[str, str]] = {}
    for module in sorted(set(modules)):
        top = module.partition(".")[0]
        said: dict[str, str] = {}
        for distribution in dict.fromkeys(brought.get(top, [])):
            said = {"distribution": distribution, "version": metadata.version(distribution)}
        own = vars(sys.modules[top]).get("__version__") if top in sys.modules else None
        if not said and isinstance(own, str):
            said = {"version": own}
        out[module] = said
    return out


def import_recorded(recorded: Mapping[str, Mapping[str, str]], names: Iterable[str], where: str) -> None:
    """Import the plugins a checkpoint says it needs, if they are allowed.

    Args:
        recorded: module → ``{"distribution", "version"}``, as :func:`about` wrote it.
        names: the names of parts that the checkpoint uses; ``pkg.mod:Name`` among them are allowed or refused too.
        where: the checkpoint.

    Raises:
        CheckpointError: naming the plugin, and what to install or how to allow it.
    """
    import_allowed()
    wanted = {**recorded, **{found.group(1): {} for n in names if (found := _NAMED.fullmatch(n)) is not None}}
    references = {found.group(1) for n in names if (found := _NAMED.fullmatch(n)) is not None}
    for module, said in wanted.items():
        who = f"{where} needs the plugin {module!r}"
        if re.fullmatch(_MODULE, module) is None or module.partition(".")[0] in OURS:
            raise CheckpointError(f"{who}, which is not the name of a plugin module")
        if module in sys.modules and module not in references:
            continue  # nothing is run by importing it again
        if module == "__main__":
            raise CheckpointError(
                f"{who}: its parts were defined in a script; move them into a module and name it in plugins"
            )
        said = said or recorded.get(module, {})
        if module.partition(".")[0] not in sys.modules and importlib.util.find_spec(module.partition(".")[0]) is None:
            raise CheckpointError(f"{who}, which is not installed; {_how_to_install(module, said)}")
        if not is_allowed(module):
            raise CheckpointError(
                f"{who}, and importing it would run its code. If you trust it, add --plugins {module} (or set "
                f"{ENV}={module}, or name it under plugins: in your recipe or task)"
            )
        _import(module, who, CheckpointError, said)
        _allow(module)


def is_allowed(module: str) -> bool:
    """Whether a checkpoint may have ``module`` imported: the user named it or its package, or an installed package has
    an entry point in it."""
    if any(_within(module, name) for name in {*_allowed, *_environment()}):
        return True
    groups = {g for g in metadata.entry_points().groups if g.startswith(GROUPS)}
    modules = {e.module for g in groups for same in entry_points(g).values() for e in same}
    return any(_within(module, m) or _within(m, module) for m in modules)


def changed(recorded: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The plugins of a checkpoint that have another version now, as "name old → new"."""
    now = about(recorded)
    return [
        f"{module} {said['version']} → {now[module].get('version', 'unknown')}"
        for module, said in recorded.items()
        if "version" in said and said["version"] != now[module].get("version")
    ]


# --- helpers -------------------------------------------------------------------------------------------------


def origin(module: str) -> str | None:
    """The plugin that ``module`` stands for: itself, or None for modules of this project."""
    return None if module.partition(".")[0] in OURS else module


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _environment() -> list[str]:
    return [n for n in (part.strip() for part in os.environ.get(ENV, "").split(",")) if n]


def _allow(module: str) -> None:
    _allowed.add(module)
    known = _environment()
    if not any(_within(module, n) for n in known):
        os.environ[ENV] = ",".join([*known, module])


def _import(module: str, who: str, error: type[DualencError], said: Mapping[str, str] | None = None) -> Any:
    """Import ``module``. Other errors are bugs of the plugin and keep their traceback for its author."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        absent = e.name or ""
        if _within(module, absent):
            raise error(f"{who}, but there is no module {absent!r}; {_how_to_install(module, said or {})}") from e
        raise error(f"{who}, which needs the package {absent!r}; it is not installed, pip install it") from e


def _how_to_install(module: str, said: Mapping[str, str]) -> str:
    if "distribution" in said:
        return f"pip install {said['distribution']}=={said['version']}"
    return f"install the package that has it, or put the folder with {module.partition('.')[0]} on PYTHONPATH"
