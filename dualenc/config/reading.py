"""YAML with inheritance and overrides → checked models; errors name the key, the file, and the nearest right key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dualenc.errors import ConfigError, did_you_mean
from dualenc.shipped import recipes_folder

S = TypeVar("S", bound=BaseModel)
COMMAND_LINE = "the command line"


def read_yaml(path: Path, key: str = "base", seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a mapping with inheritance by ``key``; return it and a map dotted key → the file that said it."""
    path = Path(path)
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise ConfigError(f"There is no file {path}. {near}".strip())
    if path.resolve() in seen:
        raise ConfigError(f"{path}: {key}: goes round in a circle ({' → '.join(p.name for p in (*seen, path))})")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, it holds {type(raw).__name__}")
    bases = raw.pop(key, [])
    own = _resolve_paths(raw, path.parent)
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for base in [bases] if isinstance(bases, str) else bases or []:
        base_raw, base_origin = read_yaml(path.parent / base, key, (*seen, path.resolve()))
        merged = _merge(merged, base_raw)
        origin |= base_origin
    origin |= dict.fromkeys(_dotted(own), str(path))
    _drop_siblings(merged, [k for k in _dotted(own) if _value_at(own, k) is not None], origin, keep=str(path))
    return _merge(merged, own), origin


def _value_at(raw: Any, key: str) -> Any:
    for part in key.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


EXCLUSIVE = (("budget.steps", "budget.samples", "budget.passes"), ("optim.ema_samples", "optim.trajectory"))
"""Keys of which a recipe has at most one: one that is said later replaces what a base or the file said."""


def _drop_siblings(raw: dict[str, Any], said: Iterable[str], origin: dict[str, str], keep: str) -> None:
    """Remove from ``raw`` the siblings of the keys ``said``, unless ``keep`` (a file, the command line) said them."""
    for key in said:
        for group in EXCLUSIVE:
            for other in group if key in group else ():
                section, _, name = other.rpartition(".")
                if other != key and origin.get(other) != keep and isinstance(raw.get(section), dict):
                    raw[section].pop(name, None)


def apply_override(raw: dict[str, Any], item: str, origin: dict[str, str]) -> None:
    """Set ``a.b.c=value`` (value read as YAML; ``a.0.b`` reaches into lists) in ``raw``."""
    key, eq, text = item.partition("=")
    if not eq or not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*", key):
        raise ConfigError(f"Cannot read {item!r}: write key=value, for example optim.lr=1e-3")
    try:
        value = yaml.load(text, Loader=_StrictLoader) if text else None
    except yaml.YAMLError as e:
        raise ConfigError(f"{key}: {text!r} is not valid YAML: {' '.join(str(e).split())}") from e
    node: Any = raw
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, key)
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    else:
        node[last] = value
    origin[key] = COMMAND_LINE
    if value is not None:
        said = [key, *(f"{key}.{k}" for k in value)] if isinstance(value, dict) else [key]
        _drop_siblings(raw, said, origin, keep=COMMAND_LINE)


def _child(node: Any, part: str, key: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, key)]
    if not isinstance(node.get(part), dict | list):
        node[part] = {}
    return node[part]


def _position(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"{key}: {part!r} is not a position in a list of {len(node)}")
    return int(part)


def parse(cls: type[S], raw: Mapping[str, Any], origin: Mapping[str, str], where: str) -> S:
    """Check ``raw`` against ``cls``; an error becomes sentences with key, file and remedy."""
    try:
        return cls.model_validate(raw)
    except ValidationError as e:
        lines = [_sentence(cls, err, origin, where) for err in e.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from e


def settings_as(cls: type[S], settings: Mapping[str, Any], where: str) -> S:
    """Check the settings of a component or input against its own model; ``where`` is its dotted key."""
    try:
        return cls.model_validate(dict(settings))
    except ValidationError as e:
        lines = [_sentence(cls, err, {}, where, prefix=where + ".") for err in e.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from e


def dump_yaml(model: BaseModel) -> str:
    """The resolved recipe as YAML that :func:`load_recipe` reads back."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def _sentence(cls: type[BaseModel], err: Any, origin: Mapping[str, str], where: str, prefix: str = "") -> str:
    loc = [str(p) for p in err["loc"]]
    key = ".".join(loc)
    source = next((origin[".".join(loc[:n])] for n in range(len(loc), 0, -1) if ".".join(loc[:n]) in origin), where)
    shown = prefix + key if key else where
    if err["type"] == "extra_forbidden":
        return f"{shown}: unknown key (in {source}). {did_you_mean(loc[-1], _fields_at(cls, loc[:-1]))}"
    if err["type"] == "missing":
        return f"{shown}: this key is needed (in {where})."
    message = err["msg"].removeprefix("Value error, ")
    value = err["input"] if isinstance(err["input"], str | int | float | bool | None) else None
    got = f", got {value!r}" if value is not None else ""
    return f"{shown}: {message}{got} (in {source})." if key else f"{message} (in {source})."


def _fields_at(cls: type[BaseModel], loc: list[str]) -> list[str]:
    """Names of the fields a (nested) model has at ``loc``."""
    model: Any = cls
    for part in loc:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
        inner = [a for a in _leaves(model) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = inner[0] if inner else model
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _leaves(annotation: Any) -> list[Any]:
    args = get_args(annotation)
    return [leaf for a in args for leaf in _leaves(a)] if args else [annotation]


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; a component with another ``name`` and everything else replaces."""
    out = dict(base)
    for k, v in over.items():
        old = out.get(k)
        renamed = (
            isinstance(v, dict) and isinstance(old, dict) and "name" in v and v["name"] != old.get("name", v["name"])
        )
        out[k] = _merge(old, v) if isinstance(v, dict) and isinstance(old, dict) and not renamed else v
    return out


RECIPES = "${RECIPES}/"
"""What a path begins with that is looked for among the shipped recipes, wherever the package is installed."""


def _resolve_paths(node: Any, folder: Path) -> Any:
    if isinstance(node, dict):
        return {k: _resolve_paths(v, folder) for k, v in node.items()}
    if isinstance(node, list):
        return [_resolve_paths(v, folder) for v in node]
    if isinstance(node, str) and node.startswith(("./", "../")):
        return os.path.normpath(folder / node)
    if isinstance(node, str) and node.startswith(RECIPES):
        return str(recipes_folder() / node.removeprefix(RECIPES))
    return node


def _dotted(node: Any, prefix: str = "") -> list[str]:
    if isinstance(node, dict):
        items: Iterable[tuple[str, Any]] = ((str(k), v) for k, v in node.items())
    elif isinstance(node, list):
        items = ((str(i), v) for i, v in enumerate(node))
    else:
        return []
    out: list[str] = []
    for k, v in items:
        out += [prefix + k, *_dotted(v, f"{prefix}{k}.")]
    return out


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]  # type: ignore[no-untyped-call]
        twice = {k for k in keys if isinstance(k, str) and keys.count(k) > 1}
        if twice:
            raise yaml.YAMLError(f"{node.start_mark}: key {sorted(twice)[0]!r} is given twice")
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}


_StrictLoader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
