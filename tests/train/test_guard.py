"""eval.guard on real runs: a model that can do something is fine-tuned badly, and well."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from _runs import RECIPE, SMALL, environment, newest, rows

from dualenc.api.runs import evaluation_of, resolve_tasks
from dualenc.config import Guard, load_recipe
from dualenc.errors import ConfigError, GuardError
from dualenc.train.guard import Watch, watched
from dualenc.train.loop import train
from dualenc_evals.pages.run import guard_view, write_report

TASK = "quickstart_val_clipart"
KEY = f"{TASK}/image_to_text_R@10"
WATCH = f"eval.guard={{tasks: [{TASK}], metric: image_to_text_R@10, every_steps: 4, max_fall: 10}}"
BAD = ["budget.steps=20", "optim.lr=0.3", "optim.clip_grad_norm=null", "schedule.warmup_samples=0"]


@pytest.fixture(scope="module")
def able(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has learned to pair pictures and names: about 40 % R@10 among 62 unseen ones, chance is 16 %."""
    out = tmp_path_factory.mktemp("able") / "run"
    more = ["modalities.image.encoder.grid=2", "batch.size=64", "budget.steps=150", "optim.lr=1e-3"]
    train(load_recipe(RECIPE, [*SMALL, *more, "tracking.log_every=50", f"out={out}"]))
    return str(out)


def overrides(able: str, out: Path, *more: str) -> list[str]:
    return [
        *SMALL,
        "modalities.image.encoder.grid=2",
        f"checkpoint.init_from={able}",
        f"out={out}",
        WATCH,
        *more,
    ]


def here(items: list[str]) -> Path:
    """One rank, in this process."""
    recipe = load_recipe(RECIPE, items)
    assert recipe.eval.guard is not None
    return train(recipe, None, evaluation_of(resolve_tasks(recipe.eval.guard.tasks)))


@pytest.mark.dist
def test_a_fall_stops_two_ranks_and_goes_on_when_allowed(able: str, tmp_path: Path) -> None:
    out = tmp_path / "bad"
    items = overrides(able, out, *BAD)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dualenc"]
    done = subprocess.run(
        [*launcher, "train", str(RECIPE), *items],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stderr.count("Stopped by eval.guard: ") == 2, done.stderr[-3000:]  # both ranks
    assert "exitcode  : 6" in done.stderr
    watched_rows = [r for r in rows(out / "metrics.jsonl") if f"guard/{KEY}" in r]
    before, after = watched_rows[0][f"guard/{KEY}"], watched_rows[-1][f"guard/{KEY}"]
    assert watched_rows[0]["step"] == 0
    step = watched_rows[-1]["step"]
    assert before > 0.3
    assert after < before - 0.1
    for part in (f"was {100 * before:.1f} % at step 0", f"is {100 * after:.1f} % at step {step}", TASK):
        assert part in done.stderr
    assert newest(out).name == f"step-{step:010d}"
    assert json.loads((newest(out) / "state.json").read_text())["guard"]["before"] == {KEY: before}

    with pytest.raises(GuardError, match=f"was {100 * before:.1f} % at step 0 .* at step {step}") as refused:
        here(items)  # the same command does not go on from what was spoilt, and still knows the beginning
    assert refused.value.exit_code == 6
    here([*items, "eval.guard.action=warn", f"budget.steps={step + 2}"])
    saved = json.loads((newest(out) / "state.json").read_text())
    assert saved["step"] == step + 2
    assert saved["guard"] == {"before": {KEY: before}, "step": 0, "fallen": True}

    page = write_report(out).read_text(encoding="utf-8")
    assert "Before and after" in page
    assert f"{100 * before:.1f} %" in page
    assert f"Dropped by more than that: {TASK}" in page


@pytest.mark.dist
def test_careful_fine_tuning_goes_through(able: str, tmp_path: Path) -> None:
    out = here(overrides(able, tmp_path / "good", "budget.steps=6", "optim.lr=1e-4"))
    found = [(r["step"], r[f"guard/{KEY}"]) for r in rows(out / "metrics.jsonl") if f"guard/{KEY}" in r]
    assert [s for s, _ in found] == [0, 4, 6]
    assert abs(found[-1][1] - found[0][1]) < 0.1
    view = guard_view(rows(out / "metrics.jsonl"), {"eval": {"guard": {"max_fall": 10}}})
    assert view is not None
    assert view["fallen"] == []
    assert (view["rows"][0]["before"], view["rows"][0]["after"]) == (found[0][1], found[-1][1])


def test_what_is_watched() -> None:
    values = {"a/top1": 0.5, "a/top5": 0.9, "b/image_to_text_R@1": 0.2, "b/text_to_image_R@1": 0.1, "b/mean_rank": 9.0}
    assert watched(values, None) == {"a/top1": 0.5, "b/image_to_text_R@1": 0.2}
    with pytest.raises(
        ConfigError, match=r"eval.guard.metric: b has no metric 'top5' between 0 and 1; it has image_to_text_R@1"
    ):
        watched(values, "top5")
    with pytest.raises(ConfigError, match=r"a has no metric 'mean_rank' between 0 and 1"):
        watched(values, "mean_rank")


def test_points_are_counted_from_the_beginning() -> None:
    watch = Watch(Guard(tasks=["a"], max_fall=5), {})
    assert watch.before_going_on
    for step, value, fallen in ((0, 0.60, False), (1, 0.56, False), (2, 0.549, True), (3, 0.90, False)):
        watch.check({"a/top1": value}, step)
        assert (watch.sentence is not None) is fallen
        assert watch.before_going_on is fallen
    assert watch.state["before"] == {"a/top1": 0.60}
    with pytest.raises(ConfigError, match="a/top1 is no longer measured"):
        watch.check({"b/top1": 0.5}, 4)
