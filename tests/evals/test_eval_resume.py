"""A killed evaluation goes on; any object can be evaluated; features and files are found by content."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dualenc.errors import ConfigError, DataError
from dualenc_evals.catalog import load_task
from dualenc_evals.harness import evaluate

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import Pixels
from _shared import PYTHONPATH
from test_eval_harness import pairs, small

HELPER = Path(__file__).with_name("_pixels.py")
ROOT = Path(__file__).parents[2]


def two_tasks(tmp: Path) -> list[str]:
    out = []
    for name, n in (("a", 20), ("b", 40)):
        (tmp / name).mkdir()
        path = Path(small(tmp / name, pairs(n)))
        out.append(str(path.rename(path.with_name(f"{name}.yaml"))))
    return out


def go(tasks: list[str], model: Any, **options: Any) -> dict[str, Any]:
    return evaluate(model, [load_task(t) for t in tasks], batch_size=2, progress=False, **options)


def compared(path: Path) -> str:
    """The file's text without ``run``: when, and on how many ranks."""
    results = json.loads(path.read_text(encoding="utf-8"))
    del results["run"]
    return json.dumps(results, ensure_ascii=False, indent=1)


def test_a_killed_evaluation_goes_on_and_gives_the_same_file(tmp_path: Path) -> None:
    tasks = two_tasks(tmp_path)
    whole = Pixels()
    go(tasks, whole, out=tmp_path / "whole.json")
    # 20 + 20 items are 2 + 2 chunks of 16, 40 + 40 are 3 + 3. The second task's first chunks are the first task's,
    # found by content, so the kill at the seventh call comes within its texts.
    assert whole.embedded == [16, 4, 16, 4, 16, 16, 8, 16, 16, 8]
    out, cache = tmp_path / "out.json", tmp_path / "cache"
    command = [sys.executable, str(HELPER), json.dumps(tasks), str(out), str(cache), "6"]
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=env, check=False, timeout=120).returncode == -9
    assert list(json.loads(out.read_text())["tasks"]) == ["a"]
    left = Pixels()
    go(tasks, left, out=out, cache_dir=cache, resume=True)
    assert left.embedded == [16, 8]
    assert compared(out) == compared(tmp_path / "whole.json")
    again = Pixels()
    go(tasks, again, out=out, cache_dir=cache)
    assert again.embedded == []
    assert compared(out) == compared(tmp_path / "whole.json")


def test_results_of_something_else_are_not_gone_on_with(tmp_path: Path) -> None:
    tasks, out = two_tasks(tmp_path), tmp_path / "out.json"
    go(tasks[:1], Pixels(), out=out)

    class Other(Pixels):
        def describe(self) -> dict[str, Any]:
            return {"name": "pixels", "weights_sha256": "1" * 64}

    with pytest.raises(ConfigError, match=r"model\.weights_sha256 = '0+', now it is '1+'"):
        go(tasks, Other(), out=out, resume=True)
    with pytest.raises(ConfigError, match=r"environment\.seed = 0, now it is 1"):
        go(tasks, Pixels(), out=out, resume=True, seed=1)
    Path(tasks[0]).write_text(Path(tasks[0]).read_text() + "identical: merge\n")
    with pytest.raises(ConfigError, match="task a has changed"):
        go(tasks, Pixels(), out=out, resume=True)
    with pytest.raises(ConfigError, match="--out"):
        go(tasks, Pixels(), resume=True)
    out.write_text("{")
    with pytest.raises(DataError, match="is not a results file"):
        go(tasks, Pixels(), out=out, resume=True)


def test_any_object_with_the_two_methods_can_be_evaluated(tmp_path: Path) -> None:
    """The example of docs/evaluation.md: no base class, no bundle, nothing of ours in the model."""

    class Mine:
        modalities = ("image", "text")

        def embed(self, modality: str, items: Sequence[Any], batch_size: int = 64) -> Tensor:
            table = torch.zeros(len(items), 256)
            for row, item in zip(table, items, strict=True):
                raw = item.encode() if isinstance(item, str) else item
                row += torch.bincount(torch.tensor(list(raw)), minlength=256)
            return torch.nn.functional.normalize(table, dim=1)

        def describe(self) -> dict[str, Any]:
            return {"name": "byte counts"}

    name = small(tmp_path, pairs(12))
    results = evaluate(Mine(), [load_task(name)], out=tmp_path / "mine.json", cache_dir=tmp_path / "c", progress=False)
    assert results["model"] == {"name": "byte counts"}
    assert results["tasks"]["small"]["n"] == {"image": 12, "text": 12}
    assert json.loads((tmp_path / "mine.json").read_text())["tasks"] == results["tasks"]
    assert not (tmp_path / "c").exists()  # it does not say which weights it has, so nothing is kept


def test_files_are_looked_at_once_where_the_caller_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualenc_evals.read.shards import Content

    name = small(tmp_path, pairs(6))
    reads: list[str] = []
    read = Content.read
    monkeypatch.setattr(Content, "read", lambda self: (reads.append(self.id), read(self))[1])
    seen: dict[Any, Any] = {}
    first = go([name], Pixels(), seen=seen, details=False)
    once = len([r for r in reads if "#" not in r])
    reads.clear()
    second = go([name], Pixels(), seen=seen, details=False)
    # Pictures are read to digest them and to embed them; the second time only to embed them.
    assert (once, len([r for r in reads if "#" not in r])) == (6 + 6, 6)
    assert first["tasks"] == second["tasks"]


def test_strings_of_like_length_are_embedded_together(tmp_path: Path) -> None:
    members = pairs(8)
    for i in range(1, 16, 2):
        members[i] = (members[i][0], b"word " * (1 + i * 7 % 16))

    class Watching(Pixels):
        def embed(self, modality: str, items: Any, batch_size: int = 64) -> Tensor:
            if modality == "text":
                lengths.extend(map(len, items))
            return super().embed(modality, items, batch_size)

    lengths: list[int] = []
    got = go([small(tmp_path, members)], Watching())["tasks"]["small"]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 8
    assert got["metrics"] == go([small(tmp_path, members)], Pixels())["tasks"]["small"]["metrics"]


def test_a_folder_that_cannot_be_written_to_costs_the_cache_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    name = small(tmp_path, pairs(6))
    got = go([name], Pixels(), cache_dir=tmp_path / "file" / "cache")
    assert got["tasks"] == go([name], Pixels())["tasks"]
    assert "Features are not cached" in caplog.text


def test_kept_features_are_plain_safetensors(tmp_path: Path) -> None:
    """Readable without us: features under the modality's name, and beside them which content each row is of."""
    from safetensors.torch import load_file

    from dualenc_evals.features import digest

    members = pairs(6)
    go([small(tmp_path, members)], Pixels(), cache_dir=tmp_path / "cache")
    texts = {digest(raw.decode()): raw.decode() for name, raw in members if name.endswith(".txt")}
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        said, tensors = json.loads(file.with_suffix(".json").read_text()), load_file(file)
        if "text" in tensors:
            ids = [said["ids"][i] for i in tensors["text.rows"].tolist()]
            assert set(ids) == set(texts)
            assert torch.equal(tensors["text"], Pixels().embed("text", [texts[i] for i in ids]))
            break
    else:
        raise AssertionError("no part holds texts")
