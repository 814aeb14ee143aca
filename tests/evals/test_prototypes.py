"""Classes by prototypes of labelled items: against loops, what must equal zero-shot by prompts, and real photos."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dualenc.errors import ConfigError
from dualenc_evals.catalog import load_task, parse_task
from dualenc_evals.harness import definition, evaluate
from dualenc_evals.kinds import classification
from dualenc_evals.metrics.prototypes import BELOW, ByPrompts, ByPrototypes, make_prototypes
from dualenc_evals.read.shards import read_rows

sys.path.insert(0, str(Path(__file__).parent))
from _pixels import Pixels
from _shared import DATA as SHARED_DATA
from test_eval_tasks import picture

needs_shared = pytest.mark.skipif(not SHARED_DATA.exists(), reason=f"the real data are not below {SHARED_DATA}")


def unit(n: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, 12, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_one_prototype_that_is_the_prompts_feature_is_zero_shot_bit_for_bit() -> None:
    x, weights = unit(300), unit(9, 1)
    weights[5] = weights[2]
    labels = np.random.default_rng(0).integers(0, 9, 300)
    twins = classification.twins_after([[str(min(c, 2) if c in (2, 5) else c)] for c in range(9)])
    zero_shot = classification._scored(x, ByPrompts(weights), labels, twins, 30.0)
    for by in (
        ByPrototypes(weights, np.arange(9), 9),
        # Every prototype twice, in another order: nothing changes.
        ByPrototypes(torch.cat([weights, weights.flip(0)]), np.concatenate([np.arange(9), np.arange(9)[::-1]]), 9),
        # Prompts that allow every class forbid none.
        ByPrototypes(weights, np.arange(9), 9, keep=9, prompts=ByPrompts(unit(9, 2))),
    ):
        assert torch.equal(by.scores(x), ByPrompts(weights).scores(x))
        for a, b in zip(zero_shot, classification._scored(x, by, labels, twins, 30.0), strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b))


def test_the_prompts_best_class_alone_is_zero_shot_too() -> None:
    x, weights, table = unit(200), unit(6, 1), unit(6, 2)
    one = ByPrototypes(table, np.arange(6), 6, keep=1, prompts=ByPrompts(weights)).scores(x)
    assert one.argmax(1).tolist() == (x @ weights.T).argmax(1).tolist()
    assert ((one > BELOW).sum(1) == 1).all()
    # A background beyond the prompts' classes may win whatever they say.
    table = torch.cat([table, x[:1]])
    open_ = ByPrototypes(table, np.arange(7), 7, keep=1, prompts=ByPrompts(weights)).scores(x)
    assert torch.equal(open_[:, :6] > BELOW, one > BELOW)
    assert int(open_[0].argmax()) == 6


def test_prototypes_and_scores_by_loops() -> None:
    gen = np.random.default_rng(0)
    x, y = unit(60), unit(40, 1)
    labels = gen.integers(0, 4, 60) * 2  # classes 1, 3, 5 have no items
    table, owners = make_prototypes(x, labels, [1] * 7)
    assert owners.tolist() == [0, 2, 4, 6]
    for row, c in zip(table, owners, strict=True):
        mean = np.mean([x[i].double().numpy() for i in range(60) if labels[i] == c], axis=0)
        assert row.numpy() == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)
    several, owners = make_prototypes(x, labels, [3, 1, 2, 1, 100, 1, 1])
    counts = np.bincount(labels)
    assert np.bincount(owners).tolist() == [3, 0, 2, 0, counts[4], 0, 1]
    # As many prototypes as items: the items themselves.
    assert torch.sort((several[owners == 4] @ x[labels == 4].T).amax(0)).values == pytest.approx(np.ones(counts[4]))
    prompts = unit(6, 3)
    got = ByPrototypes(several, owners, 7, keep=2, prompts=ByPrompts(prompts)).scores(y)
    for i in range(40):
        first = [float(y[i] @ p) for p in prompts]
        allowed = {*sorted(range(6), key=lambda c: -first[c])[:2], 6}
        for c in range(7):
            own = [float(y[i] @ several[p]) for p in range(len(several)) if owners[p] == c]
            assert float(got[i, c]) == pytest.approx(max(own) if own and c in allowed else BELOW, abs=1e-6)


def test_means_of_clusters_are_found() -> None:
    centres = torch.eye(12)[:4]
    x = torch.nn.functional.normalize(centres.repeat_interleave(10, 0) + 0.02 * unit(40), dim=1)
    table, owners = make_prototypes(x, np.repeat([0, 0, 1, 1], 10), [2, 2])
    assert owners.tolist() == [0, 0, 1, 1]
    for c in (0, 1):
        near = (table[owners == c] @ centres[2 * c : 2 * c + 2].T) > 0.99
        assert near.sum(0).tolist() == near.sum(1).tolist() == [1, 1]


# --- through the harness ------------------------------------------------------------------------------------------


def of_cifar(**prototypes: Any) -> Any:
    said = load_task("cifar10").model_dump(exclude_unset=True)
    source = {**said["source"], "every": {"step": 5}}
    support = {"every": {"step": 5, "others": True}}
    return parse_task({**said, "source": source, "prototypes": {"support": support, **prototypes}})


@needs_shared
def test_real_photos_by_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALENC_DATA", str(SHARED_DATA))

    def run(task: Any) -> dict[str, Any]:
        results: dict[str, Any] = evaluate(Pixels(), [task], progress=False)["tasks"]["cifar10"]
        return results

    assert definition(of_cifar()) != definition(of_cifar(each=5)) != definition(load_task("cifar10"))
    one, five, kept = run(of_cifar()), run(of_cifar(each=5)), run(of_cifar(keep=1))
    assert one["n"] == {"image": 200, "classes": 10, "support": 800}
    assert one["templates"] is None
    assert (one["settings"]["prototypes"], five["settings"]["prototypes"]) == (10, 50)
    for got in (one, five):
        assert got["ci"]["top1"][0] > got["chance"]["top1"] == 0.1  # colours tell a ship from a frog
    # By hand: the nearest of ten means.
    task = of_cifar()
    rows, others = read_rows(task).rows, read_rows(task.at(task.prototypes.support)).rows
    names = sorted({r.label for r in others})
    embed = lambda rs: Pixels().embed("image", [r.contents["image"][0].read() for r in rs]).double()
    x = embed(others)
    means = torch.stack([x[[i for i, r in enumerate(others) if r.label == n]].mean(0) for n in names])
    found = (embed(rows) @ torch.nn.functional.normalize(means, dim=1).T).argmax(1)
    right = [names[int(k)] == r.label for k, r in zip(found, rows, strict=True)]
    assert one["metrics"]["top1"] == pytest.approx(np.mean(right), abs=1e-6)
    # Only the class that the prompts like best may win: the predictions of zero-shot.
    said = load_task("cifar10").model_dump(exclude_unset=True)
    zero_shot = run(parse_task({**said, "source": {**said["source"], "every": {"step": 5}}}))
    assert kept["metrics"]["top1"] == zero_shot["metrics"]["top1"]
    assert kept["details"]["confusion"] == zero_shot["details"]["confusion"]
    # What a page shows of an item is its class scores, best first, and the mistakes by how sure they are.
    first = one["details"]["examples"][0]["rows"][0]
    assert [h["score"] for h in first["hits"]] == sorted((h["score"] for h in first["hits"]), reverse=True)
    assert all(row["rank"] > 1 for row in one["details"]["examples"][0]["worst"])
    assert "details" in five


def test_a_background_of_its_own(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name, colour in (
            ("red", (250, 0, 0)),
            ("blue", (0, 0, 250)),
            ("grey", (99, 99, 99)),
            ("white", (250,) * 3),
        ):
            (tmp_path / "f" / part / name).mkdir(parents=True)
            for i in range(6):
                shade = tuple(min(255, c + i + (part == "test") * 6) for c in colour)
                (tmp_path / "f" / part / name / f"{i}.png").write_bytes(picture(shade))  # type: ignore[arg-type]
    said: dict[str, Any] = {
        "kind": "classification", "name": "a", "classes": ["red", "blue"], "metrics": ["top1", "mean_per_class_recall"],
        "source": {"kind": "folder", "path": str(tmp_path / "f"), "split": "test"},
        "prototypes": {"support": {"split": "train"}, "background": 2},
    }  # fmt: skip
    got = evaluate(Pixels(), [parse_task(said)], progress=False)["tasks"]["a"]
    assert got["n"] == {"image": 24, "classes": 3, "support": 24}
    assert got["settings"]["prototypes"] == 4
    assert got["details"]["classes"] == ["red", "blue", "background"]
    assert got["metrics"] == {"top1": 1.0, "mean_per_class_recall": 1.0}
    without = {**said, "other_labels": "drop", "prototypes": {"support": {"split": "train"}}}
    got = evaluate(Pixels(), [parse_task(without)], progress=False)["tasks"]["a"]
    assert got["n"] == {"image": 12, "classes": 2, "support": 12}
    assert "12 items have a label that is not a class" in " ".join(got["notes"])
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({**said, "classes": None}))
    with pytest.raises(ConfigError, match=r"prototypes.background: list the classes"):
        load_task(path)
    path.write_text(yaml.safe_dump({**said, "prototypes": {"support": {"split": "train"}, "keep": 1}}))
    with pytest.raises(ConfigError, match="templates: give the prompts"):
        load_task(path)
