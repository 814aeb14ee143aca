"""``python _run_blocks.py FILE …``: run Python blocks, load tasks, dry-run recipes, each as if it were alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml


def run_python(path: Path) -> None:
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"__name__": "__main__"})


def check_yaml(path: Path) -> None:
    """A part of a task or of a recipe, made whole by what it leaves out."""
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(said, dict), f"{path}: not a mapping"
    if "source" in said:
        from dualenc_evals.catalog import load_task

        load_task(str(_whole(path, {"kind": "retrieval", **said})))
    else:
        from dualenc.cli import app

        app(
            ["train", str(_whole(path, {"base": "quickstart", **said})), "--dry-run"],
            standalone_mode=False,
        )


def _whole(path: Path, content: dict[str, Any]) -> Path:
    whole = Path(f"{path.stem}-whole.yaml")  # in the working folder: "./" in a task is the folder of its file
    whole.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return whole


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"--- {name}", file=sys.stderr, flush=True)
        (run_python if name.endswith(".py") else check_yaml)(Path(name))
