"""The typer application and what its commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dualenc.cli import names

app = typer.Typer(
    help="Train, evaluate and use dual encoders of any pair of modalities.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,  # square brackets are the words of a help text, not markup
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Recipe overrides, key=value with dotted keys: optim.lr=1e-3 data.sources.0.shards=my-{000..009}.tar",
        autocompletion=names.overrides,
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, mps or xpu.")]
Precision = Annotated[
    str,
    typer.Option("--precision", help="fp32, bf16, or fp16 on a GPU: what the model computes in; features stay fp32."),
]
AllowPipe = Annotated[bool, typer.Option("--allow-pipe", help="Allow pipe:COMMAND shards to run their shell commands.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


def key_values(items: list[str]) -> dict[str, Any]:
    """``a.b=3`` items as a nested mapping, values read as YAML."""
    from dualenc.config import apply_override

    raw: dict[str, Any] = {}
    for item in items:
        apply_override(raw, item, {})
    return raw
