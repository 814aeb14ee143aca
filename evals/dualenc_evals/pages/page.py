"""What the pages about evaluations share: the template environment, how an item is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment

from dualenc import pages
from dualenc.errors import DataError
from dualenc_evals.pages.svg import compact
from dualenc_evals.pages.table import is_geometry, label, number, short

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> Environment:
    """Templates of this folder, with the filters and functions that they use."""
    env = pages.environment(TEMPLATES)
    env.filters |= {"label": label, "compact": compact}
    env.globals |= {"number": number, "short": short, "is_geometry": is_geometry}
    env.globals |= {"picture": picture, "sound": sound, "media": media, "shown": shown}
    return env


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; empty when there is none. Raises DataError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        got = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{path} is damaged: {e}") from e
    if not isinstance(got, dict):
        raise DataError(f"{path} must hold a JSON object, not {type(got).__name__}")
    return got


def confusion_view(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows as shares of the true class, so that rare classes are as visible as frequent ones."""
    counts = details.get("confusion")
    if not counts:
        return None
    rows = []
    for t, row in enumerate(counts):
        total = sum(row)
        cells = [{"n": n, "v": n / total if total else 0.0, "right": t == p} for p, n in enumerate(row)]
        rows.append({"name": details["classes"][t], "total": total, "cells": cells})
    return {"rows": rows, "classes": details["classes"], "numbers": len(rows) <= 16}


def picture(item: Mapping[str, Any]) -> str:
    """The item's thumbnail, if it is embedded in the file itself; the page loads nothing from outside."""
    address = str(item.get("picture", ""))
    return address if re.fullmatch(r"data:image/(webp|png|jpeg);base64,[A-Za-z0-9+/=]+", address) else ""


def sound(item: Mapping[str, Any]) -> str:
    """The item's audio, if it is embedded in the file itself."""
    address = str(item.get("sound", ""))
    return address if re.fullmatch(r"data:audio/(ogg|flac|wav|mpeg);base64,[A-Za-z0-9+/=]+", address) else ""


def media(item: Mapping[str, Any]) -> bool:
    """Whether the item is an image or audio, not text."""
    return bool(picture(item) or sound(item))


def shown(item: Mapping[str, Any]) -> str:
    """The text or name of an item that is not shown as an image."""
    return str(item.get("text") or item.get("name") or "")


def flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as dotted lines."""
    if isinstance(values, dict):
        return [line for k, v in values.items() for line in flat(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(values, list) and any(isinstance(v, dict) for v in values):
        return [line for i, v in enumerate(values) for line in flat(v, f"{prefix}.{i}")]
    text = ", ".join(map(str, values)) if isinstance(values, list) else str(values)
    return [(prefix, text or "–")]
