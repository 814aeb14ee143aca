"""The reference pages, made from the code that they describe: every page is a function that returns Markdown."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from models import about, cell, heading, keys_of, table, tree

import dualenc
from dualenc import errors
from dualenc.cli import app
from dualenc.config import Recipe, read_yaml
from dualenc.data.modalities import modalities
from dualenc.data.plans import plans
from dualenc.data.sources import sources as layouts
from dualenc.distill.terms import term
from dualenc.encoders import families, own_towers
from dualenc.losses import losses
from dualenc.shipped import recipes_folder, shipped_recipes
from dualenc_data_tools.sources import sources as packings
from dualenc_data_tools.sources.source import SourceConfig
from dualenc_evals.catalog import list_tasks
from dualenc_evals.kinds import kinds
from dualenc_evals.task import ClassesTask, Task

GENERATED = "\n\nMade from the code by `docs/site/reference.py` when the site is built.\n{: .generated }\n"
"""The last line of every page."""


def recipe() -> str:
    """Every key of a recipe."""
    return f"""# Recipe keys

A recipe is a YAML file. `base: other.yaml` inherits from another recipe; on the command line, `key.sub=value` sets a
key and `data.sources.0.shards=…` an entry of a list. Unknown keys are refused with the nearest known one. Keys of a
modality's `input` are on [Inputs](inputs.md), those of its `encoder` on [Encoders](encoders.md), those of `loss` and
`distill.terms` on [Losses and terms](losses.md).

{tree(Recipe, "", 2)}
## `data.sampling` {{: #sampling }}

{table(("name", "what it does"), ([f"`{n}`", cell(about(plans[n]))] for n in plans))}
"""


def inputs() -> str:
    """Every modality and the keys of its ``input``."""
    out = ["# Inputs\n\nThe keys of `modalities.NAME.input`: how raw bytes become what the tower sees.\n"]
    for kind in modalities:
        cls = modalities[kind]
        endings = ", ".join(f"`{e}`" for e in cls.default_members)
        out.append(heading(2, f"`{kind}`", kind))
        out.append(f"{about(cls)} Shard members tried in turn: {endings}.\n")
        out.append(tree(cls.Config, "", 3, f"{kind}."))
    return "\n".join(out)


def encoders() -> str:
    """Every family of encoders and every tower of this project, with their settings."""
    out = [
        """# Encoders

`encoder: {name: FAMILY/NAME, …}` in a recipe; the other keys are the settings below. `dualenc list encoders` prints
every name. A tower of your own: [add an encoder](../extend/encoder.md)."""
    ]
    for name in families:
        family = families[name]()
        if name == "own":
            continue
        names = family.names()
        count = f" {len(names):,} names." if len(names) > 3 else ""
        out += [heading(2, f"`{name}/`", name), f"{about(type(family))} For {_list(family.kinds)}.{count}\n"]
        out.append(tree(family.Config, "", 3, f"{name}."))
    out += [heading(2, "`own/`", "own"), "Towers of this project, small and from random weights.\n"]
    for name in own_towers:
        tower = own_towers[name]
        out += [heading(3, f"`own/{name}`", f"own-{name}"), f"{about(tower)} For {_list(tower.kinds)}.\n"]
        out.append(tree(tower.Config, "", 4, f"own.{name}."))
    return "\n".join(out)


def _list(words: tuple[str, ...]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def losses_and_terms() -> str:
    """Every loss and every distillation term, with its formula's source and its settings."""
    out = [
        """# Losses and terms

`loss: {name: …}` is the recipe's own loss; `distill.terms` is a list of terms. The gradient of each is that of one
process on the whole batch, whatever the engine, the number of ranks and the micro-batch
([why](../concepts.md#the-gradient-contract)).

## Losses
"""
    ]
    for name in losses:
        out += [
            heading(3, f"`{name}`", f"loss-{name}"),
            _with_module(losses[name]),
            tree(losses[name].Config, "", 4, f"loss.{name}."),
        ]
    out.append("## Distillation terms\n")
    for name in term.terms:
        cls = term.terms[name]
        out += [heading(3, f"`{name}`", f"term-{name}"), _with_module(cls), tree(cls.Config, "", 4, f"term.{name}.")]
    return "\n".join(out)


