"""Metrics that look at more than the best right answer, each against a written-out answer; probes on small clouds."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualenc_evals.kinds import compositional, multilabel, probes
from dualenc_evals.metrics import bags, fewshot, linear, ranking
from dualenc_evals.metrics import scores as metrics
from dualenc_evals.metrics.scores import Positives


def unit(*angles: float) -> torch.Tensor:
    """Unit vectors in the plane by angle in degrees."""
    a = torch.tensor(angles) * math.pi / 180
    return torch.stack([a.cos(), a.sin()], 1)


# --- every right answer -------------------------------------------------------------------------------------------


def test_map_and_ndcg_by_hand_with_several_captions() -> None:
    # Query at 0°; by closeness the gallery is 0 (10°), 2 (20°), 3 (30°), 1 (50°), 4 (80°). Right: 2, 1.
    g = unit(10, 50, 20, 30, 80)
    positives = Positives([[1, 2]], 5)
    ahead = ranking.wrong_ahead(unit(0), g, positives)
    assert ahead.tolist() == [2, 1]  # before row 1: rows 0 and 3; before row 2: row 0
    _, number, place = ranking.places(ahead, positives)
    assert number.tolist() == [1, 2]
    assert place.tolist() == [2, 4]
    assert ranking.average_precision(ahead, positives, 10) == pytest.approx([(1 / 2 + 2 / 4) / 2])
    assert ranking.average_precision(ahead, positives, 3) == pytest.approx([(1 / 2) / 2])
    assert ranking.average_precision(ahead, positives, 1) == pytest.approx([0.0])
    ideal = 1 + 1 / math.log2(3)
    assert ranking.ndcg(ahead, positives, 10) == pytest.approx([(1 / math.log2(3) + 1 / math.log2(5)) / ideal])
    assert ranking.ndcg(ahead, positives, 2) == pytest.approx([(1 / math.log2(3)) / ideal])


def test_ties_stand_before_every_right_answer() -> None:
    g = unit(10, 10, 10, 60)
    ahead = ranking.wrong_ahead(unit(0), g, Positives([[0, 3]], 4))
    assert ahead.tolist() == [2, 2]  # both wrong ones at 10° are before the right one at 10°
    collapsed = torch.nn.functional.normalize(torch.ones(6, 4), dim=1)
    pairs = Positives([[i] for i in range(6)], 6)
    ahead = ranking.wrong_ahead(collapsed, collapsed, pairs)
    assert ranking.average_precision(ahead, pairs, 10) == pytest.approx([1 / 6] * 6)
    broken = torch.full((1, 4), torch.nan)
    assert ranking.wrong_ahead(broken, collapsed, Positives([[0, 1]], 6)).tolist() == [4, 4]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 9), m=st.integers(1, 9), seed=st.integers(0, 10**6), block=st.integers(1, 40))
def test_places_equal_a_double_loop(n: int, m: int, seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    q = torch.from_numpy(rng.integers(-2, 3, (n, 3)).astype(np.float32))
    g = torch.from_numpy(rng.integers(-2, 3, (m, 3)).astype(np.float32))
    right = [sorted(rng.choice(m, size=rng.integers(1, m + 1), replace=False).tolist()) for _ in range(n)]
    positives = Positives(right, m)
    s = (q @ g.T).tolist()
    expected = [sum(s[i][k] >= s[i][j] for k in range(m) if k not in own) for i, own in enumerate(right) for j in own]
    got = ranking.wrong_ahead(q, g, positives, elements=block)
    assert got.tolist() == expected
    parts = [ranking.wrong_ahead(q, g, positives, elements=block, shard=(r, 2)) for r in range(2)]
    assert sum(parts).tolist() == expected
    # The best right answer's place is its rank.
    owner, number, place = ranking.places(got, positives)
    best = metrics.best_ranks(q, g, positives)
    assert place[number == 1].tolist() == best.tolist()
    assert owner[number == 1].tolist() == list(range(n))


@pytest.mark.parametrize(("m", "M", "k"), [(1, 5, 3), (2, 5, 10), (3, 6, 2), (4, 4, 4)])
def test_chance_of_map_and_ndcg_equals_all_orders(m: int, M: int, k: int) -> None:
    pairs = Positives([list(range(m))], M)
    every = []
    for where in itertools.combinations(range(1, M + 1), m):
        ahead = np.array(where) - np.arange(1, m + 1)
        every.append((ranking.average_precision(ahead, pairs, k)[0], ranking.ndcg(ahead, pairs, k)[0]))
    ap, gain = np.mean(every, axis=0)
    counts = np.array([m, m])
    assert ranking.chance_average_precision(counts, M, k) == pytest.approx(ap)
    assert ranking.chance_ndcg(counts, M, k) == pytest.approx(gain)


# --- several labels -----------------------------------------------------------------------------------------------


def test_average_precision_of_a_class_by_hand() -> None:
    positive = np.array([True, False, True, False, False])
    # Order: 0 (right), 1, 2 (right), …: (1/1 + 2/3) / 2.
    assert multilabel.class_precision(np.array([5.0, 4, 3, 2, 1]), positive) == pytest.approx((1 + 2 / 3) / 2)
    # 0, 1 and 2 score the same: the wrong one stands first, so the right ones are at 2 and 3.
    assert multilabel.class_precision(np.array([5.0, 5, 5, 2, 1]), positive) == pytest.approx((1 / 2 + 2 / 3) / 2)
    # All the same: at 4 and 5.
    assert multilabel.class_precision(np.zeros(5), positive) == pytest.approx((1 / 4 + 2 / 5) / 2)


def test_resampled_precision_of_every_item_once_is_the_precision() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 40).astype(np.float64), rng.random(40) < 0.3
    once = np.ones((3, 40), dtype=np.uint8)
    want = multilabel.class_precision(scores, positive)
    assert multilabel.resampled_precision(scores, positive, once) == pytest.approx([want] * 3)
    none = np.where(positive, 0, 1)[None].astype(np.uint8)
    assert np.isnan(multilabel.resampled_precision(scores, positive, none)).all()


# --- puzzles ------------------------------------------------------------------------------------------------------


def test_winoground_scores_by_hand() -> None:
    # Pictures at 0° and 90°. Puzzle by puzzle, captions: solved; swapped; one caption liked by both pictures; a tie.
    a = torch.stack([unit(0, 90)] * 4)
    b = torch.stack([unit(10, 80), unit(80, 10), unit(0, 44), unit(45, 45)])
    second, first, both = compositional.puzzle_scores(a, b)
    # Third: picture 0 likes caption 0 (1 > .72), picture 1 likes caption 1 (.69 > 0); caption 1 at 44° likes picture 0.
    assert second.tolist() == [1, 0, 1, 0]
    assert first.tolist() == [1, 0, 0, 0]
    assert both.tolist() == [1, 0, 0, 0]


def test_sugarcrepe_is_the_text_score_of_one_picture() -> None:
    a = unit(0, 0, 0)[:, None]
    b = torch.stack([unit(10, 50), unit(50, 10), unit(20, 20)])
    second, first, both = compositional.puzzle_scores(a, b)
    assert second.tolist() == both.tolist() == [1, 0, 0]  # the same caption twice is not told apart
    assert first.tolist() == [1, 1, 1]


def test_chance_of_puzzles_equals_all_orders() -> None:
    every = []
    for s in itertools.permutations(range(4)):
        (p, q), (r, t) = s[:2], s[2:]
        text, image = p > q and t > r, p > r and t > q
        every.append((text, image, text and image))
    assert compositional.chance(2, 2) == pytest.approx(tuple(np.mean(every, axis=0)))
    assert compositional.chance(1, 2) == (0.5, 1.0, 0.5)
    assert compositional.chance(3, 3)[2] is None


# --- bags ---------------------------------------------------------------------------------------------------------


def test_bag_recall_by_hand_and_ties_are_wrong() -> None:
    x = unit(0, 30, 60, 0, 0, 0)
    y = unit(1, 31, 61, 0, 0, 0)
    got = bags.bag_values(x, y, np.array([[0, 1, 2], [3, 4, 5]]))
    assert got[0].tolist() == got[1].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert got[2].tolist() == [1, 0]
    # Captions of 0 and 1 exchanged: those two are wrong both ways, the third right.
    there, back, both = bags.bag_values(x[:3], y[[1, 0, 2]], np.array([[0, 1, 2]]))
    assert there.tolist() == back.tolist() == [[0, 0, 1]]
    assert both.tolist() == [0]
    # Pictures at 0° and 30°, captions at 20° and 60°: both pictures like the first, the first likes the second picture.
    there, back, _ = bags.bag_values(unit(0, 30), unit(20, 60), np.array([[0, 1]]))
    assert there.tolist() == [[1, 0]]
    assert back.tolist() == [[0, 1]]


@pytest.mark.parametrize("elements", [1, 50, 2**20])
def test_bags_in_any_blocks_give_the_same(elements: int) -> None:
    gen = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(30, 6, generator=gen), dim=1) for _ in range(2))
    rows = np.arange(30).reshape(10, 3)
    whole = bags.bag_values(x, y, rows)
    cut = bags.bag_values(x, y, rows, elements=elements)
    assert all(np.array_equal(p, q) for p, q in zip(whole, cut, strict=True))


def test_bags_of_labels_and_of_neighbours() -> None:
    gen = torch.Generator().manual_seed(0)
    centres = torch.eye(8)[:4].repeat_interleave(3, 0)
    x = torch.nn.functional.normalize(centres + 0.01 * torch.randn(12, 8, generator=gen), dim=1)
    labels = ["ab"[i % 2] for i in range(12)]
    by_label = bags.make_bags(x, x, labels, 3, seed=0)
    assert by_label.shape == (4, 3)
    assert all(len({labels[i] for i in bag}) == 1 for bag in by_label)
    assert len(set(by_label.flatten().tolist())) == 12
    near = bags.make_bags(x, x, None, 3, seed=0)
    assert {tuple(sorted(b)) for b in near.tolist()} == {(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)}
    assert np.array_equal(near, bags.make_bags(x, x, None, 3, seed=0))
    # Rows 0 and 1 share a partner: only one of them may be in a bag.
    shared = bags.make_bags(x, x, None, 3, seed=0, owners=[0, 0, *range(2, 12)])
    assert not {0, 1} <= set(shared.flatten().tolist())
    assert bags.make_bags(x, x, labels, 7, seed=0).shape == (0, 7)


# --- calibration, intervals ---------------------------------------------------------------------------------------


def test_risk_and_coverage_by_loops() -> None:
    """Equally confident answers in every order: the mean over orders. A perfect order has the least area."""
    rng = np.random.default_rng(0)
    confidence = np.array([0.9, 0.5, 0.5, 0.5, 0.2, 0.2])
    right = np.array([True, False, True, True, False, True])
    orders = [
        p for p in itertools.permutations(range(6)) if all(confidence[a] >= confidence[b] for a, b in pairwise(p))
    ]
    want = np.mean([[np.mean([not right[i] for i in p[:k]]) for k in range(1, 7)] for p in orders], axis=0)
    assert metrics.selective_risks(confidence, right) == pytest.approx(want, abs=1e-12)
    right = rng.random(200) < 0.7
    every = metrics.selective_risks(np.ones(200), right)
    assert every == pytest.approx(np.full(200, 1 - right.mean()))
    best = metrics.selective_risks(right + 0.0, right)
    assert best[: right.sum()].max() == 0
    assert best.mean() < metrics.selective_risks(rng.random(200), right).mean()


def test_the_curve_of_a_plot_has_the_ends_that_are_known() -> None:
    rng = np.random.default_rng(1)
    right = rng.random(253) < 0.6
    wrong = int((~right).sum())
    risks = metrics.selective_risks(rng.random(253), right)
    curve = metrics.risk_curve(risks, wrong)
    assert len(curve["coverage"]) == 100
    assert (curve["coverage"][-1], curve["risk"][-1]) == (1.0, pytest.approx(wrong / 253, abs=1e-6))
    places = [round(c * 253) - 1 for c in curve["coverage"]]
    assert curve["risk"] == pytest.approx(risks[places].tolist(), abs=1e-6)
    # The best order is what a confidence that knows the answers gives, and nothing is below it.
    knows = metrics.selective_risks(right + 0.0, right)
    by_loop = [np.mean(np.sort(~right)[: k + 1]) for k in places]
    assert curve["best"] == pytest.approx(knows[places].tolist(), abs=1e-6)
    assert curve["best"] == pytest.approx(by_loop, abs=1e-6)
    few = metrics.risk_curve(metrics.selective_risks(np.arange(3.0), np.array([True, False, False])), 2)
    assert few == {"coverage": [0.333333, 0.666667, 1.0], "risk": [1.0, 1.0, 0.666667], "best": [0.0, 0.5, 0.666667]}


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.85, 0.85, 0.3])
    right = np.array([True, True, False, False])
    # Ten bins: {.95}: |1 − .95|; {.85, .85}: |1 − 1.7|; {.3}: |0 − .3|; over four items.
    assert metrics.calibration_error(confidence, right, bins=10) == pytest.approx((0.05 + 0.7 + 0.3) / 4)
    assert metrics.calibration_error(np.ones(8), np.ones(8, dtype=bool)) == 0
    assert metrics.calibration_error(np.ones(8), np.zeros(8, dtype=bool)) == 1


def test_confidence_is_the_largest_softmax() -> None:
    scores = torch.tensor([[0.2, 0.1, 0.0], [0.3, 0.3, 0.3]])
    e = [math.exp(10 * v) for v in (0.2, 0.1, 0.0)]
    assert metrics.confidences(scores, 10.0) == pytest.approx([e[0] / sum(e), 1 / 3])


def test_weighted_statistics_equal_the_written_out_sample() -> None:
    values = np.array([7, 1, 3, 3, 9])
    labels, predicted = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    median, recall = metrics.weighted_median(values), metrics.weighted_class_recall(labels, predicted)
    rng = np.random.default_rng(0)
    for _ in range(50):
        w = rng.multinomial(5, [0.2] * 5)
        taken = np.repeat(np.arange(5), w)
        assert median(w.astype(float)) == np.median(values[taken])
        assert recall(w.astype(float)) == pytest.approx(metrics.mean_per_class_recall(labels[taken], predicted[taken]))


def test_interval_of_a_statistic_is_that_of_the_mean_for_a_mean() -> None:
    x = np.random.default_rng(0).random(60)
    groups = np.repeat(np.arange(20), 3)
    for g in (None, groups):
        want = metrics.bootstrap_ci({"v": x}, g, seed=4)["v"]
        assert metrics.bootstrap_of(lambda w: float(w @ x / w.sum()), 60, g, seed=4) == pytest.approx(want)


def test_geometry_has_uniformity_of_both_sides() -> None:
    a, b = unit(0, 90), unit(0, 180)
    index = torch.arange(2)
    got = metrics.geometry(a, b, (index, index), ("image", "text"))
    assert got["uniformity_image"] == pytest.approx(-4)  # log e^(-2 · |difference|²), 2 · 2 and 2 · 4
    assert got["uniformity_text"] == pytest.approx(-8)
    same = torch.ones(4, 1)
    assert metrics.uniformity(same) == pytest.approx(0)


# --- probes -------------------------------------------------------------------------------------------------------


def test_nearest_neighbours_by_hand() -> None:
    x, labels = unit(0, 20, 90, 100), np.array([0, 0, 1, 1])
    y, truth = unit(5, 95, 5), np.array([0, 1, 1])
    assert probes.nearest_neighbours(x, labels, y, truth, 2, k=1, temperature=0.07).tolist() == [1, 1, 2]
    # Three votes against one, until the one that is nearer weighs more.
    x, labels = unit(0, 30, 31, 32), np.array([0, 1, 1, 1])
    for temperature, rank in ((1.0, 2), (0.01, 1)):
        got = probes.nearest_neighbours(x, labels, unit(0), np.array([0]), 2, k=4, temperature=temperature)
        assert got.tolist() == [rank]
    same = probes.nearest_neighbours(unit(0, 0), np.array([0, 1]), unit(0, 0), np.array([0, 1]), 2, k=2, temperature=1)
    assert same.tolist() == [2, 2]


def test_logistic_regression_meets_its_optimality_condition() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(60, 5, generator=gen), dim=1)
    labels = np.random.default_rng(0).integers(0, 3, 60)
    C = 3.0
    w = linear.fit(x, labels, 3, C)
    # The gradient of C · Σ CE + ½‖W‖², written out, is zero at the optimum.
    d = x.double()
    p = torch.softmax(d @ w[:, :-1].T + w[:, -1], 1)
    p[torch.arange(60), torch.from_numpy(labels)] -= 1
    assert (C * p.T @ d + w[:, :-1]).abs().max() < 1e-4
    assert (C * p.sum(0)).abs().max() < 1e-4


def test_c_is_chosen_on_what_was_held_out() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 20)
    kept, held = linear.split(labels, 0.2, seed=0)
    assert sorted([*kept, *held]) == list(range(80))
    assert np.bincount(labels[held]).tolist() == [4] * 4
    assert linear.split(np.array([0, 1, 2]), 0.2, 0)[1].tolist() == []
    gen = torch.Generator().manual_seed(0)
    noise = 0.2 * torch.randn(80, 8, generator=gen)
    x = torch.nn.functional.normalize(torch.eye(8)[:4].repeat_interleave(20, 0) + noise, dim=1)
    w, strength = linear.tuned(x, labels, 4, seed=0)
    assert strength in {s * f for s in linear.GRID for f in (0.1, 1, 10)}
    assert (linear.ranks_under(w, x, labels)[0] == 1).mean() > 0.95
    shuffled = rng.permutation(labels)
    assert linear.tuned(x, shuffled, 4, seed=0)[1] == linear.tuned(x, shuffled, 4, seed=0)[1]


def test_blocks_change_nothing_in_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(50, 4, generator=gen), dim=1)
    labels = np.random.default_rng(0).integers(0, 3, 50)
    whole = linear.fit(x, labels, 3, 1.0)
    monkeypatch.setattr(linear, "block_starts", lambda n, _: [(i, min(i + 7, n)) for i in range(0, n, 7)])
    assert (linear.fit(x, labels, 3, 1.0) - whole).abs().max() < 1e-5


def test_transport_between_equal_points_is_the_identity_and_blurs_to_the_mean() -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (fewshot.transported(x, x, epsilon=0.005) - x).abs().max() < 1e-6
    assert (fewshot.transported(x, x, epsilon=1e4) - x.mean(0)).abs().max() < 1e-3


def test_transport_plan_has_uniform_margins_and_no_overflow() -> None:
    cost = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plan = fewshot.sinkhorn(cost, 0.05)
    assert torch.allclose(plan.sum(-1), torch.full((2, 4), 1 / 4, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(plan.sum(-2), torch.full((2, 6), 1 / 6, dtype=torch.float64), atol=1e-6)
    assert torch.isfinite(fewshot.sinkhorn(cost, 1e-5)).all()


def test_transport_moves_a_bad_prototype_to_its_queries() -> None:
    # Two clouds of queries; one labelled item of each, the second one far out to the side of the first cloud.
    queries = torch.tensor([[0.0, 0.0], [0.2, 0.1], [4.0, 0.0], [4.1, 0.2]], dtype=torch.float64)
    means = torch.tensor([[-1.0, 0.0], [2.0, 3.0]], dtype=torch.float64)
    moved = fewshot.opta(means, queries, shots=1)
    assert torch.allclose(moved, torch.stack([queries[:2].mean(0), queries[2:].mean(0)]), atol=0.05)
    mixed = fewshot.opta(means, queries, shots=5)
    once = fewshot.transported(means, queries)
    assert torch.allclose(mixed, 0.7 * means + 0.3 * once)


def test_attention_over_labelled_items_by_a_loop() -> None:
    gen = torch.Generator().manual_seed(0)
    support, queries = torch.randn(3, 4, 7, generator=gen).double(), torch.randn(5, 7, generator=gen).double()
    got = fewshot.in_context(support, queries)
    for q, row in zip(queries, got, strict=True):
        weights = np.array([[np.exp(float(torch.cosine_similarity(q, s, dim=0)) / 0.07) for s in c] for c in support])
        share = weights.sum(1) / weights.sum()
        assert torch.softmax(row, 0).numpy() == pytest.approx(share, rel=1e-6)
    # One item a class: the nearest by cosine, at any temperature; as it falls, the nearest of all items.
    one = fewshot.in_context(support[:, :1], queries, tau=3.0)
    assert one.argmax(1).tolist() == [int(torch.cosine_similarity(q, support[:, 0]).argmax()) for q in queries]
    sharp = fewshot.in_context(support, queries, tau=1e-3)
    flat = support.flatten(0, 1)
    assert sharp.argmax(1).tolist() == [int(torch.cosine_similarity(q, flat).argmax()) // 4 for q in queries]


def test_episodes_are_drawn_by_seed_from_both_parts() -> None:
    train, test = np.array([0, 0, 0, 1, 1, 2, 3, 3]), np.array([0, 0, 1, 1, 1, 2, 3, 3])
    got = fewshot.draw_episodes(train, test, ways=5, shots=2, queries=15, episodes=7, seed=3)
    assert got is not None
    assert got.support.shape == (7, 3, 2)  # class 2 has one labelled item only
    assert got.queries.shape == (7, 3, 2)
    assert (train[got.support] == test[got.queries][..., :1]).all()
    again = fewshot.draw_episodes(train, test, ways=5, shots=2, queries=15, episodes=7, seed=3)
    assert again is not None
    assert np.array_equal(got.support, again.support)
    assert fewshot.draw_episodes(train, test, ways=5, shots=3, queries=1, episodes=7, seed=3) is None


def test_few_shot_accuracy_of_clear_clouds_and_of_a_collapsed_model() -> None:
    gen = torch.Generator().manual_seed(0)
    labels = np.repeat(np.arange(3), 10)
    x = torch.eye(12)[:3].repeat_interleave(10, 0) + 0.05 * torch.randn(30, 12, generator=gen)
    drawn = fewshot.draw_episodes(labels, labels, ways=3, shots=2, queries=4, episodes=5, seed=0)
    assert drawn is not None
    every = ["prototype", "opta", "fewshot", "context"]
    for values in fewshot.accuracies(x, x, drawn, every).values():
        assert values.tolist() == [1.0] * 5
    same = torch.ones(30, 12)
    for values in fewshot.accuracies(same, same, drawn, ["prototype", "opta", "context"]).values():
        assert values.tolist() == [0.0] * 5  # every class is as near: none is right
