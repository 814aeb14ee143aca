"""The documentation site: built strictly, complete, and nothing in it is loaded from another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from _shared import PYTHONPATH, ROOT
from pydantic import BaseModel

SITE = ROOT / "docs" / "site"
sys.path.insert(0, str(SITE))

LOADED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}
"""Tags and the attribute that makes a browser fetch something."""


class Fetches(HTMLParser):
    """Addresses that a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADED and given.get(LOADED[tag]) and given.get("rel") != "canonical":
            self.found.append(str(given[LOADED[tag]]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(SITE / "mkdocs.yml"), "-d", str(out)]
    done = subprocess.run(command, env=env, cwd=out, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr, done.stderr
    return out


@pytest.mark.slow
def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 35
    for page in pages:
        parser = Fetches()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.found
        for address in parser.found:
            assert not re.match(r"(\w+:)?//", address), (page.name, address)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_the_generator_is_not_published(site: Path) -> None:
    assert {p.name for p in (site / "site").iterdir()} == {"style.css"}
    assert (site / "reference" / "recipe.html").is_file()
    assert (site / "contributing.html").is_file()


def sections(model: type[BaseModel], seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
    from models import sections_in

    if model not in seen:
        seen.add(model)
        for info in model.model_fields.values():
            for inner in sections_in(info.annotation):
                sections(inner, seen)
    return seen


def test_every_key_says_what_it_is() -> None:
    """What has no description in the code has none on its page."""
    from dualenc.config import Recipe
    from dualenc.data.modalities import modalities
    from dualenc.distill.terms.term import terms
    from dualenc.encoders import families, own_towers
    from dualenc.losses import losses
    from dualenc_data_tools.sources import sources
    from dualenc_evals.kinds import kinds

    parts: list[Any] = [modalities[n] for n in modalities] + [losses[n] for n in losses] + [terms[n] for n in terms]
    parts += [families[n] for n in families if n != "own"] + [own_towers[n] for n in own_towers]
    models = [
        Recipe,
        *(p.Config for p in parts),
        *(kinds[n].Task for n in kinds),
        *(sources[n].config for n in sources),
    ]
    found: set[type[BaseModel]] = set()
    for model in models:
        sections(model, found)
    assert len(found) > 60
    fields = [(f"{m.__qualname__}.{k}", info) for m in found for k, info in m.model_fields.items()]
    silent = [key for key, info in fields if not info.description and not key.endswith("Task.kind")]
    assert silent == []


def test_reference_pages_name_everything_that_is_registered() -> None:
    import reference

    from dualenc.data.modalities import modalities
    from dualenc.distill.terms.term import terms
    from dualenc.encoders import own_towers
    from dualenc.losses import losses
    from dualenc.shipped import shipped_recipes
    from dualenc_data_tools.sources import sources
    from dualenc_evals.catalog import task_files
    from dualenc_evals.kinds import kinds

    names: dict[str, Any] = {
        "inputs": [f"`{n}`" for n in modalities],
        "encoders": [f"`own/{n}`" for n in own_towers],
        "losses": [f"`{n}`" for n in (*losses, *terms)],
        "sources": [f"`{n}`" for n in sources],
        "tasks": [f"`kind: {n}`" for n in kinds] + [f"`{n}`" for n in task_files()],
        "commands": ["`dualenc train`", "`dualenc shards build`", "`--dry-run`", "`--max-restarts`"],
        "exit-codes": ["| 130 |", "`ConfigError`", "| 6 |"],
        "recipes": [f"`{n}`" for n in shipped_recipes()],
    }
    for page, wanted in names.items():
        text = reference.PAGES[f"reference/{page}.md"]()
        assert [n for n in wanted if n not in text] == [], page
    recipe = reference.PAGES["reference/recipe.md"]()
    assert "| `lr` | number > 0 | `0.001` |" in recipe
    assert "| `kind` | `accelerate` or `deepspeed` | `accelerate` |" in recipe