def _with_module(cls: type) -> str:
    """What a class says of itself and, under a fold, what its module says of the formula."""
    module = inspect.getdoc(sys.modules[cls.__module__]) or ""
    text = "\n".join(f"    {line}".rstrip() for line in module.splitlines())
    facts = re.findall(r"^\s*(Formula|Paper|Needs): (.+)$", cls.__doc__ or "", re.MULTILINE)
    known = "".join(f"\n- **{what}**: {f'`{said}`' if what == 'Formula' else cell(said)}" for what, said in facts)
    return f'{about(cls)}\n{known}\n\n??? info "In full, from `{cls.__module__}`"\n\n    ```text\n{text}\n    ```\n'


def sources() -> str:
    """Every source: what it reads, and what packing adds."""
    out = [
        f"""# Sources

A source is a layout that data sets come in. `dualenc shards build NAME key=value … --out FOLDER` packs it into shards;
a task reads it with `source: {{kind: NAME, …}}`. A source of your own: [add a source](../extend/source.md).

{table(("source", "what it reads"), ([f"[`{n}`](#{n})", cell(packings[n].about)] for n in packings))}
## Settings of every `shards build` {{: #every }}

{keys_of(SourceConfig)}"""
    ]
    for name in packings:
        config = packings[name].config
        read = layouts[name].settings.model_fields if name in layouts else {}
        out += [heading(2, f"`{name}`", name), f"{about(config)}\n"]
        if read:
            keys = ", ".join(f"`{k}`" for k in read)
            out.append(f"In packing and in a task's `source`: {keys}; the rest is for packing.\n")
        out.append(tree(config, "", 3, f"{name}.", SourceConfig.model_fields))
    return "\n".join(out)


def tasks() -> str:
    """Every key of a task by kind, and every shipped task."""
    out = [
        f"""# Tasks

An evaluation task is a YAML file: `dualenc eval MODEL --task mine.yaml`; shipped ones go by name:
`--tasks cifar10,coco_cc`. `include: NAME` starts from another task.
[Evaluate your own set](../howto/evaluate.md) shows one.

## Keys of every task {{: #every }}

{tree(Task, "", 3)}
## Keys of tasks with classes {{: #classes }}

{about(ClassesTask)}

{tree(ClassesTask, "", 3, "classes.", Task.model_fields)}"""
    ]
    for name in kinds:
        cls = kinds[name].Task
        base: type[Task] = ClassesTask if issubclass(cls, ClassesTask) else Task
        also = " and [those of tasks with classes](#classes)" if base is ClassesTask else ""
        out += [
            heading(2, f"`kind: {name}`", f"kind-{name}"),
            f"{about(kinds[name])}\n\n[The keys of every task](#every){also}, and:\n",
        ]
        out.append(tree(cls, "", 3, f"{name}.", base.model_fields))
    rows = ([f"`{t.name}`", t.kind, cell(t.description)] for t in list_tasks())
    out += ["## Shipped tasks {: #shipped }\n", table(("task", "kind", "what it measures"), rows)]
    return "\n".join(out)


def commands() -> str:
    """Every command with its arguments and options."""
    out = ["# Commands\n"]
    out += [_command(path, command) for path, command in sorted(_walk(typer.main.get_command(app)))]
    return "\n".join(out)


def _walk(group: Any, path: str = "dualenc") -> Iterator[tuple[str, Any]]:
    inside = vars(group).get("commands", {})
    if path == "dualenc" or not inside:
        yield path, group
    for name, command in inside.items():
        yield from _walk(command, f"{path} {name}")


def _command(path: str, command: Any) -> str:
    rows = []
    for p in command.params:
        option = p.opts[0].startswith("-")
        name = (
            ", ".join(f"`{o}`" for o in p.opts) if option else f"`{p.name.upper()}`" + (" …" if p.nargs == -1 else "")
        )
        flag = option and p.is_flag
        default = "" if flag or p.default is None or not option else f"`{p.default}`"
        rows.append([name, "**required**" if p.required else default, cell(p.help or "")])
    body = table(("", "default", ""), rows)
    return f"{heading(2, f'`{path}`', path.replace(' ', '-'))}\n{cell(command.help or '')}\n\n{body}"


