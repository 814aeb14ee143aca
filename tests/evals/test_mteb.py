"""mteb both ways: its own tasks on local copies in the schema of the Hub; nothing is downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from _shared import DATA, PYTHONPATH, ROOT

from benchmarks import mteb_tasks
from benchmarks.mteb_copies import TASKS, copies
from dualenc.config import Recipe, parse
from dualenc.errors import ConfigError, DataError
from dualenc.model import Bundle, build_bundle

mteb: Any = pytest.importorskip("mteb", reason="pip install 'dualenc[mteb]'")


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


QUICK = ["CIFAR10ZeroShot", "ESC50PairClassification", "STSBenchmark"]
LIKE_ANOTHER = ["CIFAR10Clustering", "STL10", "STL10ZeroShot", "Flickr30kI2TRetrieval", "MSCOCOT2IRetrieval", "FSDD"]
LIKE_ANOTHER += ["Fashion200kT2IRetrieval", "AROCocoOrder", "ESC50Clustering", "ClothoT2ARetrieval", "SICK-R"]


@pytest.fixture(scope="module")
def needs_data() -> None:
    if not (DATA / "image_text" / "coco_cc").is_dir() or not (DATA / "audio_text").is_dir():
        pytest.skip(f"needs images, clips and captions below {DATA}")


def assert_as_stock(names: list[str], folder: Path) -> None:
    found = mteb_tasks.compare(names, folder)
    for name, (ours, stock, apart) in found.items():
        print(f"{name}: {ours:.4f} {stock:.4f}")
        assert apart <= 1e-6, (name, ours, stock)
    assert list(found) == names


@pytest.mark.slow
def test_scores_are_those_of_stock_mteb(needs_data: None, tmp_path: Path) -> None:
    assert_as_stock(QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.timeout(3600)
def test_scores_of_the_other_tasks_are_those_of_stock_mteb(needs_data: None, tmp_path: Path) -> None:
    """Classification, clustering, retrieval, reranking, pairs and STS of images, clips and texts."""
    assert len(TASKS) >= 20
    assert_as_stock([n for n in TASKS if n not in QUICK], tmp_path)


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.timeout(3600)
def test_the_command_on_two_ranks_and_after_a_kill(needs_data: None, tmp_path: Path) -> None:
    """The files are the same byte for byte on one rank, on two, and where the command was killed and resumed."""
    mteb_tasks.model().save(tmp_path / "m")
    tasks = [n for n in TASKS if n not in LIKE_ANOTHER]
    assert len(tasks) >= 20
    copies(tmp_path / "data" / "mteb", tasks)
    names = ",".join(f"mteb:{n}" for n in tasks)

    def start(out: str, *launch: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([PYTHONPATH, os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"PYTHONPATH": path, "DUALENC_DATA": str(tmp_path / "data")}
        env |= {"DUALENC_CACHE": str(tmp_path / out / "cache")}
        command = [sys.executable, "-m", "dualenc", *launch, "eval", str(tmp_path / "m"), "--tasks", names]
        command += ["--out", str(tmp_path / out / "results.json"), "--batch-size", "8"]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(out: str, *launch: str) -> dict[str, bytes]:
        process = start(out, *launch)
        said, _ = process.communicate(timeout=3000)
        assert process.returncode == 0, said[-2000:]
        found = {f.name: f.read_bytes() for f in (tmp_path / out / "mteb").rglob("*.json")}
        assert len(found) == len(tasks) + 1  # model_meta.json
        return found

    one = run("one")
    assert run("two", "launch", "--nproc", "2") == one
    killed = start("killed")
    while len(list((tmp_path / "killed").rglob("mteb/**/*.json"))) < 6:
        assert killed.poll() is None
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").rglob("mteb/**/*.json")}
    assert len(before) < len(one)
    assert run("killed") == one
    kept = {p: p.stat().st_mtime_ns for p in before if p.name != "model_meta.json"}
    assert all(before[p] == at for p, at in kept.items())  # finished tasks are not run again


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.timeout(3600)
def test_mteb_s_mock_tasks(bundle: Bundle) -> None:
    """Every kind of task that mteb has, on its own made-up data."""
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID

    from dualenc.mteb import wrap

    ours, done = wrap(bundle), set()
    assert isinstance(ours, mteb.EncoderProtocol)
    options: Any = {"batch_size": 8, "show_progress_bar": False}
    for task in ALL_MOCK_TASK_TEST_GRID:
        if set(task.metadata.modalities) <= {"text", "image"}:
            mteb.evaluate(ours, task, cache=None, co2_tracker=False, encode_kwargs=options, public_only=False)
            done.add(task.metadata.name)
    assert len(done) >= 40


def test_what_there_is_not(bundle: Bundle, tmp_path: Path) -> None:
    from dualenc.mteb import evaluate_mteb

    with pytest.raises(ConfigError, match=r"mteb has no task 'ESC5O'.*ESC50"):
        evaluate_mteb(bundle, ["mteb:ESC5O"], tmp_path)
    with pytest.raises(ConfigError, match=r"there is no Nothing in json"):
        evaluate_mteb(bundle, ["mteb:json:Nothing"], tmp_path)


def test_benchmarks_are_their_tasks() -> None:
    from dualenc.cli.evaluate import _names
    from dualenc.mteb import find_tasks

    assert _names("mteb:MTEB(eng, v2), x,mteb:ESC50") == ["mteb:MTEB(eng, v2)", "x", "mteb:ESC50"]
    tasks = find_tasks(["MIEB(lite)", "CIFAR10ZeroShot", "ESC50"])
    names = [t.metadata.name for t in tasks]
    assert len(names) == len(set(names)) > 40
    assert "ESC50" in names
    with pytest.raises(ConfigError, match=r"mteb has no benchmark 'MIEB\(small\)'"):
        find_tasks(["MIEB(small)"])


def test_data_that_cannot_be_loaded_is_named(bundle: Bundle, tmp_path: Path) -> None:
    from dualenc.mteb import evaluate_mteb

    with pytest.raises(DataError, match=r"task STSBenchmark \(mteb/stsbenchmark-sts\) cannot be loaded.*a copy may be"):
        evaluate_mteb(bundle, ["STSBenchmark"], tmp_path)
