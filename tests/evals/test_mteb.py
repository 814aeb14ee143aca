"""mteb both ways, on its own mock tasks (real task classes, data made in memory; nothing is downloaded)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from _shared import PYTHONPATH, ROOT

from dualenc.config import Recipe, parse
from dualenc.errors import ConfigError
from dualenc.model import Bundle, build_bundle

mteb: Any = pytest.importorskip("mteb", reason="pip install 'dualenc[mteb]' ; with polars 60 MB, so not in dev")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    image = {"input": {"size": 32}, "encoder": {"name": "own/convnet", "widths": [16, 32], "depths": [1, 1]}}
    text = {
        "input": {"tokenizer": "clip-bpe:8192", "context_length": 32},
        "encoder": {"name": "own/transformer", "width": 32, "layers": 1, "heads": 2},
    }
    raw = {
        "name": "t",
        "modalities": {"image": image, "text": text},
        "embed_dim": 24,
        "data": {"sources": [{"name": "a", "shards": "x.tar"}]},
        "batch": {"size": 4},
        "budget": {"steps": 1},
    }
    return build_bundle(parse(Recipe, raw, {}, "test"))


def stock(model: Any, task: Any) -> Any:
    options: Any = {"batch_size": 8, "show_progress_bar": False}
    done = mteb.evaluate(
        model, task, cache=None, co2_tracker=False, show_progress_bar=False, encode_kwargs=options, public_only=False
    )
    return done.task_results[0].scores


def same(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for split in a:
        for x, y in zip(a[split], b[split], strict=True):
            assert x["main_score"] == pytest.approx(y["main_score"], abs=1e-6, nan_ok=True)


@pytest.mark.slow
@pytest.mark.extra
def test_scores_are_those_of_mteb_with_sentence_transformers(bundle: Bundle, tmp_path: Path) -> None:
    """The same model as a SentenceTransformer, which mteb wraps by itself, and through ours: every mock task."""
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID

    from dualenc.model.export.export import export
    from dualenc.mteb import wrap
    from dualenc.sentence_transformers import load

    ours, theirs = wrap(bundle), load(export(bundle, "sentence-transformers", tmp_path / "st"), "cpu")
    assert isinstance(ours, mteb.EncoderProtocol)
    done = set()
    for task in ALL_MOCK_TASK_TEST_GRID:
        if set(task.metadata.modalities) <= {"text", "image"}:
            scores = stock(ours, task)
            if set(task.metadata.modalities) == {"text"}:  # mteb takes any SentenceTransformer for one of texts
                same(scores, stock(theirs, task))
            done.add(task.metadata.name)
    print(f"{len(done)} tasks")
    assert len(done) >= 40


@pytest.mark.slow
@pytest.mark.extra
def test_the_command_on_two_ranks_and_again(bundle: Bundle, tmp_path: Path) -> None:
    bundle.save(tmp_path / "m")
    mocks = "mteb.mocks.mock_tasks"
    tasks = (
        f"mteb:{mocks}:MockAny2AnyRetrievalI2TTask,mteb:{mocks}:MockSTSTask,mteb:{mocks}:MockImageClassificationTask"
    )
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "DUALENC_CACHE": str(tmp_path / "cache")}

    def run(out: str, *launch: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "dualenc", *launch, "eval", str(tmp_path / "m"), "--tasks", tasks]
        command += ["--out", str(tmp_path / out / "results.json"), "--batch-size", "8"]
        got = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert got.returncode == 0, got.stderr[-2000:]
        files = sorted((tmp_path / out / "mteb").rglob("Mock*.json"))
        assert len(files) == 3
        return {f.name: json.loads(f.read_text())["scores"] for f in files}

    one = run("one")
    assert run("two", "launch", "--nproc", "2") == one
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob("Mock*.json")}
    assert run("one") == one  # finished tasks are kept
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_what_there_is_not(bundle: Bundle, tmp_path: Path) -> None:
    from dualenc.mteb import evaluate_mteb

    with pytest.raises(ConfigError, match=r"mteb has no task 'ESC5O'.*ESC50"):
        evaluate_mteb(bundle, ["mteb:ESC5O"], tmp_path)
    with pytest.raises(ConfigError, match=r"there is no Nothing in json"):
        evaluate_mteb(bundle, ["mteb:json:Nothing"], tmp_path)


def test_a_task_of_mteb_on_a_local_copy(bundle: Bundle, tmp_path: Path) -> None:
    """CIFAR10 zero-shot, in the schema that mteb expects (parquet with an image and a label), from a local folder."""
    import io

    import numpy as np
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Pictures

    from dualenc.mteb import evaluate_mteb, find_task

    task = find_task("STSBenchmark", None)
    path = tmp_path / "data" / task.metadata.dataset["path"]
    path.mkdir(parents=True)
    texts = {"sentence1": ["a cat", "a dog", "a red car", "rain"], "sentence2": ["a cat", "cats", "a blue car", "sun"]}
    Dataset.from_dict({**texts, "score": [5.0, 3.0, 2.0, 0.0]}).to_parquet(str(path / "test.parquet"))
    scores = evaluate_mteb(bundle, ["STSBenchmark"], tmp_path / "out", data=tmp_path / "data")
    assert -1 <= scores["STSBenchmark"]["test"] <= 1

    images = mteb.get_task("CIFAR10")
    path = tmp_path / "data" / images.metadata.dataset["path"]
    path.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    for _ in range(40):
        file = io.BytesIO()
        Pictures.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        rows.append({"bytes": file.getvalue(), "path": None})
    columns = {images.input_column_name: rows, images.label_column_name: [i % 2 for i in range(40)]}
    kinds = Features({images.input_column_name: Image(), images.label_column_name: Value("int64")})
    for split in {"train", *images.metadata.eval_splits}:
        Dataset.from_dict(columns, features=kinds).to_parquet(str(path / f"{split}.parquet"))
    scores = evaluate_mteb(bundle, ["CIFAR10"], tmp_path / "out", data=tmp_path / "data")
    assert 0 <= scores["CIFAR10"]["test"] <= 1
