"""How far apart classes are: against scikit-learn, plain loops, and numbers worked out by hand; on real photos."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import calinski_harabasz_score, silhouette_samples

from dualenc_evals.catalog import load_task, parse_task
from dualenc_evals.harness import definition, evaluate
from dualenc_evals.metrics import scores as metrics
from dualenc_evals.metrics import separability
from dualenc_evals.pages.run import write_report

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import Pixels
from _shared import DATA as SHARED_DATA

needs_shared = pytest.mark.skipif(not SHARED_DATA.exists(), reason=f"the real data are not below {SHARED_DATA}")


def cloud(seed: int, counts: list[int], spread: float = 0.5) -> tuple[torch.Tensor, Any]:
    """Unit rows [N, 6] around one centre a class, and their labels."""
    gen = torch.Generator().manual_seed(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = torch.randn(len(counts), 6, generator=gen)[torch.from_numpy(labels)]
    x = torch.nn.functional.normalize(centres + spread * torch.randn(len(labels), 6, generator=gen), dim=1)
    return x, labels


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), counts=st.lists(st.integers(1, 7), min_size=2, max_size=5))
def test_both_are_those_of_scikit_learn(seed: int, counts: list[int]) -> None:
    x, labels = cloud(seed, [*counts, 2])
    classes = len(counts) + 1
    want = silhouette_samples(x.double().numpy(), labels, metric="cosine")
    assert separability.silhouette(x, labels, classes) == pytest.approx(want, abs=1e-6)
    factor = (len(x) - classes) / (classes - 1)
    index = calinski_harabasz_score(x.double().numpy(), labels)
    assert separability.fisher_ratio(x, labels, classes) * factor == pytest.approx(index, rel=1e-6)


def test_by_loops_with_a_class_without_items(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = cloud(3, [4, 0, 5, 1])
    d = 1 - (x.double() @ x.double().T).numpy()
    want = []
    for i, c in enumerate(labels):
        own = [d[i, j] for j in range(10) if labels[j] == c and j != i]
        a, b = np.mean(own) if own else 0, min(np.mean(d[i, labels == k]) for k in set(labels) - {c})
        want.append((b - a) / max(a, b) if own else 0)
    assert separability.silhouette(x, labels, 4) == pytest.approx(want, abs=1e-6)
    mean = x.double().mean(0)
    means = {c: x.double()[torch.from_numpy(labels == c)].mean(0) for c in set(labels)}
    between = sum(float((means[c] - mean).square().sum()) for c in labels)
    within = sum(float((x[i].double() - means[c]).square().sum()) for i, c in enumerate(labels))
    assert separability.fisher_ratio(x, labels, 4) == pytest.approx(between / within)
    far = separability.centroid_distances(x, labels, 4)
    assert far[1] == [None] * 4
    assert [row[1] for row in far] == [None] * 4
    assert [far[c][c] for c in (0, 2, 3)] == [0, 0, 0]
    cosine = float(torch.nn.functional.cosine_similarity(means[0], means[3], dim=0))
    assert far[0][3] == far[3][0] == pytest.approx(1 - cosine, abs=1e-4)
    whole = separability.silhouette(x, labels, 4), separability.fisher_ratio(x, labels, 4)
    monkeypatch.setattr(separability, "block_starts", lambda n, m: metrics.block_starts(n, m, 3 * m))
    assert separability.silhouette(x, labels, 4) == pytest.approx(whole[0], abs=1e-12)
    assert separability.fisher_ratio(x, labels, 4) == pytest.approx(whole[1])


def test_what_is_known_without_computing() -> None:
    x, labels = cloud(0, [5, 5, 5])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    names = np.array([2, 0, 1])[labels]
    for other in (x @ turn, x):  # a rotation, and other class numbers
        assert separability.fisher_ratio(other, names, 3) == pytest.approx(
            separability.fisher_ratio(x, labels, 3), rel=1e-5
        )
        assert separability.silhouette(other, names, 3) == pytest.approx(
            separability.silhouette(x, labels, 3), abs=1e-5
        )
    points = torch.eye(6)[[0, 0, 1, 1]]
    two = np.array([0, 0, 1, 1])
    assert separability.fisher_ratio(points, two, 2) == math.inf
    assert separability.silhouette(points, two, 2).tolist() == [1.0] * 4
    same = torch.eye(6)[[0, 0, 0, 0]]
    assert separability.silhouette(same, two, 2).tolist() == [0.0] * 4
    assert math.isnan(separability.fisher_ratio(x, np.zeros(15, dtype=np.int64), 3))
    assert np.isnan(separability.silhouette(x, np.zeros(15, dtype=np.int64), 3)).all()


@needs_shared
def test_a_task_asks_for_them_and_the_page_shows_the_distances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALENC_DATA", str(SHARED_DATA))
    tasks = []
    for name, further in (("cifar10", "top1"), ("cifar10_probe", "knn_top1")):
        said = load_task(name).model_dump(exclude_unset=True)
        said["source"] = {**said["source"], "limit": 200}
        tasks.append(parse_task({**said, "metrics": [further, "fisher_ratio", "silhouette"]}))
    assert definition(tasks[0]) != definition(load_task("cifar10"))
    results = evaluate(Pixels(), tasks, progress=False)
    got = results["tasks"]
    for name, first in (("cifar10", "top1"), ("cifar10_probe", "knn_top1")):
        assert set(got[name]["metrics"]) == {first, "fisher_ratio", "silhouette"}
        # The eight pixels of a side say little about what is on a photo.
        assert 0 < got[name]["metrics"]["fisher_ratio"] < 1
        assert -1 < got[name]["metrics"]["silhouette"] < 0.5
        assert len(got[name]["details"]["centroid_distances"]) == 10
    unasked = parse_task({**tasks[1].model_dump(exclude_unset=True), "metrics": ["knn_top1"]})
    assert "details" not in evaluate(Pixels(), [unasked], progress=False)["tasks"]["cifar10_probe"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("<h3>Distance between classes</h3>") == 2
    assert "airplane, truck: 0." in page
