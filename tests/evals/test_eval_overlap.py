"""A result says how many of the task's items the model was trained on."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from _shared import ROOT

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(ROOT / "tests" / "train"))
from _pixels import Pixels
from _runs import environment
from test_eval_harness import pairs, small

from dualenc.config import load_recipe
from dualenc.model import build_bundle
from dualenc_evals import overlap
from dualenc_evals.catalog import load_task
from dualenc_evals.harness import evaluate
from dualenc_evals.overlap import training_sources
from dualenc_evals.pages.models import write_comparison

SHARDS = ROOT / "recipes" / "quickstart" / "data"


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def run_folder(folder: Path, *shards: str | Path, **more: Any) -> Path:
    """What training leaves of its recipe."""
    folder.mkdir(exist_ok=True)
    rows = [{"name": f"s{i}", "shards": str(s)} for i, s in enumerate(shards)]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "r", "data": {"sources": rows}, **more}))
    return folder


def seen(task: str, run: Path, out: Path | None = None) -> dict[str, Any]:
    results = evaluate(Pixels(), [load_task(task)], progress=False, out=out, training=training_sources(run))
    return dict(results["tasks"]["small"])


def test_items_are_found_by_their_bytes_whatever_they_are_called(tmp_path: Path) -> None:
    task = small(tmp_path, pairs(12))
    images = [raw for name, raw in pairs(12) if name.endswith("png")]
    # Three of them under other keys, one of those twice; the captions of the others; an image of the same size.
    other = bytearray(images[5])
    other[-20] ^= 1
    trained = [("x.jpg", images[3]), ("y.png", images[7]), ("z.png", images[7]), ("q.img.png", images[11])]
    trained += [(f"t{i}.txt", f"word{i}".encode()) for i in range(12)] + [("v.png", bytes(other))]
    shard(tmp_path / "train-0.tar", trained[:2])
    shard(tmp_path / "train-1.tar", trained[2:])
    got = seen(task, run_folder(tmp_path / "r", tmp_path / "train-{0..1}.tar"), tmp_path / "out.json")
    assert got["in_training"] == {"count": 3, "of": 12, "complete": True, "unread": {}}
    assert "3 of 12 items occur in the training shards." in got["notes"]
    assert json.loads((tmp_path / "out.json").read_text())["tasks"]["small"]["in_training"]["count"] == 3
    page = write_comparison([tmp_path / "out.json"], tmp_path / "page.html")
    assert "3 of 12 items occur in the training shards." in page.read_text(encoding="utf-8")


def test_files_are_compared_with_members(tmp_path: Path) -> None:
    rows = []
    for i, (name, raw) in enumerate(p for p in pairs(5) if p[0].endswith("png")):
        (tmp_path / name).write_bytes(raw)
        rows.append(json.dumps({"image": name, "caption": f"c{i}"}) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    source = {"kind": "jsonl", "path": "./rows.jsonl", "members": {"image": ["file:image"], "text": ["caption"]}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"kind": "retrieval", "source": source}))
    shard(tmp_path / "train.tar", pairs(2))
    got = seen(str(tmp_path / "small.yaml"), run_folder(tmp_path / "r", tmp_path / "train.tar"))
    assert (got["in_training"]["count"], got["in_training"]["of"]) == (2, 5)


def test_nothing_is_said_where_nothing_is_known(tmp_path: Path) -> None:
    task = small(tmp_path, pairs(6))
    shard(tmp_path / "train.tar", pairs(20)[14:])
    clean = seen(task, run_folder(tmp_path / "r", tmp_path / "train.tar"))
    assert clean["in_training"] == {"count": 0, "of": 6, "complete": True, "unread": {}}
    assert not any("occur in the training" in n for n in clean["notes"])
    assert "in_training" not in seen(task, tmp_path / "no run")
    (tmp_path / "r" / "recipe.yaml").write_text("{data: [")
    assert "in_training" not in seen(task, tmp_path / "r")
    shard(tmp_path / "half.tar", pairs(3))
    run = run_folder(tmp_path / "r", tmp_path / "half.tar", "nowhere-{0..9}.tar", "https://h/x.tar", "pipe:touch made")
    partly = seen(task, run)
    assert (partly["in_training"]["count"], sorted(partly["in_training"]["unread"])) == (3, ["s1", "s2", "s3"])
    assert "at least 3 of 6 items occur in the training shards." in partly["notes"]
    assert not Path("made").exists()
    (tmp_path / "half.tar").write_bytes(b"not a tar")
    assert sorted(seen(task, run)["in_training"]["unread"]) == ["s0", "s1", "s2", "s3"]


def test_reading_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = small(tmp_path, pairs(12))
    shard(tmp_path / "train.tar", pairs(12))
    run = run_folder(tmp_path / "r", tmp_path / "train.tar")
    monkeypatch.setattr(overlap, "READS", 4)
    got = seen(task, run)
    assert (got["in_training"]["count"], got["in_training"]["complete"]) == (4, False)
    assert "at least 4 of 12 items occur in the training shards." in got["notes"]


def test_a_recipe_that_came_with_a_checkpoint_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also found from a checkpoint of a run, and from the bundle in it; a bundle elsewhere has none."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "somebody.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    run = run_folder(tmp_path / "r", "a.tar", plugins=["somebody"])
    build_bundle(load_recipe("quickstart")).save(run / "checkpoints" / "step-1" / "model")
    assert [s.shards for s in training_sources(run)] == ["a.tar"]
    assert [s.shards for s in training_sources(run / "checkpoints" / "step-1" / "model")] == ["a.tar"]
    (run / "checkpoints" / "step-1" / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("a.", "b."))
    assert [s.shards for s in training_sources(run / "checkpoints" / "step-1")] == ["b.tar"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.dist
@pytest.mark.slow
def test_the_command_says_it_alike_on_one_and_two_ranks(tmp_path: Path) -> None:
    build_bundle(load_recipe("quickstart")).save(tmp_path / "r")
    run_folder(tmp_path / "r", SHARDS / "train-000000.tar")
    members = [(m.name, raw) for m, raw in _members(SHARDS / "train-000000.tar")][:30]
    task = small(tmp_path, [*members, *((m.name, raw) for m, raw in _members(SHARDS / "val-style-000000.tar"))][:60])
    found = []
    for ranks in ("1", "2"):
        out = tmp_path / f"{ranks}.json"
        command = [sys.executable, "-m", "dualenc", "launch", "--nproc", ranks, "eval", str(tmp_path / "r")]
        command += ["--task", task, "--out", str(out), "--no-cache"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "15 of 30 items occur in the training shards." in " ".join(done.stdout.split())
        found.append(json.loads(out.read_text())["tasks"])
    assert found[0] == found[1]


def _members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(m, f.read()) for m in tar if (f := tar.extractfile(m)) is not None]
