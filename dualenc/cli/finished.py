"""What a finished run says last: the model, its numbers, the next command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualenc.terminal import PatientConsole

MOST_LINES = 6


def print_finished(run_dir: Path, own_tasks: Sequence[str]) -> None:
    """Print the model, the best numbers measured while training, and what to do next, on stderr.

    Args:
        own_tasks: of the recipe, for the commands.
    """
    console = PatientConsole(stderr=True)
    for line in finished(run_dir, own_tasks):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def finished(run_dir: Path, own_tasks: Sequence[str]) -> list[str]:
    """The lines that :func:`print_finished` prints."""
    from dualenc.errors import CheckpointError
    from dualenc_evals.pages.run import json_lines

    try:
        save = _newest(run_dir)
    except (CheckpointError, OSError):
        return []
    lines = [f"model: {run_dir} ({save})"]
    lines += _best(json_lines(run_dir / "metrics.jsonl"))
    tasks = ",".join(own_tasks) or "TASK"
    lines.append(f"next: dualenc report {run_dir}    or: dualenc eval {run_dir} --tasks {tasks}")
    return lines


def _newest(run_dir: Path) -> str:
    from dualenc.model.load import newest_save

    return newest_save(run_dir).name


def _best(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The best value of every headline metric, where it was, and the last where that is another."""
    from dualenc_evals.pages.run import HEADLINES
    from dualenc_evals.pages.table import is_share, label, short

    out = []
    for key in dict.fromkeys(k for r in rows for k in r if k.startswith("eval/")):
        task, _, metric = key.removeprefix("eval/").rpartition("/")
        if not is_share(metric) or short(metric) not in HEADLINES:
            continue
        found = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), int | float)]
        step, best = max(found, key=lambda f: f[1])
        last = found[-1][1]
        after = f" (at step {step:,}; {100 * last:.1f} % at the end)" if last < best else ""
        out.append(f"{task}: {label(metric)} {100 * best:.1f} %{after}")
    return out if len(out) <= MOST_LINES else [*out[:MOST_LINES], f"… and {len(out) - MOST_LINES} more in the report"]
