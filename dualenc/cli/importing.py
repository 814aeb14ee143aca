"""dualenc import: command lines and checkpoints of other trainers."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualenc.cli.app import Debug, app
from dualenc.config import load_recipe
from dualenc.errors import ConfigError
from dualenc.terminal import PatientConsole

if TYPE_CHECKING:
    from dualenc.importing.draft import Became, Draft

import_app = typer.Typer(
    help="Turn the command line of another trainer into a recipe.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(import_app, name="import")

Flags = Annotated[
    list[str] | None,
    typer.Argument(help="After --: the trainer's own flags, with or without torchrun … -m … in front."),
]
Params = Annotated[Path | None, typer.Option("--params", help="Instead of flags: params.txt of one of its runs.")]
Out = Annotated[Path | None, typer.Option("--out", help="Recipe to write. Default: print it.")]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", min=1, help="Number of GPUs (processes) it ran on, where the command line does not say it."),
]


@import_app.command("open_clip")
def open_clip(
    flags: Flags = None,
    params: Params = None,
    out: Out = None,
    gpus: Gpus = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Its epoch_N.pt: weights and optimizer state become the run's checkpoint."),
    ] = None,
    debug: Debug = False,
) -> None:
    """A recipe from an open_clip command line: dualenc import open_clip -- --model ViT-B-32 --train-data …

    Says on stderr what became of every flag. With --checkpoint the run folder gets a checkpoint from which
    dualenc train goes on.
    """
    from dualenc.importing.from_open_clip import read, translate

    _check(flags, params, "open_clip", "--model ViT-B-32 --train-data 'cc3m-{000..331}.tar' --batch-size 256")
    if checkpoint is not None and out is None:
        raise ConfigError("--checkpoint needs --out recipe.yaml, the recipe of the run that goes on")
    draft = translate(read(flags or [], params), gpus)
    _write(draft, "open_clip", flags, params, out)
    if checkpoint is not None and out is not None:
        from dualenc.importing.epoch_file import take_over

        save = take_over(load_recipe(out), checkpoint, draft.steps_per_epoch)
        _say(f"checkpoint: {save}")
        _say(f"next: dualenc train {out}, which goes on from it")
    elif out is not None:
        _say(f"next: dualenc train {out} --dry-run")


@import_app.command("clap")
def clap(flags: Flags = None, params: Params = None, out: Out = None, gpus: Gpus = None, debug: Debug = False) -> None:
    """A recipe from a LAION-CLAP command line: dualenc import clap -- --amodel HTSAT-tiny --tmodel roberta …

    Says on stderr what became of every flag.
    """
    from dualenc.importing.from_clap import read, translate

    _check(flags, params, "clap", "--amodel HTSAT-tiny --tmodel roberta --datasetpath data --datasetnames Clotho")
    draft = translate(read(flags or [], params), gpus)
    _write(draft, "laion_clap", flags, params, out)
    if out is not None:
        _say(f"next: dualenc train {out} --dry-run")


def _check(flags: list[str] | None, params: Path | None, name: str, example: str) -> None:
    if bool(flags) == (params is not None):
        raise ConfigError(
            f"dualenc import {name}: give either flags after --, or --params params.txt; for example dualenc import "
            f"{name} -- {example}"
        )


def _write(draft: Draft, program: str, flags: list[str] | None, params: Path | None, out: Path | None) -> None:
    """The recipe, checked, to the file or stdout; what became of the flags to stderr."""
    from dualenc.files import write_atomically

    if draft.whole:
        draft.recipe()
    source = f"{program} {shlex.join(flags)}" if flags else str(params)
    text = draft.text(
        f"Written by dualenc import from this command line:\n    {source}" if flags else f"From {source}."
    )
    titles: dict[Became, str] = {"taken": "Taken over", "different": "Different here", "left out": "Left out"}
    for became, title in titles.items():
        notes = [n for n in draft.notes if n.became == became]
        if notes:
            _say(f"{title}:")
        for note in notes:
            _say(f"  {note.flag}: {note.why}")
    if out is None:
        print(text, end="")
    else:
        if out.exists():
            raise ConfigError(f"--out {out} exists; choose another name or remove it")
        write_atomically(out, text)
        _say(f"recipe: {out}")


def _say(line: str) -> None:
    PatientConsole(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
