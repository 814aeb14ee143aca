"""Every metric on hand-written cases and against a naive double loop."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualenc_evals.metrics import scores as metrics
from dualenc_evals.metrics.scores import Positives, best_ranks, class_ranks

ROOT = Path(__file__).parents[2]


def naive_ranks(q: torch.Tensor, g: torch.Tensor, right: list[list[int]]) -> list[int]:
    """1 + wrong candidates that score at least as high as the best right one, in a loop over all pairs, fp64."""
    out = []
    for i, own in enumerate(right):
        s = [float((q[i].double() * g[j].double()).sum()) for j in range(len(g))]
        best = max(s[j] for j in own)
        out.append(1 + sum(s[j] >= best for j in range(len(g)) if j not in own))
    return out


def unit(*angles: float) -> torch.Tensor:
    """Unit vectors in the plane by angle in degrees."""
    a = torch.tensor(angles) * math.pi / 180
    return torch.stack([a.cos(), a.sin()], 1)


def test_ranks_by_hand() -> None:
    # Query at 0°; gallery at 10°, 50°, 20°, 30°. By closeness: 0, 2, 3, 1.
    g = unit(10, 50, 20, 30)
    q = unit(0, 0, 0)
    assert best_ranks(q, g, Positives([[0], [3], [1]], 4)).tolist() == [1, 3, 4]


def test_several_captions_take_the_best_and_do_not_push_each_other() -> None:
    g = unit(10, 50, 20, 30)
    # Right: 2 and 3. Only item 0 is before the better of them, though item 2 is before item 3.
    assert best_ranks(unit(0), g, Positives([[3, 2]], 4)).tolist() == [2]
    # All right: first.
    assert best_ranks(unit(0), g, Positives([[0, 1, 2, 3]], 4)).tolist() == [1]


def test_ties_count_against_the_model() -> None:
    g = unit(10, 10, 10, 60)
    assert best_ranks(unit(0), g, Positives([[0]], 4)).tolist() == [3]  # two wrong ones score the same
    assert best_ranks(unit(0), g, Positives([[0, 1]], 4)).tolist() == [2]
    collapsed = torch.nn.functional.normalize(torch.ones(50, 16), dim=1)
    ranks = best_ranks(collapsed, collapsed, Positives([[i] for i in range(50)], 50))
    assert ranks.tolist() == [50] * 50


@pytest.mark.parametrize("width", [7, 64, 129, 512])
def test_equal_rows_tie_exactly_wherever_they_stand(width: int) -> None:
    g = torch.nn.functional.normalize(torch.randn(257, width, generator=torch.Generator().manual_seed(1)), dim=1)
    g[[0, 100, 255, 256]] = g[17].clone()
    ranks = best_ranks(g[17:18], g, Positives([[17]], 257))
    assert ranks.tolist() == [5]


def test_not_a_number_is_last() -> None:
    g = unit(10, 50, 20, 30)
    g[1] = torch.nan  # a wrong candidate without a score stands before the right one
    assert best_ranks(unit(0), g, Positives([[0]], 4)).tolist() == [2]
    assert best_ranks(torch.full((1, 2), torch.nan), unit(1, 2, 3), Positives([[0]], 3)).tolist() == [3]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 12), m=st.integers(1, 12), seed=st.integers(0, 10**6), block=st.integers(1, 40))
def test_ranks_equal_the_double_loop_in_any_blocks_and_shards(n: int, m: int, seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    # Small integers: ties happen, and every sum is exact.
    q = torch.from_numpy(rng.integers(-2, 3, (n, 3)).astype(np.float32))
    g = torch.from_numpy(rng.integers(-2, 3, (m, 3)).astype(np.float32))
    right = [sorted(rng.choice(m, size=rng.integers(1, m + 1), replace=False).tolist()) for _ in range(n)]
    positives = Positives(right, m)
    expected = naive_ranks(q, g, right)
    assert best_ranks(q, g, positives, elements=block).tolist() == expected
    parts = [best_ranks(q, g, positives, elements=block, shard=(r, 3)) for r in range(3)]
    assert sum(parts).tolist() == expected


def test_ranks_of_random_features_equal_the_double_loop() -> None:
    gen = torch.Generator().manual_seed(3)
    q, g = (torch.nn.functional.normalize(torch.randn(k, 32, generator=gen), dim=1) for k in (40, 120))
    right = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(40)]
    assert best_ranks(q, g, Positives(right, 120)).tolist() == naive_ranks(q, g, right)
    back = [[j // 3] for j in range(120)]
    assert best_ranks(g, q, Positives(back, 40)).tolist() == naive_ranks(g, q, back)


PEAK = """
import resource, torch
from dualenc_evals.metrics.scores import Positives, best_ranks
torch.set_num_threads(1)
n = 14_000
x = torch.nn.functional.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(0)), dim=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert best_ranks(x, x, Positives([[i] for i in range(n)], n)).tolist() == [1] * n
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_that_of_a_block_not_of_the_matrix() -> None:
    got = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(got.stdout) < 350 * 1024  # KiB; the matrix alone would be 784 MB


def test_positives_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="query 1 has no right answer"):
        Positives([[0], []], 2)
    with pytest.raises(ValueError, match="outside the gallery of 2"):
        Positives([[2]], 2)


