"""What ``import dualenc`` costs and gives: every name lazily, in any order of imports."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from _shared import PYTHONPATH, ROOT

import dualenc


def python(code: str) -> str:
    """stdout of a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_imports_nothing() -> None:
    code = "import sys; before = set(sys.modules); import dualenc; print(sorted(set(sys.modules) - before))"
    loaded = python(code)
    assert "torch" not in loaded
    assert "pydantic" not in loaded
    assert "numpy" not in loaded


def test_every_public_name_is_there_documented_and_typed() -> None:
    for name in dualenc.__all__:
        assert name in dir(dualenc)
        if name == "__version__":
            continue
        thing = getattr(dualenc, name)
        assert (thing.__doc__ or "").strip(), name
        if callable(thing) and not isinstance(thing, type) and name not in ("train", "losses"):
            assert "return" in typing.get_type_hints(thing, localns={"Model": object, "Bundle": object, "Task": object})
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        dualenc.load_modle  # noqa: B018


@pytest.mark.parametrize(
    "first",
    [
        "",
        "import dualenc.train.loop",
        "from dualenc.train.loop import train",
        "dualenc.train",
        "import dualenc.api.runs",
    ],
)
def test_train_is_a_folder_and_a_function_whatever_was_imported_first(first: str) -> None:
    code = f"""
import dualenc
{first}
import dualenc.train.loop as loop
from dualenc.errors import ConfigError
assert dualenc.train.loop is loop
try:
    dualenc.train("quickstrat")
except ConfigError as e:
    print(e)
"""
    assert "There is no recipe 'quickstrat'. Did you mean 'quickstart'?" in python(code)


def test_losses_are_functions_and_files() -> None:
    code = """
import dualenc
from dualenc.losses.info_nce import InfoNCE
from dualenc.losses import build_loss
import torch
print(float(dualenc.losses.info_nce(torch.eye(2), torch.eye(2), 50.0)) < 1e-6, InfoNCE.__module__)
"""
    assert python(code) == "True dualenc.losses.info_nce"


def test_import_help_and_dry_run_are_quick() -> None:
    """In seconds of the processor, up to three tries: what else runs on the machine is not this test's business. Where
    it shares the caches, the same work takes longer: half more at most."""
    main = [sys.executable, "-m", "dualenc"]
    for command, seconds in (
        ([sys.executable, "-c", "import dualenc"], 0.3),
        ([*main, "--help"], 0.5),
        ([*main, "list", "losses"], 1.5),
        ([*main, "list", "recipes"], 1.5),
        ([*main, "train", "quickstart", "--dry-run"], 3.0),
    ):
        took: list[float] = []
        while len(took) < 3 and (not took or min(took) > seconds):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=clean())
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        print(f"{' '.join(command[1:])}: {min(took):.2f} s")
        assert min(took) <= 1.5 * seconds, command


def test_commands_that_need_no_torch_do_not_import_it() -> None:
    for command in (
        "['--help']",
        "['list', 'losses']",
        "['list', 'terms']",
        "['list', 'recipes']",
        "['train', '--help']",
    ):
        code = f"""
import contextlib, io, sys
sys.argv = ["dualenc", *{command}]
from dualenc.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
print("torch" in sys.modules, "transformers" in sys.modules)
"""
        assert python(code) == "False False", command


def clean() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": PYTHONPATH, "COLUMNS": "120"}


def test_what_list_losses_reads_from_the_source_is_what_is_registered() -> None:
    from dualenc.cli.listing import declared
    from dualenc.distill import terms
    from dualenc.losses import losses

    package = Path(dualenc.__file__).parent
    for registry, folder, known in (("losses", "losses", losses), ("terms", "distill/terms", terms)):
        found = declared(registry, package / folder)
        assert sorted(found) == list(known)
        for name, doc in found.items():
            assert doc == (known[name].__doc__ or "").strip().split("\n")[0]
            assert doc, name


def test_recipes_by_name_are_their_files() -> None:
    from dualenc.shipped import find_recipe, shipped_recipes

    known = shipped_recipes()
    assert {"quickstart", "finetune/fashion_lora", "image_text/vit_s32"} <= set(known)
    assert dualenc.load_recipe("quickstart") == dualenc.load_recipe(ROOT / "recipes" / "quickstart" / "quickstart.yaml")
    assert find_recipe("mine.yaml") == Path("mine.yaml")  # refused where it is read, with the nearest file beside it
    assert len(known) == len({p.resolve() for p in known.values()})
