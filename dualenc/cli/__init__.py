"""The ``dualenc`` command: the one place that brings training, evaluation and data tools together.

Exit codes: 0 done; 1 other errors; 2 recipe or command line; 3 data; 4 checkpoint; 5 diverged; 6 stopped by
eval.guard, with a checkpoint; 130 stopped by a signal, with a checkpoint.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Annotated

import typer
from rich.logging import RichHandler

from dualenc import __version__, plugins
from dualenc.cli import compare, evaluate, importing, init, listing, mine, plan, report, shards, task, train, use  # noqa: F401  (their commands register themselves)
from dualenc.cli.app import app
from dualenc.errors import DualencError
from dualenc.terminal import PatientConsole, open_standard_streams

__all__ = ["app", "main"]

PLACES = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENOENT, errno.ENAMETOOLONG, errno.EIO,
}  # fmt: skip
"""What is wrong with a path that a person named, and not with the program that opens it."""


def main() -> None:
    """Entry point. Errors meant for the user are one line on stderr; ``--debug`` shows the traceback."""
    open_standard_streams()
    sys.argv[1:] = take_plugins(take_launcher_arguments(sys.argv[1:]))
    debug = "--debug" in sys.argv
    if not debug:  # torch's C++ warnings come once per rank and can be silenced only before torch is loaded
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.basicConfig(
        level=logging.INFO if debug else logging.WARNING,
        format="%(name)s: %(message)s",
        handlers=[RichHandler(console=PatientConsole(stderr=True), show_time=False, show_path=False)],
    )
    try:
        app(standalone_mode=True)
    except DualencError as e:
        if debug:
            raise
        PatientConsole(stderr=True).print(f"[bold red]error:[/] {_escape(str(e))}", highlight=False, soft_wrap=True)
        raise SystemExit(e.exit_code) from None
    except OSError as e:
        if debug or e.errno not in PLACES or e.filename is None:
            raise
        said = f"{e.filename} cannot be used ({(e.strerror or '').lower()})"
        PatientConsole(stderr=True).print(f"[bold red]error:[/] {_escape(said)}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def take_launcher_arguments(argv: list[str]) -> list[str]:
    """The deepspeed launcher puts ``--local_rank=N`` before the script's own arguments: it goes to LOCAL_RANK."""
    kept = []
    for arg in argv:
        if arg.startswith(("--local_rank=", "--local-rank=")):
            os.environ.setdefault("LOCAL_RANK", arg.split("=", 1)[1])
        else:
            kept.append(arg)
    return kept


def take_plugins(argv: list[str]) -> list[str]:
    """``--plugins a,b`` may appear anywhere: it goes to DUALENC_PLUGINS, so that every process of a launch has it."""
    kept, named = [], []
    rest = iter(argv)
    for arg in rest:
        if arg == "--plugins":
            named.append(next(rest, ""))
        elif arg.startswith("--plugins="):
            named.append(arg.partition("=")[2])
        else:
            kept.append(arg)
    if named:
        before = os.environ.get(plugins.ENV, "")
        os.environ[plugins.ENV] = ",".join(n for n in (before, *named) if n)
    return kept


@app.callback(invoke_without_command=True)
def _version(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    plugins: Annotated[
        str | None,
        typer.Option(
            "--plugins",
            help="For every command: modules to import for their losses, encoders …, comma-separated; "
            "checkpoints that need these modules may use them.",
        ),
    ] = None,
) -> None:
    if version:
        print(f"dualenc {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(2)
