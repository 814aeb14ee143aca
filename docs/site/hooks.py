"""What mkdocs calls: it adds the generated pages and turns links to files of the repository into links to pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [
    str(f) for f in (HERE, ROOT, ROOT / "evals", ROOT / "data_tools")
]  # mkdocs takes it back after the import

from reference import GENERATED, PAGES, anchor_of, from_root  # noqa: E402

from dualenc.shipped import recipes_folder, shipped_recipes  # noqa: E402

FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\]\((?:\.\./)+(recipes/[^)#]+\.yaml|CONTRIBUTING\.md|CHANGELOG\.md)\)")
FENCE = re.compile(r"^(```\w+) ([\w.]+)$", re.MULTILINE)
"""A block that the tests write to a file of that name."""
SHORT_CODE = re.compile(r"<code>([^<\s]{1,32})</code>")
NAMES = {f"recipes/{p.relative_to(recipes_folder()).as_posix()}": n for n, p in shipped_recipes().items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from code and from the files at the top of the repository."""
    made = {path: make() + GENERATED for path, make in PAGES.items()}
    made |= {path: from_root(name) for name, path in FROM_ROOT.items()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """``../recipes/finetune/clip.yaml`` is a file in the repository and a heading of a page on the site."""
    up = "../" * page.file.src_uri.count("/")

    def on_site(match: re.Match[str]) -> str:
        target = match[1]
        return (
            f"]({up}{FROM_ROOT[target] if target in FROM_ROOT else f'reference/recipes.md#{anchor_of(NAMES[target])}'})"
        )

    return FENCE.sub(r'\1 title="\2"', LINK.sub(on_site, markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Mark code without spaces, which is not to be broken at its hyphens: ``--dry-run``."""
    return SHORT_CODE.sub(r'<code class="whole">\1</code>', html)
