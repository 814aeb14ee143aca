"""What every HTML page shares: a single file that loads nothing, one look, everything escaped.

A page is a Jinja template that extends ``base.html.j2`` and fills its blocks: ``title``, ``header``, ``main``, and
where needed ``style`` (more CSS), ``allows`` (what the Content-Security-Policy allows besides styles, such as
``img-src data:;``), ``scripts`` and ``end`` (before the end of the body).
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dualenc.files import write_atomically

TEMPLATES = Path(__file__).parent / "templates"


def environment(*folders: Path) -> Environment:
    """Templates of ``folders`` and the shared ones; values are escaped, an undefined name is an error."""
    return Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(page: Path, html: str) -> Path:
    """Write a page atomically (a reader finds the old one or the new one) and return its path. Raises OSError."""
    return write_atomically(page, html)
