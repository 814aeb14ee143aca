"""Train what a comparison names, one run after the other, seed by seed; a call after an interruption goes on.

``comparison.json`` beside the runs keeps what each one gave, under the digest of its recipe and overrides: a finished
run is not trained again, one that was killed resumes from its newest checkpoint, and one that failed is tried again.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from dualenc.compare.study import Comparison, run_folder
from dualenc.config import load_recipe
from dualenc.config.reading import read_yaml
from dualenc.errors import ConfigError
from dualenc.files import write_atomically
from dualenc.model import load_model
from dualenc.model.start_from import completed
from dualenc.shipped import find_recipe
from dualenc.train.check import check_recipe
from dualenc_evals.catalog import load_task
from dualenc_evals.harness import evaluate
from dualenc_evals.pages.run import json_lines

LEDGER = "comparison.json"
SAME_COMPUTE = 0.02
"""Methods whose step costs within this share of the control's are not trained again for equal compute."""
EQUAL = "equal-compute"


@dataclass
class Study:
    """A comparison and what its runs gave.

    Attributes:
        runs: method → seed → ``{"digest", "state", "cpu_seconds", "steps", "samples", "first", "last", "metrics"}``,
            or ``{"digest", "state": "failed", "error"}``; ``metrics`` is task/metric → value at the end.
        equal: the same for runs of as many steps as cost what the control's do; only where steps cost differently.
        flops: method → floating-point operations of one training step, where they were counted.
        chance: task/metric → chance level.
    """

    comparison: Comparison
    folder: Path
    runs: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    equal: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """``method, seed N: reason`` of the runs that did not finish."""
        return [
            f"{name}{where}, seed {seed}: {run['error']}"
            for where, table in (("", self.runs), (f" ({EQUAL})", self.equal))
            for name, by in table.items()
            for seed, run in by.items()
            if run["state"] == "failed"
        ]

    def values(self, metric: str, equal: bool = False) -> dict[str, list[float]]:
        """Method → the metric by seed, of the methods that have it for every seed."""
        out = {}
        for name in self.comparison.methods:
            by = (self.equal.get(name) if equal else None) or self.runs.get(name, {})
            found = [by.get(s, {}).get("metrics", {}).get(metric) for s in self.comparison.seeds]
            if all(v is not None for v in found):
                out[name] = [float(v) for v in found]
        return out

    def save(self) -> None:
        """Write the ledger."""
        tables = {"runs": self.runs, "equal": self.equal, "flops": self.flops, "chance": self.chance}
        kept = {"name": self.comparison.name, **tables}
        write_atomically(self.folder / LEDGER, json.dumps(kept, indent=1))


def run_study(
    comparison: Comparison, folder: Path, equal_compute: bool = False, say: Callable[[str], object] = print
) -> Study:
    """Train every method with every seed below ``folder``; failed runs are in the result, with their reasons.

    Args:
        equal_compute: train methods whose step costs more or less than the control's a second time, for as many
            steps as cost what the control's run does, in floating-point operations counted on one real step.

    Raises:
        ConfigError: a recipe or override that is wrong, before anything is trained; or a folder that holds runs of
            something else.
    """
    folder = folder.resolve()
    digests = {name: _check(comparison, name, folder) for name in comparison.methods}
    study = _read(comparison, folder)
    todo = [(seed, name) for seed in comparison.seeds for name in comparison.methods]
    for n, (seed, name) in enumerate(todo, 1):
        _train(study, study.runs, name, seed, digests[name], folder, [], f"{n} of {len(todo)}", say)
    if equal_compute:
        _equal(study, digests, say)
    first = study.runs[comparison.control][comparison.seeds[0]]
    if not study.chance and first["state"] == "done":
        study.chance |= _chance(comparison, folder)
        study.save()
    return study


def _chance(comparison: Comparison, folder: Path) -> dict[str, float]:
    """What chance gives on the tasks, which an evaluation of any model says."""
    command = comparison.command(comparison.control, comparison.seeds[0], folder)
    tasks = [load_task(str(t)) for t in load_recipe(command[0], command[1:], completed).eval.tasks]
    if not tasks:
        return {}
    model = load_model(str(run_folder(folder, comparison.control, comparison.seeds[0])))
    found = evaluate(model.embedder(), tasks, progress=False, details=False)["tasks"]
    return {f"{name}/{k}": float(v) for name, task in found.items() for k, v in task["chance"].items()}


