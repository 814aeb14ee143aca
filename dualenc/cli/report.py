"""dualenc report: a page about a run, several runs, or several models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dualenc.cli.app import Debug, app
from dualenc.errors import ConfigError, did_you_mean
from dualenc.terminal import PatientConsole

EVERY_S = 5


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="A run folder; several, to compare their curves; or several results.json, to compare models."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="HTML page to write. Default: report.html in the run folder, else runs.html or models.html.",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep rewriting the page, which reloads itself, until the runs end.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page: a run with its curves, or a comparison of several runs or models.

    dualenc report runs/NAME; dualenc report runs/A runs/B; dualenc report A.json B.json … --out page.html
    """
    for run in runs:
        if not run.exists():
            raise ConfigError(f"There is no file or folder {run}. {did_you_mean(run.name, _names(run.parent))}")
    if watch:
        _watch(runs, out)
        return
    PatientConsole().print(f"report: {_write(runs, out)}", highlight=False, soft_wrap=True)


def _write(runs: Sequence[Path], out: Path | None, refresh: int = 0, live: str = "") -> Path:
    from dualenc_evals.pages.models import write_comparison
    from dualenc_evals.pages.run import write_report
    from dualenc_evals.pages.runs import is_run, write_runs

    if len(runs) == 1 and runs[0].is_dir():
        return write_report(runs[0], out, refresh, live)
    if all(is_run(r) for r in runs):
        return write_runs(runs, out or Path("runs.html"), refresh, live)
    return write_comparison(runs, out or Path("models.html"))


def _watch(runs: Sequence[Path], out: Path | None) -> None:
    """Rewrite the page every few seconds while a process trains into one of the folders, and once more at the end."""
    from dualenc.train.lock import is_running

    if not all(r.is_dir() for r in runs):
        raise ConfigError("--watch: give run folders; a results.json does not change")
    console = PatientConsole(stderr=True)
    seen: float | None = None
    while going := [r for r in runs if is_running(r)]:
        changed = max((p.stat().st_mtime for r in runs for p in r.glob("metrics.jsonl")), default=0.0)
        if changed != seen and all(any(r.glob("*.yaml")) or any(r.glob("metrics.jsonl")) for r in runs):
            live = f"running: {', '.join(r.name for r in going)}; this page reloads every {EVERY_S} s"
            page = _write(runs, out, EVERY_S, live)
            if seen is None:
                line = f"report: {page}, rewritten until the run ends (Ctrl-C stops watching, not the run)"
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            seen = changed
        time.sleep(EVERY_S)
    page = _write(runs, out)
    ended = "the run has ended" if seen is not None else "no process trains into it now"
    console.print(f"report: {page} ({ended})", highlight=False, markup=False, soft_wrap=True)


def _names(parent: Path) -> list[str]:
    return [p.name for p in parent.iterdir()] if parent.is_dir() else []
