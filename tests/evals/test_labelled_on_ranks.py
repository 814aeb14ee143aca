"""Tasks on labelled items of one modality give the same file on one and on two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dualenc_evals.catalog import parse_task
from dualenc_evals.harness import evaluate

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import from_path, plain, run
from _shared import ROOT
from test_dense import folder, said
from test_eval_tasks import picture
from test_last_blocks import VIT, model

TASKS: dict[str, dict[str, Any]] = {
    "prototypes": {
        "kind": "classification", "classes": ["red", "blue", "green"], "templates": ["{}"],
        "metrics": ["top1", "fisher_ratio", "silhouette"],
        "prototypes": {"support": {"split": "train"}, "each": 2, "background": 3, "keep": 2},
    },
    "probe": {
        "kind": "probe", "train": {"split": "train"}, "probe": {"k": 5},
        "metrics": ["knn_top1", "knn_gain", "silhouette"],
    },
    "instances": {"kind": "instances", "metrics": ["mAP", "R@1", "mAP@5"]},
}  # fmt: skip
COLOURS = {"red": (220, 20, 9), "blue": (9, 20, 220), "green": (9, 220, 20), "grey": (99, 99, 99)}


def write(tmp: Path) -> list[str]:
    """The tasks' files, on pictures of noisy colours."""
    for part, shift in (("train", 0), ("test", 3)):
        for name, colour in COLOURS.items():
            place = tmp / "f" / part / name
            place.mkdir(parents=True)
            for i in range(9):
                shade = tuple(min(255, c + (7 * i * (k + 1) + shift) % 31) for k, c in enumerate(colour))
                (place / f"{i}.png").write_bytes(picture(shade))  # type: ignore[arg-type]
    (tmp / "f/test/red/4.png").write_bytes(b"no picture")
    files = []
    for name, fields in TASKS.items():
        path = tmp / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"source": {"kind": "folder", "path": "./f", "split": "test"}, **fields}))
        files.append(str(path))
    return files


def run_both(world: Any, files: list[str], masked: str) -> str:
    """The tasks of ``files``, and a dense one with prototypes of places by a small tower of ours."""
    prototypes = {"support": {"where": {"part": "b"}}, "each": 2, "background": 3}
    fields = said(Path(masked), background="0", prototypes=prototypes)
    fields["source"]["where"] = {"part": "a"}
    more = evaluate(model(VIT, 32), [parse_task(fields)], world=world, batch_size=4, progress=False)
    results = json.loads(run(world, files))
    results["tasks"]["dense"] = more["tasks"]["a"]
    return plain(results)


@pytest.mark.dist
@pytest.mark.slow
def test_one_and_two_ranks_give_the_same_file(tmp_path: Path) -> None:
    spawn = from_path("_spawn", ROOT / "tests" / "distributed" / "_spawn.py").spawn
    (tmp_path / "masked").mkdir()
    given = {"files": write(tmp_path), "masked": str(folder(tmp_path / "masked", 14))}
    alone = json.loads(run_both(None, **given))
    assert len(alone["tasks"]) == len(TASKS) + 1
    first, second = (json.loads(text) for text in spawn(Path(__file__), "run_both", 2, given))
    assert first == alone
    for name, task in second["tasks"].items():
        assert task == {k: v for k, v in alone["tasks"][name].items() if k != "details"}
        assert task["skipped"]["count"] == (name != "dense")
