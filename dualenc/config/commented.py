"""YAML with comments, for files that a command writes and a person goes on with."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

WIDTH = 100


def commented_yaml(raw: Mapping[str, Any], comments: Mapping[str, str], head: str = "") -> str:
    """``raw`` as YAML that reads back as ``raw``, with comments above keys.

    Args:
        comments: dotted key (``data.sources.0.shards``) → what stands above it, wrapped at 100 columns.
        head: what stands at the top of the file.
    """
    lines, apart = _comment(head, ""), bool(head)
    for key, value in raw.items():
        own = key in comments or _block(value, key, comments)
        if lines and (own or apart):
            lines.append("")
        lines += _entry(key, value, key, "", comments)
        apart = own
    return "\n".join(lines).lstrip("\n") + "\n"


def _entry(key: str, value: Any, dotted: str, indent: str, comments: Mapping[str, str]) -> list[str]:
    lines = _comment(comments.get(dotted, ""), indent)
    if not _block(value, dotted, comments):
        return [*lines, f"{indent}{_flow(key)}: {_flow(value)}"]
    lines.append(f"{indent}{_flow(key)}:")
    if isinstance(value, Mapping):
        for k, v in value.items():
            lines += _entry(str(k), v, f"{dotted}.{k}", indent + "  ", comments)
        return lines
    for i, item in enumerate(value):
        lines += _item(item, f"{dotted}.{i}", indent + "  ", comments)
    return lines


def _item(item: Any, dotted: str, indent: str, comments: Mapping[str, str]) -> list[str]:
    """One entry of a list; the dash takes the place of the first key's indentation."""
    if not isinstance(item, Mapping) or not _block(item, dotted, comments):
        return [*_comment(comments.get(dotted, ""), indent), f"{indent}- {_flow(item)}"]
    lines = [x for k, v in item.items() for x in _entry(str(k), v, f"{dotted}.{k}", indent + "  ", comments)]
    first = next(i for i, line in enumerate(lines) if not line.lstrip().startswith("#"))
    lines[first] = f"{indent}- {lines[first].lstrip()}"
    return [*_comment(comments.get(dotted, ""), indent), *lines]


def _block(value: Any, dotted: str, comments: Mapping[str, str]) -> bool:
    """Whether a value takes lines of its own: a comment is inside it, or it would not fit into one line."""
    if not isinstance(value, Mapping | list) or not value:
        return False
    inside = any(k.startswith(f"{dotted}.") for k in comments)
    if isinstance(value, list):
        return inside or (any(isinstance(v, Mapping) for v in value)) or len(_flow(value)) > WIDTH
    return inside or len(_flow(value)) > WIDTH - 20


def _flow(value: Any) -> str:
    """A value in one line."""
    plain = {"default_flow_style": True, "allow_unicode": True, "sort_keys": False, "width": 1 << 20}
    return yaml.safe_dump([_plain(value)], **plain).strip()[1:-1]  # type: ignore[call-overload,no-any-return]


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML knows."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _comment(text: str, indent: str) -> list[str]:
    out: list[str] = []
    for paragraph in text.splitlines():
        # A command is to be copied: it stays in one line.
        whole = paragraph.startswith("    ")
        wrapped = [paragraph] if whole else textwrap.wrap(paragraph, WIDTH - len(indent) - 2) or [""]
        out += [f"{indent}# {line}".rstrip() for line in wrapped]
    return out
