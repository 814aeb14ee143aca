"""Captions of Open Clip Art drawings, from the RDF inside each SVG."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

MAX_KEYWORDS = 5
MAX_DESCRIPTION = 119
MIN_DESCRIPTION = 8
_GENERIC = {
    "", "hash", "sign", "shape", "symbol", "symbols", "signs and symbols", "united nations member", "flags",
    "computer", "unsorted", "icon", "icons", "appicon", "mimeicon", "openclipart",
}  # fmt: skip
_NOT_A_DESCRIPTION = re.compile(r"^hash\(|inkscape|http|www|@|svg", re.IGNORECASE)


def rdf_of(path: Path) -> tuple[str, str, list[str]]:
    """(title, description, keywords) of an SVG's ``cc:Work``; empty where there is none."""
    try:
        root = ET.parse(path).getroot()
    except ET.ParseError:
        return "", "", []
    work = next((e for e in root.iter() if _name(e) == "Work"), None)
    if work is None:
        return "", "", []
    parts = {_name(e): e for e in reversed(list(work))}
    subject = parts.get("subject")
    keywords = [e.text or "" for e in subject.iter() if _name(e) == "li"] if subject is not None else []
    title, description = (parts[n].text or "" if n in parts else "" for n in ("title", "description"))
    return title, description, keywords


def clipart_caption(path: Path) -> str:
    """Title, description if informative, and up to five keywords that the title does not contain."""
    title, description, keywords = rdf_of(path)
    title = " ".join(re.sub(r"[_\-]", " ", title).replace("#", "").split())
    # "Bus1", "Stickyman 001": the number distinguishes drawings but does not describe them.
    title = re.sub(r"[\s.]*\d+$", "", title) or title
    description = " ".join(description.replace("_", " ").split()) if not _NOT_A_DESCRIPTION.search(description) else ""
    text = title
    if MIN_DESCRIPTION <= len(description) <= MAX_DESCRIPTION and description.lower() != title.lower():
        inside = title.lower() in description.lower() and len(title.split()) <= 2
        text = description if inside else f"{title}: {description}"
    kept: list[str] = []
    for word in (" ".join(k.replace("_", " ").replace("#", "").split()) for k in keywords):
        low = word.lower()
        plain = low not in _GENERIC and not low.startswith(("hash(", "signs and symbols/")) and len(low) > 2
        if plain and low not in title.lower() and word not in kept:
            kept.append(word)
    return ", ".join([text, *kept[:MAX_KEYWORDS]])


def _name(element: ET.Element) -> str:
    return str(element.tag).rsplit("}", 1)[-1]
