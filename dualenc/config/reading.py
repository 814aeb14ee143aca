"""YAML with inheritance and overrides → checked models; errors name the key, the file, and the nearest valid key."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import AliasChoices, BaseModel, ValidationError

from dualenc.errors import ConfigError, did_you_mean
from dualenc.shipped import recipes_folder, shipped_recipes

S = TypeVar("S", bound=BaseModel)
COMMAND_LINE = "the command line"


def read_yaml(path: Path, key: str = "base") -> tuple[dict[str, Any], dict[str, str]]:
    """Read a mapping with inheritance by ``key``; return it and a map of dotted key → the file that set it.

    Raises:
        ConfigError: no such file, no YAML of keys and values, more of it than the bounds allow, or a circle.
    """
    return _read(Path(path), key, (), {})


_Read = tuple[dict[str, Any], dict[str, str]]


def _read(path: Path, key: str, seen: tuple[Path, ...], done: dict[Path, _Read]) -> _Read:
    """``seen``: the files that led here; ``done``: every file is read once, however often it is a base."""
    if not path.is_file():
        names = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"There is no file {path}. {did_you_mean(path.name, names) if names else ''}".strip())
    if path.resolve() in seen:
        raise ConfigError(
            f"{path}: {key}: files include each other in a circle ({' → '.join(p.name for p in (*seen, path))})"
        )
    if len(seen) >= MAX_DEPTH:
        raise ConfigError(f"{path}: {key}: more than {MAX_DEPTH} files are built on each other")
    if path.resolve() in done:
        return done[path.resolve()]
    raw = _mapping(path)
    own = _resolve_paths({k: v for k, v in raw.items() if k != key}, path.parent)
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for base in _bases(raw.get(key), f"{path}: {key}"):
        shipped = shipped_recipes().get(base) if key == "base" and not (path.parent / base).is_file() else None
        base_raw, base_origin = _read(shipped or path.parent / base, key, (*seen, path.resolve()), done)
        _drop_siblings(merged, [k for k in _dotted(base_raw) if _value_at(base_raw, k) is not None], {}, keep="")
        merged = merge(merged, base_raw)
        origin |= base_origin
    origin |= dict.fromkeys(_dotted(own), str(path))
    _drop_siblings(merged, [k for k in _dotted(own) if _value_at(own, k) is not None], origin, keep=str(path))
    done[path.resolve()] = merge(merged, own), origin
    return done[path.resolve()]


def _mapping(path: Path) -> dict[str, Any]:
    """What a YAML file holds."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError(f"{path} has {size:,} bytes; recipes and tasks have at most {MAX_BYTES:,}")
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, not {'nothing' if raw is None else type(raw).__name__}")
    return raw


def _bases(said: Any, where: str) -> list[str]:
    """The files that ``base:`` or ``include:`` names."""
    bases = [said] if isinstance(said, str) else said or []
    if not isinstance(bases, list) or not all(isinstance(b, str) and b and "\0" not in b for b in bases):
        raise ConfigError(f"{where}: must be a path or a list of paths, not {_short(said)}")
    return bases


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _value_at(raw: Any, key: str) -> Any:
    for part in key.split("."):
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


EXCLUSIVE = (
    ("budget.steps", "budget.samples", "budget.passes", "budget.epochs"),
    ("optim.ema_samples", "optim.trajectory"),
)
"""Keys of which a recipe has at most one: one set later replaces what a base or the file set."""


def _drop_siblings(raw: dict[str, Any], said: Iterable[str], origin: dict[str, str], keep: str) -> None:
    """Remove from ``raw`` the siblings of the keys ``said``, unless ``keep`` (a file, the command line) set them."""
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
        value = load_yaml(text) if text else None
    except yaml.YAMLError as e:
        raise ConfigError(f"{key}: {_short(text)} is not valid YAML: {' '.join(str(e).split())}") from e
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
        raise ConfigError(f"{key}: {part!r} is not a position in a list of length {len(node)}")
    return int(part)


def parse(cls: type[S], raw: Mapping[str, Any], origin: Mapping[str, str], where: str) -> S:
    """Check ``raw`` against ``cls``; errors become sentences with the key, its file and what to write."""
    try:
        return cls.model_validate(raw)
    except ValidationError as e:
        lines = [_sentence(cls, err, origin, where) for err in e.errors()]
        raise ConfigError(_some(lines)) from e


