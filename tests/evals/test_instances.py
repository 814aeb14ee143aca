"""Instance retrieval within one modality: against a loop over every ranking, and on real stamps and objects."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dualenc.errors import DataError
from dualenc_evals.catalog import load_task, parse_task
from dualenc_evals.harness import evaluate, print_table
from dualenc_evals.kinds.instances import others_ahead
from dualenc_evals.metrics import ranking
from dualenc_evals.metrics.scores import Ints, Positives
from dualenc_evals.pages.run import write_report
from dualenc_evals.read.shards import read_rows

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import Pixels
from _shared import DATA as SHARED_DATA
from test_eval_tasks import picture

needs_shared = pytest.mark.skipif(not SHARED_DATA.exists(), reason=f"the real data are not below {SHARED_DATA}")


def precision_by_loops(x: torch.Tensor, labels: Any, k: int) -> list[float]:
    """AP@k of each query that has a right answer: the others in order, wrong ones first where scores are equal."""
    s = (x @ x.T).tolist()
    out = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        order = sorted(others, key=lambda j: (-s[i][j], labels[j] == labels[i]))
        right = [labels[j] == labels[i] for j in order]
        if any(right):
            found = [sum(right[: r + 1]) / (r + 1) for r in range(min(k, len(right))) if right[r]]
            out.append(sum(found) / min(sum(right), k))
    return out


def queries_of(labels: Any) -> Ints:
    return np.flatnonzero(np.bincount(labels)[labels] > 1)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 14), seed=st.integers(0, 10**6), block=st.integers(1, 60), k=st.integers(1, 14))
def test_average_precision_equals_a_loop_with_ties(n: int, seed: int, block: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.integers(-2, 3, (n, 3)).astype(np.float32))
    labels = rng.integers(0, 4, n)
    queries = queries_of(labels)
    if not len(queries):
        return
    ahead, positives = others_ahead(x, labels, queries, elements=block)
    assert ranking.average_precision(ahead, positives, k) == pytest.approx(precision_by_loops(x, labels, k))
    parts = [others_ahead(x, labels, queries, (r, 2), block)[0] for r in range(2)]
    assert sum(parts).tolist() == ahead.tolist()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 8), m=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_sorting_many_right_answers_changes_nothing(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, g = (torch.from_numpy(rng.integers(-2, 3, (size, 3)).astype(np.float32)) for size in (n, m))
    g[rng.random(m) < 0.1] = torch.nan
    positives = Positives([sorted(rng.choice(m, rng.integers(1, m + 1), replace=False).tolist()) for _ in range(n)], m)
    compared = ranking.wrong_ahead(q, g, positives, elements=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "MANY", 0)
        assert ranking.wrong_ahead(q, g, positives, elements=20).tolist() == compared.tolist()


def test_perfect_and_collapsed_features() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    queries = queries_of(labels)
    assert queries.tolist() == [0, 1, 2, 3, 4]
    ahead, positives = others_ahead(torch.eye(3)[torch.from_numpy(labels)], labels, queries)
    assert positives.counts.tolist() == [2, 2, 2, 1, 1]
    assert ranking.average_precision(ahead, positives, 5).tolist() == [1.0] * 5
    # All the same: the right answers are last.
    ahead, positives = others_ahead(torch.ones(6, 1), labels, queries)
    assert ranking.average_precision(ahead, positives, 5) == pytest.approx([(1 / 4 + 2 / 5) / 2] * 3 + [1 / 5] * 2)


def test_a_label_of_its_own_and_a_table(tmp_path: Path) -> None:
    for name, colours in {"red": [200, 210, 220], "blue": [90, 95], "one": [5], "two": [250]}.items():
        (tmp_path / "f" / name).mkdir(parents=True)
        for i, c in enumerate(colours):
            (tmp_path / "f" / name / f"{i}.png").write_bytes(picture((c, 30, 255 - c)))
    said = {"kind": "instances", "name": "a", "source": {"kind": "folder", "path": str(tmp_path / "f")}}
    results = evaluate(Pixels(), [parse_task(said)], progress=False)
    got = results["tasks"]["a"]
    assert got["n"] == {"image": 7, "queries": 5, "labels": 4}
    assert "2 items have a label of their own: they are answers, not queries." in got["notes"]
    assert got["metrics"] == {"mAP": 1.0, "R@1": 1.0}
    assert got["chance"]["R@1"] == pytest.approx((3 * 2 / 6 + 2 * 1 / 6) / 5, abs=1e-6)
    for row in got["details"]["examples"][0]["rows"]:
        assert row["query"] not in [h["item"] for h in row["hits"]]
        assert len(row["hits"]) == 5
    console = Console(width=120, record=True, file=io.StringIO())
    print_table(results, console)
    text = console.export_text()
    assert "image → image" in text
    assert "R@1 %" in text
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "<h3>image → image</h3>" in write_report(tmp_path).read_text(encoding="utf-8")
    lonely = {**said, "source": {**said["source"], "where": {"class": ["one", "two"]}}}  # type: ignore[dict-item]
    with pytest.raises(DataError, match="no two items have the same label"):
        evaluate(Pixels(), [parse_task(lonely)], progress=False)


class Camera(Pixels):
    """Crops of camera images as pictures."""

    modalities = ("camera", "image")  # type: ignore[assignment]

    def embed(self, modality: str, items: Any, batch_size: int = 64) -> torch.Tensor:
        return super().embed("image", items, batch_size)


@needs_shared
@pytest.mark.parametrize(
    ("name", "modality", "limit"),
    [("tuxpaint_groups", "image", 300), pytest.param("scene0523_instances", "camera", 80, marks=pytest.mark.slow)],
)
def test_real_stamps_and_objects(name: str, modality: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALENC_DATA", str(SHARED_DATA))
    task = load_task(name)
    task = task.model_copy(update={"source": task.source.model_copy(update={"limit": limit})})
    got = evaluate(Camera(), [task], progress=False)["tasks"][name]
    assert got["n"][modality] == limit
    rows = read_rows(task).rows
    labels = np.unique([str(r.label) for r in rows], return_inverse=True)[1]
    x = Camera().embed(modality, [r.contents[modality][0].read() for r in rows])
    assert got["metrics"]["mAP"] == pytest.approx(np.mean(precision_by_loops(x, labels, limit)), abs=1e-4)
    low, high = got["ci"]["mAP"]
    assert got["chance"]["mAP"] < low < got["metrics"]["mAP"] < high
