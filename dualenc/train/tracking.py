"""Where a run's numbers go: metrics.jsonl always, TensorBoard and W&B when asked, a progress bar on a terminal."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dualenc.config import Recipe, Tracking
from dualenc.errors import ConfigError
from dualenc.files import write_atomically
from dualenc.terminal import PatientConsole
from dualenc.versions import versions

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "accelerate", "deepspeed", "webdataset")


class Sink(Protocol):
    """Anything that takes numbers at a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line. A resumed run drops the lines after its checkpoint, so no step appears twice."""

    def __init__(self, path: Path, start_step: int) -> None:
        keep_until(path, start_step or -1)  # what a run that begins anew measured before its first step goes too
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step`` from a JSON lines file, and a last line cut short by a kill."""
    write_atomically(path, "".join(line + "\n" for line in _lines(path) if _step_of(line) <= step))


def keep_rank_files_until(run_dir: Path, step: int, rank: int, world_size: int) -> None:
    """Drop what a resumed run will repeat from the files of every rank, including ranks it no longer has.

    Each file is rewritten by one rank only, the one that may have it open: rank r takes those of ranks r, r + W, …
    """
    for path in run_dir.glob("*-rank*.jsonl"):
        number = path.stem.rpartition("-rank")[2]
        if number.isdigit() and int(number) % world_size == rank:
            keep_until(path, step)


def metrics_at(path: Path, step: int) -> dict[str, Any]:
    """All that metrics.jsonl says of a step."""
    found: dict[str, Any] = {}
    for line in _lines(path):
        if _step_of(line) == step:
            found |= json.loads(line)
    return found


def _lines(path: Path) -> list[str]:
    """Whole lines of a file that a kill may have cut in the middle of the last one."""
    if not path.exists():
        return []
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]


def _step_of(line: str) -> float:
    """The step a line is about; infinite for a damaged line."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return math.inf
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else math.inf


class TensorBoardSink:
    """Scalars for ``tensorboard --logdir runs``."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ConfigError("tracking.tensorboard needs an extra: pip install 'dualenc[tracking]'") from e
        self._writer = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


class WandbSink:
    """Weights & Biases. The run id is kept in the run folder, so a resumed run continues the same curve."""

    def __init__(self, run_dir: Path, recipe: Recipe) -> None:
        try:
            import wandb
        except ImportError as e:
            raise ConfigError("tracking.wandb needs an extra: pip install 'dualenc[tracking]'") from e
        id_file = run_dir / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else wandb.util.generate_id()
        id_file.write_text(run_id)
        self._run = wandb.init(
            project=recipe.tracking.wandb_project,
            name=recipe.name,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            config=recipe.model_dump(mode="json"),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Tracker:
    """Sends rank 0's numbers to the sinks and draws the progress line; on other ranks it does nothing."""

    def __init__(self, run_dir: Path, recipe: Recipe, start_step: int, total_steps: int, is_main: bool) -> None:
        self.is_main = is_main
        self.sinks: list[Sink] = []
        self._progress: Progress | None = None
        self.console = PatientConsole(stderr=True, quiet=not is_main)
        if not is_main:
            return
        self.sinks = sinks_of(run_dir, recipe.tracking, recipe, start_step)
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[info]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task(recipe.name, total=total_steps, completed=start_step, info="")
            self._progress.start()
        self._total = total_steps
        self._began = time.monotonic()
        self._start_step = start_step

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line of numbers everywhere."""
        for sink in self.sinks:
            sink.write(step, values)
        if not self.is_main:
            return
        info = step_line(values)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, info=info)
        elif "loss" in values:
            left = (time.monotonic() - self._began) / max(step - self._start_step, 1) * (self._total - step)
            line = f"step {step}/{self._total}  {info}  {_clock(left)} left"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the bar between log lines."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """Print one line on the terminal."""
        if self.is_main:
            # In a file or pipe a line stays one line, however long.
            self.console.print(text, highlight=False, soft_wrap=not self.console.is_terminal)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        for sink in self.sinks:
            sink.close()


def sinks_of(run_dir: Path, tracking: Tracking, recipe: Recipe, start_step: int) -> list[Sink]:
    """The sinks a recipe asks for; metrics.jsonl first and always."""
    sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl", start_step)]
    if tracking.tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard"))
    if tracking.wandb:
        sinks.append(WandbSink(run_dir, recipe))
    return sinks


def step_line(values: Mapping[str, float]) -> str:
    """The main numbers of a log line."""
    parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    if "samples_per_s" in values:
        parts.append(f"{values['samples_per_s']:.0f} samples/s")
    if "data_wait_share" in values:
        parts.append(f"data wait {100 * values['data_wait_share']:.0f} %")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"


def git_hash() -> str | None:
    """Commit of the running code, with ``+changes`` if the tree is not clean; None outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package has no checkout; the version still says what ran
    return commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def environment(world_size: int) -> dict[str, Any]:
    """What is needed to reproduce the run: versions, hardware, command."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "world_size": world_size,
        "threads_per_process": torch.get_num_threads(),
        "packages": versions(PACKAGES, "not installed"),
        "git": git_hash(),
        "command": " ".join(["dualenc", *sys.argv[1:]]),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