def settings_as(cls: type[S], settings: Mapping[str, Any], where: str) -> S:
    """Check the settings of a component or input against its own model; ``where`` is its dotted key."""
    try:
        return cls.model_validate(dict(settings))
    except ValidationError as e:
        lines = [_sentence(cls, err, {}, where, prefix=where + ".") for err in e.errors()]
        raise ConfigError(_some(lines)) from e


_SHOWN = 20


def _some(lines: list[str]) -> str:
    """The first of the sentences, each once."""
    lines = list(dict.fromkeys(lines))
    more = [f"… and {len(lines) - _SHOWN:,} more."] if len(lines) > _SHOWN else []
    return "\n".join([*lines[:_SHOWN], *more])


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
    """Names of the keys that a (nested) model has at ``loc``."""
    model: Any = cls
    for part in loc:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
        inner = [a for a in _leaves(model) if isinstance(a, type) and issubclass(a, BaseModel)]
        model = inner[0] if inner else model
    return _keys(model) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _keys(model: type[BaseModel]) -> list[str]:
    aliases = [f.validation_alias for f in model.model_fields.values()]
    return [*model.model_fields, *(str(c) for a in aliases if isinstance(a, AliasChoices) for c in a.choices[1:])]


def _leaves(annotation: Any) -> list[Any]:
    args = get_args(annotation)
    return [leaf for a in args for leaf in _leaves(a)] if args else [annotation]


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; a component with another ``name`` and everything else replaces."""
    out = dict(base)
    for k, v in over.items():
        old = out.get(k)
        renamed = (
            isinstance(v, dict) and isinstance(old, dict) and "name" in v and v["name"] != old.get("name", v["name"])
        )
        out[k] = merge(old, v) if isinstance(v, dict) and isinstance(old, dict) and not renamed else v
    return out


RECIPES = "${RECIPES}/"
"""Prefix of paths that are looked up among the shipped recipes, wherever the package is installed."""


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


MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_VALUES = 50_000
"""Of a YAML text: its size, lists and mappings within each other, and values once every alias is expanded."""
_DEEP = f"lists and mappings are nested more than {MAX_DEPTH} deep"
_MANY = f"more than {MAX_VALUES:,} values once its aliases (*) are expanded"


def load_yaml(text: str) -> Any:
    """What a YAML text says, within bounds of size, depth and aliases: those that a person writes stay far below.

    Raises:
        yaml.YAMLError: it is no YAML, goes beyond the bounds, or holds a value that Python cannot.
    """
    if len(text) > MAX_BYTES:
        raise yaml.YAMLError(f"it has {len(text):,} characters, at most {MAX_BYTES:,} are read")
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()  # type: ignore[no-untyped-call]
        if node is None:
            return None
        _count(node, {}, [])
        return loader.construct_document(node)  # type: ignore[no-untyped-call]
    except (ValueError, OverflowError) as e:  # a date without such a day, a number of 5,000 digits
        raise yaml.YAMLError(str(e)) from e
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def _count(node: yaml.Node, counted: dict[int, int], above: list[int]) -> int:
    """Values in a node with its aliases expanded; one that contains itself has no end."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise yaml.YAMLError(f"{_at(node)}: this value contains itself through an alias (*)")
    if id(node) not in counted:
        if len(above) >= MAX_DEPTH:
            raise yaml.YAMLError(f"{_at(node)}: {_DEEP}")
        above.append(id(node))
        parts = node.value if isinstance(node, yaml.SequenceNode) else [x for pair in node.value for x in pair]
        counted[id(node)] = 1 + sum(_count(x, counted, above) for x in parts)
        above.pop()
        if counted[id(node)] > MAX_VALUES:
            raise yaml.YAMLError(f"{_at(node)}: {_MANY}")
    return counted[id(node)]


def _at(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, refuses a key given twice, and goes no deeper than the bound."""

    _depth = _nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth, self._nodes = self._depth + 1, self._nodes + 1
        if self._depth > MAX_DEPTH + 1 or self._nodes > MAX_VALUES:
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {line}: {_MANY if self._nodes > MAX_VALUES else _DEEP}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [k for k, _ in node.value if k.tag != "tag:yaml.org,2002:merge"]
        keys = Counter(self.construct_object(k, deep=True) for k in own if isinstance(k, yaml.ScalarNode))  # type: ignore[no-untyped-call]
        twice = [k for k, n in keys.items() if n > 1 and isinstance(k, str)]
        if twice:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: key {min(twice)!r} is given twice")
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}


_StrictLoader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
