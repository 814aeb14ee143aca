"""The fenced blocks of every page in the repository, and what becomes of each: run, read as a recipe, or listed.

A new page needs no registration: its blocks are found and run, in order, in a copy of the folder that ``_workplace``
makes. What a block is decides what happens to it:

=====================  =============================================================================================
``bash``, ``sh``       run by bash, stopping at the first command that fails; ``dualenc … train`` gets a short budget
``python``             run as a program; consecutive ones share a process, not their names
``yaml``               a task (it has ``source``) is loaded, anything else goes into the quickstart's recipe and through
                       ``dualenc train --dry-run``
``toml``, ``json``     must be readable
any, with a file name  (```` ```python mine.py ````) written to that file, for the blocks after it
``console``, none, …   must be in :data:`NOT_RUN`, with the reason
=====================  =============================================================================================
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from _shared import ROOT

NOT_RUN = {
    "README.md: make quickstart   # .venv": "both run all of this; test_makefile_targets checks that they exist",
    "README.md: pip install .": "tests/test_wheel.py builds the wheel and installs it into an environment of its own",
    "README.md: runs/NAME/": "a listing of what a run leaves behind, not a command",
    "CONTRIBUTING.md: make setup": "they would run the tests themselves; test_makefile_targets checks that they exist",
    "docs/architecture.md: tests, recipes": "the layers, which tests/test_layering.py reads from the imports",
    "docs/evaluation.md: python tests/evals/_peers.py": "measures for minutes; tests/evals/test_eval_peers.py runs its "
    "parts",
    "docs/plan.md: image_text_vit_s32: 43.2 M": "what the first command above it prints",
    "docs/plan.md: engine       ranks": "measurements; python -m benchmarks.plan prints them",
    "docs/plan.md: model       engine": "measurements; the two commands above it print them",
    "recipes/quickstart/data/README.md: 8066be5eb": "check sums",
}
"""Blocks that no test runs as they stand: ``PAGE: BEGINNING OF THE BLOCK`` → why. Every line must meet one block."""

RUN, READ = ("bash", "sh", "python", "yaml"), ("toml", "json")
_FENCE = re.compile(r"^(?P<indent>[ >]*)(?P<mark>`{3,}|~{3,})\s*(?P<info>.*?)\s*$")
_HIDDEN = {"build", "dist", "runs", "site", "node_modules"}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path of its page in the repository.
        line: of its fence, from 1.
        language: the word after the fence; empty without one.
        file: the name it is written to, if it has one: ``python mine.py`` or ``python title="mine.py"``.
        text: what stands in it, without the indentation of the fence.
    """

    page: str
    line: int
    language: str
    file: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def listed(self) -> str | None:
        """Its entry in :data:`NOT_RUN`."""
        first = self.text.lstrip()
        keys = (k for k in NOT_RUN if k.startswith(f"{self.page}: "))
        return next((k for k in keys if first.startswith(k.removeprefix(f"{self.page}: "))), None)


def pages() -> list[str]:
    """Every Markdown file of the repository, as paths below its root."""
    found = (p.relative_to(ROOT) for p in ROOT.rglob("*.md"))
    return sorted(str(p) for p in found if not any(x.startswith(".") or x in _HIDDEN for x in p.parts[:-1]))


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order.

    Raises:
        ValueError: a fence is not closed.
    """
    lines = ((ROOT / page).read_text(encoding="utf-8") if text is None else text).splitlines()
    out: list[Block] = []
    n = 0
    while n < len(lines):
        opened = _FENCE.match(lines[n])
        n += 1
        if opened is None or (opened["mark"][0] == "`" and "`" in opened["info"]):
            continue
        start, end = n, f"^[ >]*{opened['mark'][0]}{{{len(opened['mark'])},}}\\s*$"
        while n < len(lines) and not re.match(end, lines[n]):
            n += 1
        if n == len(lines):
            raise ValueError(f"{page}:{start}: this block is not closed")
        language, _, rest = opened["info"].strip("{} ").removeprefix(".").partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        plain = re.fullmatch(r"[\w./-]+\.\w+", rest.strip())
        file = title[1] if title else rest.strip() if plain else ""
        width = len(opened["indent"])
        body = "\n".join(line[width:] for line in lines[start:n])
        out.append(Block(page, start, language, file, textwrap.dedent(body) + "\n"))
        n += 1
    return out


def spans_of(page: str) -> list[tuple[int, str]]:
    """(line, text) of the code spans outside blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for b in blocks_of(page):
        lines = text.splitlines()
        height = b.text.count("\n") + 2
        lines[b.line - 1 : b.line - 1 + height] = [""] * height
        text = "\n".join(lines)
    return [(text[: m.start()].count("\n") + 1, " ".join(m[1].split())) for m in re.finditer(r"`([^`]+)`", text)]
