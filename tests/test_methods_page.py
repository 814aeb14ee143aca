"""docs/methods.md names every registered loss and term, every one of the 61 papers, and only files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from _shared import ROOT

from benchmarks.methods import MAKERS
from dualenc.cli.listing import LINES, OF_PLANS, docstrings, said
from dualenc.compare.study import is_comparison, read_comparison
from dualenc.config import load_recipe
from dualenc.losses import build_loss, check_loss
from dualenc.model.start_from import completed
from dualenc_evals.catalog import load_task

TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", TEXT)
HALVES = (("losses", "losses"), ("terms", "distill/terms"))
FILE = re.compile(r"[\w./]+\.(?:py|yaml|md)")


def test_every_registered_loss_and_term_has_a_place() -> None:
    for registry, folder in HALVES:
        names = set(docstrings(registry, ROOT / "dualenc" / folder))
        assert len(names) >= 8
        assert names <= set(CODE), f"docs/methods.md lacks {sorted(names - set(CODE))}"


UNSAID = {"info_nce", "sigmoid", "cwcl"}
"""Their docstrings say it in sentences so far."""


def test_every_loss_and_term_says_formula_paper_and_needs() -> None:
    for registry, folder in HALVES:
        for name, doc in docstrings(registry, ROOT / "dualenc" / folder).items():
            if name in UNSAID:
                continue
            assert set(said(doc)) == set(LINES), f"{registry} {name}: {sorted(said(doc))}"
            assert all(said(doc).values()), name


STUDIES = ROOT / "benchmarks" / "studies"
NEED_PLACES = {"prc", "point_contrast", "rad", "local_contrast", "dense"}
"""Losses on places, whose tables are of camera and LiDAR and of street scenes."""


def test_every_loss_and_term_is_compared_with_the_others() -> None:
    studies = [read_comparison(path) for path in STUDIES.glob("*.yaml") if is_comparison(str(path))]
    methods = {name: m for study in studies for name, m in study.methods.items()}
    said = " ".join(item for m in methods.values() for item in [m.recipe, *m.overrides])
    for registry, folder in HALVES:
        names = set(docstrings(registry, ROOT / "dualenc" / folder)) - NEED_PLACES
        missing = {n for n in names if n not in methods and n not in re.findall(r"\w+", said)}
        assert missing == set(), f"benchmarks/studies lack {sorted(missing)}"


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_method_of_a_study_is_a_recipe_that_can_be_trained(path: Path, tmp_path: Path) -> None:
    if not is_comparison(str(path)):
        assert load_task(str(path)).kind == "retrieval"
        return
    study = read_comparison(path)
    assert path.stem in MAKERS
    for name in study.methods:
        recipe, *overrides = study.command(name, 0, tmp_path)
        if "run:" not in " ".join(study.methods[name].overrides):  # those need the run that they start from
            built = load_recipe(recipe, overrides, completed)
            check_loss(build_loss(built.loss), built.data, built.pairs)
            assert [load_task(str(t)).name for t in built.eval.tasks]


def test_every_batch_plan_says_what_it_keeps_and_needs() -> None:
    plans = docstrings("batch_plans", ROOT / "dualenc" / "data" / "batches")
    assert set(plans) == {"bags", "by_source", "by_value", "clusters", "groups", "hard_negatives"}
    for name, doc in plans.items():
        assert set(said(doc)) == set(OF_PLANS), name


def test_all_papers_are_there_once() -> None:
    rows = re.findall(r"^\| (S\d\d) \| (.+?) \| (.+?) \| (.*?) ?\|$", TEXT, re.MULTILINE)
    assert [number for number, *_ in rows] == [f"S{k:02}" for k in range(1, 62)]
    for number, paper, where, why in rows:
        assert paper.strip(), number
        assert where.strip(), number
        assert why.strip() or not where.startswith("outside"), f"{number}: say why"


def test_every_path_it_names_exists() -> None:
    paths = [c for c in CODE if FILE.fullmatch(c) and "/" in c]
    assert len(paths) > 15
    assert [p for p in paths if not (ROOT / p).exists()] == []


def test_every_test_it_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", TEXT)
    assert len(named) > 10
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text("utf-8")]
    assert missing == []


def test_the_second_view_is_one_tower_and_a_pair_of_its_own() -> None:
    recipe = load_recipe("quickstart/slip")
    assert recipe.modalities["view"].shares == "image"
    assert recipe.loss.name == "sum"
    assert recipe.pairs == [("image", "text"), ("image", "view")]
