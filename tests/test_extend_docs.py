"""The pages of docs/extend: the modules they show are written to files, and the other blocks run, in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from _shared import PYTHONPATH, ROOT

PAGES = sorted((ROOT / "docs" / "extend").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_every_block_of_every_page_runs(tmp_path: Path) -> None:
    """In one process of its own: what they register is not for the other tests."""
    ran = []
    for page in PAGES:
        for language, file, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if file:
                (tmp_path / file).write_text(text, encoding="utf-8")
            elif language == "python":
                ran.append(f"# {page.name}\n{text}")
            elif language == "yaml":
                assert isinstance(yaml.safe_load(text), dict), page
    assert len(ran) == 7
    (tmp_path / "pages.py").write_text("\n".join(ran), encoding="utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), PYTHONPATH]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "pages.py"], env=env, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "extend" / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in PAGES if p.name != "README.md" and f"({p.name})" not in index] == []
