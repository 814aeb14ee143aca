"""dualenc compare: what a file may say, which differences are noise, and a study that is trained and goes on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from _shared import ROOT

from dualenc.compare import from_recipes, read_comparison
from dualenc.compare.intervals import differences, t_quantile
from dualenc.compare.study_runs import run_study
from dualenc.errors import ConfigError
from dualenc_evals.pages.comparison import MethodResult, MethodTable, markdown, render

sys.path.insert(0, str(ROOT / "tests" / "train"))
from _runs import SMALL, environment

FILE = """
recipe: quickstart
overrides: [budget.steps=2]
seeds: 2
methods:
  plain:
  dcl: {overrides: [loss=dcl]}
  taught: {overrides: ["distill={teachers: [{model: run:plain}], terms: [{name: soft_labels}]}"]}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "losses.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_names_methods(tmp_path: Path) -> None:
    got = read_comparison(written(tmp_path, FILE), ["batch.size=8"])
    assert (got.name, got.control, got.seeds, list(got.methods)) == (
        "losses",
        "plain",
        [0, 1],
        ["plain", "dcl", "taught"],
    )
    command = got.command("taught", 1, tmp_path)
    assert command[:3] == ["quickstart", "budget.steps=2", "batch.size=8"]
    assert f"model: {tmp_path / 'plain' / 'seed-1'}" in command[3]  # the teacher of the same seed
    assert command[-2:] == [f"out={tmp_path / 'taught' / 'seed-1'}", "seed=1"]
    two = from_recipes(["quickstart", "quickstart/slip"], seeds=[3])
    assert (list(two.methods), two.seeds) == (["quickstart", "quickstart.slip"], [3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds: 2", "seeds: [1, 1]"), "names a seed twice"),
        (("run:plain", "run:plane"), "needs run:plane, which is not listed before it. Did you mean 'plain'"),
        (("  plain:\n", "  a/b:\n"), "cannot be the name of a folder"),
        (("recipe: quickstart\n", ""), "plain has no recipe"),
        (("overrides: [loss=dcl]", "override: [loss=dcl]"), "override"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in FILE
    with pytest.raises(ConfigError) as e:
        read_comparison(written(tmp_path, FILE.replace(*change)))
    assert message in str(e.value)


def test_two_recipes_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two recipes are called quickstart"):
        from_recipes(["quickstart", "./quickstart.yaml"])
    with pytest.raises(ConfigError, match="at least two recipes"):
        from_recipes(["quickstart"])


def test_two_methods_are_the_paired_t_test() -> None:
    a, b = np.array([0.31, 0.35, 0.30]), np.array([0.36, 0.36, 0.37])
    (found,) = differences({"a": a.tolist(), "b": b.tolist()}, "a").values()
    d = b - a
    half = t_quantile(0.975, 2) * d.std(ddof=1) / math.sqrt(3)
    assert found.mean == pytest.approx(d.mean())
    assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half))
    assert found.verdict == "noise"  # +4.3 points, but by 5, 1 and 7


def test_intervals_hold_for_all_comparisons_at_once() -> None:
    """2,000 studies of six equal methods: the share with any verdict but noise is 5 % at most."""
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(2000):
        values = 0.3 + 0.02 * draw.normal(size=(1, 3)) + 0.01 * draw.normal(size=(6, 3))  # seeds differ, methods do not
        found = differences({str(i): row.tolist() for i, row in enumerate(values)}, "0")
        wrong += any(d.verdict != "noise" for d in found.values())
    assert 0.02 < wrong / 2000 < 0.06


def test_a_real_difference_is_found_and_one_seed_says_nothing() -> None:
    draw = np.random.default_rng(1)
    values = {str(i): (0.3 + 0.01 * draw.normal(size=3)).tolist() for i in range(8)}
    found = differences(values | {"much": [0.4, 0.41, 0.4], "less": [0.2, 0.2, 0.21]}, "0")
    assert (found["much"].verdict, found["less"].verdict) == ("better", "worse")
    assert {d.verdict for n, d in found.items() if n not in ("much", "less")} == {"noise"}
    assert differences({"a": [0.1], "b": [0.9]}, "a")["b"].verdict == "noise"


def test_the_table_and_the_page() -> None:
    key = "val/image_to_text_R@10"
    methods = [
        MethodResult("plain", values={key: [0.3, 0.32]}, equal={key: [0.3, 0.32]}, compute=1.0, loss=(4.0, 3.0)),
        MethodResult("dcl", "no positive <below>", {key: [0.4, 0.42]}, {key: (0.1, 0.05, 0.15, "better")},
                     {key: [0.35, 0.37]}, 90, 1.4),
        MethodResult("broken", problem="exit code 3"),
    ]  # fmt: skip
    table = MethodTable("losses", methods, [0, 1], {key: 0.02, "val/image_to_text_R@1": 0.002})
    text = markdown(table)
    assert "| dcl | 41.0 ± 1.4, +10.0 [+5.0, +15.0] ▲ |" in text
    assert "1.40 ×, 90 steps | 36.0 ± 1.4 |" in text
    assert "| broken | exit code 3 |" in text
    page = render(table)
    assert "no positive &lt;below&gt;" in page
    assert page.index(">dcl<") < page.index(">plain<")  # best first


def test_a_task_that_is_not_there_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    study = read_comparison(written(tmp_path, FILE.replace("seeds: 2", "tasks: [./absent.yaml]")))
    with pytest.raises(ConfigError, match=r"method plain: There is no file .*absent\.yaml"):
        run_study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_is_trained_once_and_goes_on(tmp_path: Path) -> None:
    small = [*SMALL[:5], "eval.every_steps=null", "tracking.log_every=1", "data.workers=0", "engine.threads=1"]
    file = written(tmp_path, FILE.replace("[budget.steps=2]", json.dumps(["budget.steps=2", *small])).replace(
        "seeds: 2", "seeds: [5]").replace("loss=dcl", "data.sources.0.shards=absent.tar"))  # fmt: skip
    command = [sys.executable, "-m", "dualenc", "compare", str(file), "--tasks", "quickstart_val_style", "--out", "out"]

    def compare(code: int, *more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*command, *more], cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-3000:]
        return done

    failed = compare(1)
    assert "1 runs failed: dcl, seed 5: " in failed.stderr
    assert "absent.tar" in failed.stderr
    assert "| taught | " in failed.stdout
    file.write_text(file.read_text().replace("data.sources.0.shards=absent.tar", "loss=dcl, batch.size=16"))
    done = compare(0, "--equal-compute")
    trained = [line for line in done.stderr.splitlines() if ", seed 5 (" in line]
    assert trained[0].startswith("dcl, seed 5 (2 of 3)")  # the other two are there
    assert "plain" not in " ".join(trained)
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert kept["flops"]["dcl"] < kept["flops"]["plain"] < kept["flops"]["taught"]
    assert kept["equal"]["taught"]["5"]["steps"] == round(2 * kept["flops"]["plain"] / kept["flops"]["taught"])
    assert (tmp_path / "out" / "compare.html").is_file()
    changed = compare(2, "optim.lr=0.5")
    assert "was trained with another recipe or other overrides" in " ".join(changed.stderr.split())