def test_values_from_ranks() -> None:
    ranks = np.array([1, 2, 6, 11])
    got = metrics.retrieval_values(ranks)
    assert got == {
        "R@1": 0.25,
        "R@5": 0.5,
        "R@10": 0.75,
        "MRR": pytest.approx((1 + 1 / 2 + 1 / 6 + 1 / 11) / 4),
        "median_rank": 4.0,
        "mean_rank": 5.0,
    }


@pytest.mark.parametrize(("m", "M"), [(1, 4), (2, 5), (3, 6), (6, 6)])
def test_chance_equals_all_orders(m: int, M: int) -> None:
    # All placements of m right answers among M: the best place of each.
    places = [min(c) + 1 for c in itertools.combinations(range(M), m)]
    got = metrics.chance_retrieval(np.array([m, m]), M, (1, 2, 10))
    assert got["R@1"] == pytest.approx(np.mean([p <= 1 for p in places]))
    assert got["R@2"] == pytest.approx(np.mean([p <= 2 for p in places]))
    assert got["R@10"] == pytest.approx(1.0)
    assert got["mean_rank"] == pytest.approx(np.mean(places)) == pytest.approx((M + 1) / (m + 1))
    assert got["MRR"] == pytest.approx(np.mean([1 / p for p in places]))
    assert got["median_rank"] == sorted(places)[(len(places) - 1) // 2]


def test_chance_of_mixed_queries_is_their_mean() -> None:
    mixed = metrics.chance_retrieval(np.array([1, 3]), 10)
    alone = [metrics.chance_retrieval(np.array([m]), 10) for m in (1, 3)]
    for k in ("R@1", "R@5", "MRR", "mean_rank"):
        assert mixed[k] == pytest.approx((alone[0][k] + alone[1][k]) / 2)


def test_classification_by_hand() -> None:
    scores = torch.tensor([[3.0, 1, 2], [1, 3, 2], [3, 3, 1], [0, 1, 2], [5, 5, 5]])
    labels = np.array([0, 2, 0, 1, 2])
    ranks, predicted = class_ranks(scores, labels)
    assert ranks.tolist() == [1, 2, 2, 2, 3]  # the third and the last tie: against the model
    assert predicted.tolist() == [0, 1, 1, 2, 0]
    assert metrics.confusion_matrix(labels, predicted, 3).tolist() == [[1, 1, 0], [0, 0, 1], [1, 1, 0]]
    got = metrics.classification_values(ranks, labels, predicted)
    assert got["top1"] == pytest.approx(1 / 5)
    assert got["top5"] == 1.0
    assert got["mean_per_class_recall"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert metrics.chance_classification(8) == {"top1": 0.125, "top5": 0.625, "mean_per_class_recall": 0.125}


def test_classes_with_the_same_prompts_are_told_apart_by_order_only() -> None:
    scores = torch.tensor([[2.0, 2, 1], [2, 2, 1]])
    twins = np.array([1, 0, 0])  # class 1 has the prompts of class 0
    ranks, predicted = class_ranks(scores, np.array([0, 1]), twins)
    assert ranks.tolist() == [1, 2]
    assert predicted.tolist() == [0, 0]


def test_a_class_without_items_is_not_in_the_mean() -> None:
    labels, predicted = np.array([0, 0, 2]), np.array([0, 1, 2])
    assert metrics.mean_per_class_recall(labels, predicted) == pytest.approx((1 / 2 + 1) / 2)


def test_bootstrap_covers_the_binomial_interval_and_repeats() -> None:
    values = {"R@1": np.repeat([1.0, 0.0], [300, 700])}
    low, high = metrics.bootstrap_ci(values, seed=0)["R@1"]
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - half, abs=0.004)
    assert high == pytest.approx(0.3 + half, abs=0.004)
    assert metrics.bootstrap_ci(values, seed=0)["R@1"] == [low, high]
    assert metrics.bootstrap_ci(values, seed=1)["R@1"] != [low, high]


def test_captions_of_one_item_are_drawn_together() -> None:
    x = np.repeat([1.0, 0.0], 50)  # 20 items with 5 equal values: as good as 20 values, not 100
    groups = np.repeat(np.arange(20), 5)
    alone = metrics.bootstrap_ci({"v": x})["v"]
    together = metrics.bootstrap_ci({"v": x}, groups)["v"]
    ratio = (together[1] - together[0]) / (alone[1] - alone[0])
    assert ratio == pytest.approx(math.sqrt(5), rel=0.15)


def test_geometry_by_hand_and_naive() -> None:
    a, b = unit(0, 90), unit(180, 270)
    assert metrics.modality_gap(a, b) == pytest.approx(math.sqrt(2))
    assert metrics.alignment(a, b) == pytest.approx(4.0)
    assert metrics.mean_offdiagonal_cosine(a) == pytest.approx(0.0, abs=1e-7)
    x = torch.nn.functional.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(2)), dim=1)
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    cosines = [float(x[i] @ x[j]) for i, j in pairs]
    assert metrics.mean_offdiagonal_cosine(x) == pytest.approx(np.mean(cosines), abs=1e-6)
    naive = math.log(np.mean([math.exp(-2 * float((x[i] - x[j]).square().sum())) for i, j in pairs]))
    assert metrics.uniformity(x, elements=70) == pytest.approx(naive, abs=1e-6)


def test_top_k_is_in_order_and_breaks_ties_by_row() -> None:
    rows, scores = metrics.top_k(unit(0), unit(30, 10, 30, 90), 3)
    assert rows.tolist() == [[1, 0, 2]]
    assert scores[0].tolist() == sorted(scores[0].tolist(), reverse=True)