def _equal(study: Study, digests: Mapping[str, str], say: Callable[[str], object]) -> None:
    """The runs of equal compute."""
    comparison, folder = study.comparison, study.folder
    control, first = comparison.control, comparison.seeds[0]
    steps = study.runs[control][first].get("steps")
    for name in comparison.methods:
        if name not in study.flops and study.runs[name][first]["state"] == "done":
            study.flops[name] = count_flops(comparison.command(name, first, folder))
            study.save()
    if steps is None or control not in study.flops:
        say(f"equal compute: {control} did not finish")
        return
    changed = {
        name: max(round(steps * study.flops[control] / f), 1)
        for name, f in study.flops.items()
        if abs(f / study.flops[control] - 1) > SAME_COMPUTE
    }
    todo = [(seed, name) for seed in comparison.seeds for name in changed]
    for n, (seed, name) in enumerate(todo, 1):
        where = folder / EQUAL
        extra = [f"budget.steps={changed[name]}", f"out={run_folder(where, name, seed)}"]
        progress = f"{EQUAL} {n} of {len(todo)}, {changed[name]} steps"
        _train(study, study.equal, name, seed, f"{digests[name]}-{changed[name]}", where, extra, progress, say)


def count_flops(command: list[str]) -> float:
    """Floating-point operations of one training step of a run, forward and backward, as torch's counter finds them:
    those of matrix products, convolutions and attention, with a multiplication and an addition as two."""
    from dualenc.train.probe import probe

    return float(probe(load_recipe(command[0], command[1:], completed)).flops)


def _check(comparison: Comparison, name: str, folder: Path) -> str:
    """The digest of what a method's runs do; a recipe that stands by itself is checked."""
    method = comparison.methods[name]
    command = comparison.command(name, comparison.seeds[0], folder)
    if not method.needs(list(comparison.methods)):
        try:
            recipe = load_recipe(command[0], command[1:], completed)
            check_recipe(recipe)
            for task in recipe.eval.tasks:
                load_task(str(task))
        except ConfigError as e:
            raise ConfigError(f"method {name}: {e}") from e
    raw, _ = read_yaml(find_recipe(command[0]))
    said = [raw, [c for c in command[1:] if not c.startswith(("out=", "seed="))], comparison.ranks]
    said = json.loads(json.dumps(said, default=str).replace(str(folder), "."))
    needed = [_check(comparison, n, folder) for n in method.needs(list(comparison.methods))]
    return hashlib.sha256(json.dumps([said, needed], sort_keys=True).encode()).hexdigest()[:16]


def _read(comparison: Comparison, folder: Path) -> Study:
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(comparison, folder)
    if (folder / LEDGER).is_file():
        kept = json.loads((folder / LEDGER).read_text(encoding="utf-8"))
        if kept["name"] != comparison.name:
            raise ConfigError(
                f"{folder} holds the comparison {kept['name']}, not {comparison.name}; choose another --out"
            )
        for table, by_method in ((study.runs, kept["runs"]), (study.equal, kept["equal"])):
            table |= {n: {int(s): r for s, r in by.items()} for n, by in by_method.items()}
        study.flops |= kept["flops"]
        study.chance |= kept["chance"]
    return study


def _train(
    study: Study, table: dict[str, dict[int, dict[str, Any]]], name: str, seed: int, digest: str, where: Path,
    extra: list[str], progress: str, say: Callable[[str], object],
) -> None:  # fmt: skip
    """Train one run unless the ledger has it, and note what it gave."""
    before = table.get(name, {}).get(seed)
    run = run_folder(where, name, seed)
    if before is not None and before["state"] == "done":
        if before["digest"] == digest:
            return
        if run.exists():
            raise ConfigError(
                f"{run} was trained with another recipe or other overrides of {name}; delete it to train {name} again, "
                "or choose another --out"
            )
    say(f"{name}, seed {seed} ({progress})")
    arguments = study.comparison.command(name, seed, study.folder) + extra
    launch = ["launch", "--nproc", str(study.comparison.ranks)] if study.comparison.ranks > 1 else []
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.with_suffix(".log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "dualenc", *launch, "train", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": "200"},
        )
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()  # it writes a checkpoint, from which the next call resumes
            process.wait()
            raise
    code = process.returncode = os.waitstatus_to_exitcode(status)
    kept: dict[str, Any] = {"digest": digest}
    if code:
        lines = [x.strip() for x in log.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()]
        error = lines[-1].removeprefix("error: ") if lines else ""
        kept |= {"state": "failed", "error": f"{error or 'no message'} (exit code {code}; {log})"}
    else:
        cpu = used.ru_utime + used.ru_stime
        kept |= {"state": "done", "cpu_seconds": round(cpu, 1), **measured(run)}
    table.setdefault(name, {})[seed] = kept
    study.save()


def measured(run: Path) -> dict[str, Any]:
    """What the metrics of a run say: its length, first and last loss, and every task's numbers at the end."""
    rows = json_lines(run / "metrics.jsonl")
    curve = [r for r in rows if "loss" in r]
    found = {k.removeprefix("eval/"): float(v) for r in rows for k, v in r.items() if k.startswith("eval/")}
    return {
        "steps": max((int(r["step"]) for r in curve), default=0),
        "samples": max((int(r["samples_seen"]) for r in curve if "samples_seen" in r), default=0),
        "first": float(curve[0]["loss"]) if curve else None,
        "last": float(curve[-1]["loss"]) if curve else None,
        "finite": all(isfinite(r["loss"]) for r in curve),
        "metrics": found,
    }
