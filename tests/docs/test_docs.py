"""Every fenced block of every page runs as it stands, or is listed with the reason (``_blocks.NOT_RUN``)."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from _blocks import NOT_RUN, READ, RUN, Block, blocks_of, pages, spans_of
from _shared import ROOT
from _workplace import NEEDS, Workplace

from dualenc.cli import app

PAGES = pages()
MADE = {
    "README.md": ("models.html", "tuned-hf/config.json", "runs/student/checkpoints"),
    "docs/python.md": ("runs/finetuned/checkpoints",),
    "docs/finetune.md": ("runs/finetune/clap/checkpoints", "between/interpolate.html"),
    "docs/evaluation.md": ("page.html", "mine.json"),
}
"""What must be there once a page has run."""
RUNNER = Path(__file__).with_name("_run_blocks.py")


def runs(page: str) -> list[Block]:
    """Blocks that run or are written to a file."""
    return [b for b in blocks_of(page) if b.listed is None and (b.file or b.language in (*RUN, *READ))]


@pytest.fixture(scope="session")
def workplace(installed_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    root = tmp_path_factory.mktemp("docs")
    yield Workplace(root, installed_python)
    shutil.rmtree(root)  # a model of 300 MB is in it


def test_the_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/finetune.md", "docs/extend/loss.md"} <= set(PAGES)
    assert {"docs/cluster/launch.md", "docs/howto/photos.md", "recipes/quickstart/data/README.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_listed(page: str) -> None:
    stray = [b for b in blocks_of(page) if b not in runs(page) and b.listed is None]
    assert [f"{b.where}: {b.text.splitlines()[0]}" for b in stray] == [], (
        "give the block a language that is run (bash, python, yaml), or list it in tests/docs/_blocks.py with a reason"
    )


def test_every_listed_block_is_there_and_says_why() -> None:
    used = [b.listed for page in PAGES for b in blocks_of(page) if b.listed is not None]
    assert sorted(used) == sorted(NOT_RUN)
    assert all(NOT_RUN.values())


def steps(page: str) -> list[list[Block]]:
    """What is run together: a shell block alone, consecutive Python and YAML blocks in one process."""
    kept = [b for b in runs(page) if not b.file and b.language in RUN]
    out: list[list[Block]] = []
    for shell, blocks in itertools.groupby(kept, key=lambda b: b.language in ("bash", "sh")):
        group = list(blocks)
        out += [[b] for b in group] if shell else [group]
    return out


FIRST = ("README.md", "docs/start.md", "docs/python.md")
"""Pages that ``make test`` runs; the others, a quarter of an hour together, are run by ``make test-all``."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=() if p in FIRST else pytest.mark.extra) for p in PAGES if runs(p)]
)
def test_a_page_runs(page: str, workplace: Workplace) -> None:
    if page in NEEDS and not NEEDS[page].is_dir():
        pytest.skip(f"{page} needs {NEEDS[page]}")
    folder = workplace.copy(page, (ROOT / page).read_text(encoding="utf-8"))
    for b in runs(page):
        if b.file:
            (folder / b.file).write_text(b.text, encoding="utf-8")
        elif b.language == "toml":
            tomllib.loads(b.text)
        elif b.language == "json":
            json.loads(b.text)
    for step in steps(page):
        if step[0].language in ("bash", "sh"):
            command = ["bash", "-exuo", "pipefail", "-c", step[0].text]
        else:
            files = [folder / f"line{b.line}.{'py' if b.language == 'python' else 'yaml'}" for b in step]
            for file, b in zip(files, step, strict=True):
                file.write_text(b.text, encoding="utf-8")
            command = [str(workplace.python), str(RUNNER), *(f.name for f in files)]
        done = workplace.run(command, folder)
        assert done.returncode == 0, f"{step[0].where}\n{done.stdout[-1500:]}\n{done.stderr[-4000:]}"
    assert [name for name in MADE.get(page, ()) if not (folder / name).exists()] == []


# --- what is checked without running it ------------------------------------------------------------------------------


def test_commands_in_sentences_exist() -> None:
    """``dualenc …`` in code spans: the command and its options are there."""
    found = 0
    for page in PAGES:
        for line, span in spans_of(page):
            if not span.startswith("dualenc ") or page == "CHANGELOG.md":
                continue
            found += 1
            words = span.split("#")[0].split()[1:]
            command = typer.main.get_command(app)
            options: set[str] = set()
            while words:
                word, words = words[0], words[1:]
                inner = getattr(command, "commands", {})
                if word in inner:
                    command = inner[word]
                    options |= {o for p in command.params for o in p.opts}
                    if word == "launch":
                        options |= {"--help"}
                elif inner and re.fullmatch(r"[a-z][a-z-]*", word):
                    raise AssertionError(f"{page}:{line}: {span}: there is no command {word}")
                elif word == "--":  # what follows is another program's
                    break
                elif word.startswith("--"):
                    assert word.split("=")[0].rstrip(",.") in options | {
                        "--plugins",
                        "--debug",
                        "--version",
                        "--help",
                    }, f"{page}:{line}: {span}"
                elif word in ("train", "eval", "embed"):  # after launch
                    command = typer.main.get_command(app).commands[word]  # type: ignore[attr-defined]
                    options |= {o for p in command.params for o in p.opts}
    assert found > 20


def test_makefile_targets() -> None:
    """``make X`` on any page is a target."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M))
        assert named <= targets, (page, named - targets)


def test_blocks_are_found_wherever_they_stand() -> None:
    """Indented, with more backticks, with tildes, with attributes as documentation sites write them."""
    page = "\n".join([
        "1. a list", "   ```bash", "   echo a", "   ```", '````python title="x.py"', "```", "````", "~~~ yaml",
        "a: 1", "~~~", "``` { .toml }", "a = 1", "```", "text ```not a block``` text", '=== "tab"', "",
        "    ```json", "    {}", "    ```", "```", "plain", "```",
    ])  # fmt: skip
    found = [(b.language, b.file, b.text) for b in blocks_of("x.md", page)]
    assert found == [
        ("bash", "", "echo a\n"),
        ("python", "x.py", "```\n"),
        ("yaml", "", "a: 1\n"),
        ("toml", "", "a = 1\n"),
        ("json", "", "{}\n"),
        ("", "", "plain\n"),
    ]
    with pytest.raises(ValueError, match="not closed"):
        blocks_of("x.md", "```bash\necho")
