"""Recipes: inheritance, overrides, and errors that say what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualenc.config import Component, LogitScale, Recipe, dump_yaml, load_recipe, read_yaml, settings_as
from dualenc.errors import ConfigError
from dualenc.model.start_from import completed

ROOT = Path(__file__).parents[1]

BASE = """
name: tiny
modalities:
  image: {encoder: {name: own/convnet, width: 8}}
  text: {encoder: {name: own/transformer}}
data:
  sources:
    - {name: s, shards: "./data/a-{000..003}.tar"}
batch: {size: 8}
budget: {steps: 3}
optim: {lr: 1e-3}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(BASE)
    return path


def test_defaults_and_exponents(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert loaded.optim.lr == 1e-3  # YAML 1.1 alone would read 1e-3 as a string
    assert loaded.pairs == [("image", "text")]


def test_paths_are_relative_to_their_file(recipe: Path, tmp_path: Path) -> None:
    child = tmp_path / "sub" / "child.yaml"
    child.parent.mkdir()
    child.write_text("base: ../tiny.yaml\nname: child\ncheckpoint: {init_from: ./start}\n")
    loaded = load_recipe(child)
    assert loaded.data.sources[0].shards == str(tmp_path / "data" / "a-{000..003}.tar")
    assert loaded.checkpoint.init_from == str(tmp_path / "sub" / "start")


def test_base_merges_and_a_renamed_component_replaces(recipe: Path, tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(
        "base: tiny.yaml\nmodalities: {image: {encoder: {name: own/vit, layers: 2}}}\noptim: {eps: 1e-8}\n"
    )
    loaded = load_recipe(child)
    assert loaded.modalities["image"].encoder.settings == {"layers": 2}  # width was the other tower's
    assert (loaded.optim.lr, loaded.optim.eps) == (1e-3, 1e-8)
    assert loaded.name == "tiny"


def test_bases_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_recipe(tmp_path / "a.yaml")


def test_overrides_reach_lists_and_components(recipe: Path) -> None:
    loaded = load_recipe(
        recipe, ["data.sources.0.weight=2", "modalities.image.encoder.width=16", "batch.size=4", "out=/tmp/x"]
    )
    assert loaded.data.sources[0].weight == 2
    assert loaded.modalities["image"].encoder.settings == {"width": 16}
    assert (loaded.batch.size, loaded.out) == (4, "/tmp/x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"optim\.lrr: unknown key \(in the command line\)\. Did you mean 'lr'\?"),
        ("modalitis.image=1", r"modalitis: unknown key .*Did you mean 'modalities'\?"),
        ("data.sources.0.weigth=2", r"data\.sources\.0\.weigth: unknown key .*Did you mean 'weight'\?"),
        ("data.sources.1.weight=2", r"data\.sources\.1\.weight: '1' is not a position in a list of length 1"),
        ("optim.lr=fast", r"optim\.lr: .*valid number.*got 'fast' \(in the command line\)"),
        ("optim.name=adam", r"optim\.name: .*'adamw', 'muon' or 'sgd', got 'adam'"),
        ("budget={}", r"budget: give exactly one of steps, samples, epochs"),
        ("pairs=[[image,txt]]", r"no modality 'txt'\. Did you mean 'text'\?"),
        ("batch.micro=16", r"batch\.micro \(16\) is larger than batch\.size \(8\)"),
        ("eval.guard.max_fall=3", r"eval\.guard\.tasks: this key is needed"),
        ("eval.guard={tasks: [a], max_fall: 0}", r"eval\.guard\.max_fall: .*greater than 0"),
        ("eval.guard={tasks: [a], action: halt}", r"eval\.guard\.action: .*'stop' or 'warn', got 'halt'"),
        ("nonsense", r"Cannot read 'nonsense': write key=value"),
    ],
)
def test_errors_say_key_file_and_remedy(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe, [override])


def test_mixtures_have_no_teacher(recipe: Path) -> None:
    """A teacher, run or stored, sees the item unmixed; the student's own average sees what the student sees."""
    terms = "terms: [{name: feature}]"
    with pytest.raises(ConfigError, match=r"data\.mix: 0\.5 cannot be used with distill\.teachers.*data\.mix: 0"):
        load_recipe(recipe, ["data.mix=0.5", f"distill={{teachers: [{{cache: x}}], {terms}}}"])
    load_recipe(recipe, ["data.mix=0.5", f"distill={{look_ahead: {{}}, {terms}}}"])


def test_error_names_the_file_that_said_it(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(BASE + "schedule: {warmup: 3}\n")
    child = tmp_path / "child.yaml"
    child.write_text("base: tiny.yaml\nname: child\n")
    with pytest.raises(ConfigError, match=rf"schedule\.warmup: unknown key \(in {recipe}\)"):
        load_recipe(child)


def test_missing_recipe_suggests_a_neighbour(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'tiny\.yaml'\?"):
        load_recipe(recipe.with_name("tinny.yaml"))


def test_key_given_twice(recipe: Path) -> None:
    recipe.write_text(BASE + "name: again\n")
    with pytest.raises(ConfigError, match="key 'name' is given twice"):
        load_recipe(recipe)


def test_yaml_executes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['touch /tmp/should-not-exist']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(path)


def test_component_settings_are_checked_by_their_own_class() -> None:
    part = Component.model_validate({"name": "x", "inti": 3})
    with pytest.raises(ConfigError, match=r"logit_scale\.inti: unknown key .*Did you mean 'init'\?"):
        settings_as(LogitScale, part.settings, "logit_scale")


def test_a_resolved_recipe_reads_back_as_itself(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, ["optim.eps=1e-8"])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(loaded))
    assert load_recipe(path) == loaded


def test_of_several_bases_the_last_decides_a_length_that_can_be_given_only_once(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("budget: {steps: 4}\n")
    (tmp_path / "samples.yaml").write_text(f"base: {recipe}\nbudget: {{samples: 320}}\n")
    (tmp_path / "both.yaml").write_text("base: [samples.yaml, short.yaml]\nname: both\n")
    (tmp_path / "long.yaml").write_text("base: both.yaml\nbudget: {samples: 640}\n")
    assert load_recipe(tmp_path / "both.yaml").budget.steps == 4
    assert load_recipe(tmp_path / "long.yaml").budget.steps is None


def test_a_base_can_be_a_shipped_recipe_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: quickstart\nname: mine\n")
    loaded = load_recipe(tmp_path / "mine.yaml")
    assert loaded.modalities == load_recipe("quickstart").modalities
    (tmp_path / "wrong.yaml").write_text("base: quickstrat\nname: mine\n")
    with pytest.raises(ConfigError, match="no file"):
        load_recipe(tmp_path / "wrong.yaml")


def test_every_recipe_in_the_repository_loads() -> None:
    found = [p for p in sorted((ROOT / "recipes").rglob("*.yaml")) if "launch" not in p.parts and p.name[0] != "_"]
    assert found
    for path in found:
        parts = read_yaml(path)[0].get("modalities") or {}
        if any("encoder" in part or "shares" in part for part in parts.values()):
            assert isinstance(load_recipe(path), Recipe)
        else:  # it fine-tunes whatever model the command line names
            with pytest.raises(ConfigError, match=r"checkpoint\.init_from|encoder: this key is needed"):
                load_recipe(path, complete=completed)
