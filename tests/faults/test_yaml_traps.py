"""Recipes and tasks that are traps: refused in one sentence, at once, whoever wrote them."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

import pytest
import yaml
from _shared import DATA, ROOT

from dualenc.cli import main
from dualenc.config import load_recipe, load_yaml, read_yaml
from dualenc.config.reading import MAX_BYTES, MAX_DEPTH, MAX_VALUES
from dualenc.errors import ConfigError, DataError
from dualenc_evals.catalog import load_task
from dualenc_evals.read.shards import read_rows

RECIPE = ROOT / "recipes" / "quickstart" / "quickstart.yaml"
FAULTS = DATA.parent / "faults"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def bomb(levels: int = 9, key: str = "") -> str:
    """Lists of nine aliases of the list before."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise(LETTERS[:levels])]
    return "\n".join(lines) + f"\n{key}\n"


MERGES = "a: &a {k0: 0, k1: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}], {b}: 1}}\n" for a, b in itertools.pairwise(LETTERS[:10])
)

TRAPS = {
    "aliases": (bomb(), "values once its aliases (*) are expanded"),
    "merges": (MERGES, "values once its aliases (*) are expanded"),
    "itself": ("name: x\nmodalities: &m\n  image: *m\n", "this value contains itself through an alias (*)"),
    "a key that holds itself": ("? &k [*k]\n: 1\n", "this value contains itself"),
    "depth in brackets": ("x: " + "[" * 50_000, "lists and mappings are nested more than"),
    "depth in braces": ("x: " + "{a: " * 20_000, "lists and mappings are nested more than"),
    "depth by spaces": ("\n".join(" " * i + "k:" for i in range(1000)), "lists and mappings are nested more than"),
    "size": ("x: " + "a" * MAX_BYTES, f"have at most {MAX_BYTES:,}"),
    "values": ("x: [" + "1," * (MAX_VALUES + 1) + "]", "values once its aliases"),
    "a number of 5,000 digits": ("seed: " + "9" * 5000, "is not valid YAML"),
    "a day that is none": ("name: 2021-13-45", "is not valid YAML"),
    "a tag": ("x: !!int abc", "is not valid YAML"),
    "an object": ("x: !!python/object/apply:os.system [true]", "is not valid YAML"),
    "no mapping": ("- 1\n- 2\n", "must hold keys and values"),
    "a base of a number": ("base: 7\nname: x\n", "must be a path or a list of paths, not 7"),
    "a base of a mapping": ("base: {a: b}\nname: x\n", "must be a path or a list of paths, not {'a': 'b'}"),
    "a base of lists": ("base: [[a.yaml]]\nname: x\n", "must be a path or a list of paths, not [['a.yaml']]"),
    "a base of nothing": ("base: ['']\nname: x\n", "must be a path or a list of paths, not ['']"),
    "a base that is the file": ("base: trap.yaml\nname: x\n", "include each other in a circle"),
    "a base that is a folder": ("base: .\nname: x\n", "There is no file"),
    "a base with a zero": ('base: "a\\0b"\nname: x\n', "must be a path or a list of paths"),
}


def refusal(path: Path, patch: pytest.MonkeyPatch, captured: pytest.CaptureFixture[str], *command: str) -> str:
    """The one sentence of a command that ends with 2 within two seconds."""
    patch.setattr(sys, "argv", ["dualenc", *command])
    begin = time.process_time()
    with pytest.raises(SystemExit) as ended:
        main()
    assert time.process_time() - begin < 2
    said = captured.readouterr().err
    assert ended.value.code == 2, said
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1, said
    assert path.parent.name in said
    assert len(said) < 600
    return said


@pytest.mark.parametrize("name", TRAPS)
def test_a_recipe_or_task_that_is_a_trap(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text, words = TRAPS[name]
    path = tmp_path / "trap.yaml"
    path.write_text(text)
    assert words in refusal(path, monkeypatch, capfd, "train", str(path), "--dry-run")
    path.write_text(text.replace("base:", "include:"))
    assert words in refusal(path, monkeypatch, capfd, "eval", str(tmp_path), "--task", str(path))


@pytest.mark.parametrize("name", ["alias_bomb", "recursive_anchor"])
def test_the_planted_traps(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not (FAULTS / f"{name}.yaml").is_file():
        pytest.skip(f"{FAULTS / name}.yaml is not here")
    path = tmp_path / f"{name}.yaml"
    path.write_text((FAULTS / f"{name}.yaml").read_text().replace("PATH-TO-ANY-RECIPE", str(RECIPE)))
    said = refusal(path, monkeypatch, capfd, "train", str(path), "--dry-run")
    assert ("once its aliases (*) are expanded" if name == "alias_bomb" else "contains itself") in said


def test_an_override_that_is_a_trap() -> None:
    for value in ("[" * 50_000, "[&a [*a]]", "9" * 5000):
        with pytest.raises(ConfigError, match=r"data\.sources: .* is not valid YAML") as e:
            load_recipe(RECIPE, [f"data.sources={value}"])
        assert len(str(e.value)) < 500


def test_bases_of_bases_are_each_read_once_and_go_no_deeper_than_the_bound(tmp_path: Path) -> None:
    (tmp_path / "r0.yaml").write_text("name: x\n")
    for i in range(1, MAX_DEPTH + 2):
        (tmp_path / f"r{i}.yaml").write_text(f"base: [r{i - 1}.yaml, r{i - 1}.yaml]\ndescription: {i}\n")
    begin = time.process_time()
    assert read_yaml(tmp_path / "r40.yaml")[0] == {"name": "x", "description": 40}
    with pytest.raises(ConfigError, match="files are built on each other"):
        read_yaml(tmp_path / f"r{MAX_DEPTH + 1}.yaml")
    assert time.process_time() - begin < 2


def test_a_thousand_wrong_keys_are_twenty_sentences(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"base: {RECIPE}\n" + "".join(f"wrong{i}: 1\n" for i in range(1000)))
    with pytest.raises(ConfigError, match=r"wrong0: unknown key") as e:
        load_recipe(path)
    assert str(e.value).endswith("… and 980 more.")
    assert len(str(e.value).splitlines()) == 21


def test_patterns_of_ten_thousand_million_names(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for pattern in ("x-{0..9999999999}.tar", "{a,b}" * 34 + ".tar"):
        monkeypatch.setattr(
            sys, "argv", ["dualenc", "train", str(RECIPE), "--dry-run", f"data.sources.0.shards='{pattern}'"]
        )
        begin = time.process_time()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr().err
        assert ended.value.code == 3, said
        assert time.process_time() - begin < 10  # the model is built before
        assert "at most 1,000,000" in said
        assert "Traceback" not in said
    task = tmp_path / "t.yaml"
    task.write_text("kind: retrieval\nsource: {kind: shards, path: './x-{0..9999999999}.tar'}\n")
    with pytest.raises(DataError, match="at most 1,000,000"):
        read_rows(load_task(task))


def test_what_people_write_stays_as_it_was() -> None:
    text = "a: &x {lr: 1e-3, b: [1, 2]}\nc: {<<: *x, lr: 2}\nd: [*x, *x]\ne: 2021-03-04\n"
    assert load_yaml(text) == {**yaml.safe_load(text), "a": {"lr": 1e-3, "b": [1, 2]}} | {
        "d": [{"lr": 1e-3, "b": [1, 2]}] * 2
    }
    assert load_yaml("") is None
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert load_yaml(path.read_text(encoding="utf-8")) is not None
