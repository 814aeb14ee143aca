"""Pydantic models as Markdown tables: key, type, default, what it means."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dualenc.config import Component

SCALARS = {str: "text", int: "int", float: "number", bool: "true or false", type(None): "null", Any: "anything"}


def cell(text: str) -> str:
    """``text`` in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    lines = [list(head), *(list(r) for r in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def heading(level: int, text: str, anchor: str) -> str:
    """A heading with an address of its own, which links can name."""
    return f"{'#' * level} {text} {{: #{anchor} }}\n"


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a type mentions, but for :class:`Component`, whose keys depend on its name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if annotation is Component else [annotation]
    return [m for a in get_args(annotation) for m in sections_in(a)]


def type_of(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type in words: ``int > 0 or null``, ```adamw`, `sgd` ``, ``list of text``."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(args[0], [*args[1:], *metadata])
    if origin is Literal:
        return " or ".join(f"`{_yaml(a)}`" for a in args)
    if origin in (Union, types.UnionType):
        words = " or ".join(dict.fromkeys(type_of(a) for a in args))
    elif origin is tuple and Ellipsis not in args:
        words = f"[{', '.join(map(type_of, args))}]" if len(args) < 4 else f"{len(args)} × {type_of(args[0])}"
    elif origin in (list, tuple, set):
        words = f"list of {_inner(args[0])}"
    elif origin in (dict, Mapping):
        words = f"mapping to {_inner(args[1])}" if args else "mapping"
    elif isinstance(annotation, type) and issubclass(annotation, Component):
        words = "`{name: …}` with its settings"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        words = "section"
    elif isinstance(annotation, type) and issubclass(annotation, Enum):
        words = " or ".join(f"`{e.value}`" for e in annotation)
    else:
        words = SCALARS.get(annotation) or getattr(annotation, "__name__", str(annotation))
    return f"{words} {bounds}".strip() if (bounds := _bounds(metadata)) else words


def _inner(annotation: Any) -> str:
    words = type_of(annotation)
    return f"({words})" if " or " in words and "`" not in words else words


def _bounds(metadata: Iterable[Any]) -> str:
    signs = {at.Gt: ">", at.Ge: "≥", at.Lt: "<", at.Le: "≤"}
    found = []
    for m in metadata:
        inside = m.metadata if isinstance(m, FieldInfo) else [m]
        for bound in inside:
            for cls, sign in signs.items():
                if isinstance(bound, cls):
                    (value,) = vars(bound).values() if hasattr(bound, "__dict__") else [_only(bound)]
                    found.append(f"{sign} {value:g}")
    return ", ".join(found)


def _only(bound: Any) -> Any:
    return next(getattr(bound, k) for k in ("gt", "ge", "lt", "le") if hasattr(bound, k))


def default_of(info: FieldInfo) -> str:
    """The default as YAML; "required" where there is none."""
    value = info.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "**required**"
    if isinstance(value, Component):
        return f"`{{name: {value.name}}}`"
    if isinstance(value, BaseModel):
        return ""
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.6g}"
        case list() | tuple():
            return "[" + ", ".join(_yaml(v) for v in value) + "]"
        case dict():
            return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
        case "":
            return '""'
        case _:
            return str(value)


def keys_of(model: type[BaseModel], leave_out: Iterable[str] = (), links: Mapping[str, str] | None = None) -> str:
    """The table of one model's keys. ``links``: key → where its own section is described."""
    rows = []
    for name, info in model.model_fields.items():
        if name in leave_out:
            continue
        shown = f"[`{name}`]({links[name]})" if links and name in links else f"`{name}`"
        words = type_of(info.annotation, info.metadata)
        rows.append(
            [shown, words.replace("|", "\\|"), default_of(info).replace("|", "\\|"), cell(info.description or "")]
        )
    return table(("key", "type", "default", ""), rows) if rows else "No settings.\n"


def about(cls: type) -> str:
    """A class's docstring as a paragraph."""
    doc = "" if cls.__doc__ is None or cls.__doc__ == BaseModel.__doc__ else cls.__doc__
    first = doc.strip().split("\n\n")[0]
    return " ".join(first.split()).replace("``", "`").replace(":class:", "").replace("<", "&lt;")


def tree(model: type[BaseModel], path: str, level: int, prefix: str = "", leave_out: Iterable[str] = ()) -> str:
    """A model and, under a heading each, the sections inside it.

    Args:
        path: dotted key of the section; "" for the whole.
        level: of the headings of what is inside.
        prefix: begins every anchor, where one page has several trees.
    """
    inside = {
        name: sections_in(info.annotation)[0]
        for name, info in model.model_fields.items()
        if name not in leave_out and sections_in(info.annotation)
    }
    links = {name: f"#{_anchor(prefix, _join(path, name))}" for name in inside}
    out = [keys_of(model, leave_out, links)]
    for name, section in inside.items():
        key = _join(path, name + _suffix(model.model_fields[name].annotation))
        out += ["", heading(level, f"`{key}`", _anchor(prefix, _join(path, name))), about(section), ""]
        out.append(tree(section, key, level + (level < 4), prefix))
    return "\n".join(out)


def _suffix(annotation: Any) -> str:
    """How a key goes on to the section in it: a list's items are numbered, a mapping's are named."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType, Annotated):
        return next((s for s in map(_suffix, get_args(annotation)) if s), "")
    if origin is list and sections_in(annotation):
        return ".N"
    return ".NAME" if origin is dict and sections_in(annotation) else ""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _anchor(prefix: str, path: str) -> str:
    return (prefix + path).lower().replace(".", "-")
