"""Blocks of a page that a benchmark writes: between ``<!-- NAME -->`` and ``<!-- /NAME -->``."""

from __future__ import annotations

import re
from pathlib import Path

from dualenc.errors import DualencError
from dualenc.files import write_atomically


def put_block(page: Path, name: str, text: str) -> None:
    """Replace a block.

    Raises:
        DualencError: if the page has no such block.
    """
    old = page.read_text(encoding="utf-8")
    block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not block.search(old):
        raise DualencError(f"{page} has no block {name!r}; write <!-- {name} --> and <!-- /{name} --> around one")
    write_atomically(page, block.sub(lambda m: f"{m[1]}\n{text}\n\n{m[2]}", old))