def exit_codes() -> str:
    """Every exit code."""
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.DualencError)]
    by_code: dict[int, list[type[errors.DualencError]]] = {}
    for cls in found:
        by_code.setdefault(cls.exit_code, []).append(cls)
    rows = [["0", "", "Done."]]
    rows += [
        [str(code), ", ".join(f"`{c.__name__}`" for c in by_code[code]), cell(about(by_code[code][0]))]
        for code in sorted(by_code)
    ]
    return f"""# Exit codes

Every error that a user can cause is one sentence on stderr and one of these codes. From Python they are the exceptions
of `dualenc.errors`. `--debug` shows the traceback. What the sentences mean: [Troubleshooting](../troubleshooting.md).

{table(("code", "exception", "when"), rows)}
"""


def recipes() -> str:
    """Every shipped recipe as it stands."""
    root = recipes_folder()
    shipped = shipped_recipes()
    rows = [
        [f"[`{n}`](#{anchor_of(n)})", cell(str(read_yaml(p)[0].get("description", "")))] for n, p in shipped.items()
    ]
    out = [
        f"""# Shipped recipes

`dualenc train NAME` takes these names, in a checkout and from the wheel.

{table(("recipe", "what it trains"), rows)}"""
    ]
    for name, path in shipped.items():
        title = f"`recipes/{path.relative_to(root).as_posix()}`"
        out.append(
            f"{heading(2, f'`{name}`', anchor_of(name))}\n{title}\n\n```yaml\n{path.read_text(encoding='utf-8')}```\n"
        )
    return "\n".join(out)


def anchor_of(recipe: str) -> str:
    """The anchor of a shipped recipe on its page."""
    return recipe.replace("/", "-")


def python_api() -> str:
    """The public names, by mkdocstrings."""
    out = [
        "# Python API\n\nA name is loaded when it is first used, so `import dualenc` takes milliseconds. "
        "[By example](../python.md).\n"
    ]
    modules = vars(dualenc)["_PUBLIC"]
    for name in ("load_model", "Model", "Predictions", "SearchIndex", "Hit", "load_recipe", "evaluate"):
        out.append(_documented(f"dualenc.{name}", f"{modules[name]}.{name}"))
    assert set(modules) == {"load_model", "Model", "Predictions", "SearchIndex", "Hit", "load_recipe", "evaluate"}
    out.append(_documented("dualenc.train", "dualenc.api.runs.train"))
    for name in ("info_nce", "sigmoid", "cwcl", "mse"):
        out.append(_documented(f"dualenc.losses.{name}", f"dualenc.losses.functional.{name}"))
    out.append(_documented("dualenc.features.FeatureStore", "dualenc.features.store.FeatureStore"))
    return "\n".join(out)


def _documented(name: str, where: str) -> str:
    """One object under the name it is imported by."""
    return f"""::: {where}
    options:
      heading: "{name}"
      toc_label: "{name.removeprefix("dualenc.")}"
      show_root_heading: true
      show_root_toc_entry: true
      heading_level: 2

"""


PAGES: dict[str, Callable[[], str]] = {
    "reference/recipe.md": recipe,
    "reference/inputs.md": inputs,
    "reference/encoders.md": encoders,
    "reference/losses.md": losses_and_terms,
    "reference/sources.md": sources,
    "reference/tasks.md": tasks,
    "reference/commands.md": commands,
    "reference/exit-codes.md": exit_codes,
    "reference/recipes.md": recipes,
    "reference/python.md": python_api,
}

ROOT = Path(__file__).parents[2]


def from_root(name: str) -> str:
    """A file at the top of the repository as a page: its links into ``docs/`` become links between pages."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = text.replace("[LICENSE](LICENSE)", "LICENSE").replace("(CHANGELOG.md)", "(changelog.md)")
    return re.sub(r"\]\(docs/", "](", text)
