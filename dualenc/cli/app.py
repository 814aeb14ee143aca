"""The typer application and what its commands share."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="Train, evaluate and use dual encoders of any pair of modalities.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # square brackets are the words of a help text, not markup
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, dotted: optim.lr=1e-3 data.sources.0.shards=my-{000..009}.tar")
]
AllowPipe = Annotated[
    bool, typer.Option("--allow-pipe", help="Run the shell commands that pipe:COMMAND shards name; else refused.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]
