"""What the tests of plugins start: the package by itself or installed, data for it, recipes, and jobs for ranks."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _shared import PYTHONPATH
from torch import Tensor

from dualenc.config import load_recipe
from dualenc.distributed.world import World, barrier
from dualenc.train.loop import Run, run_folder

PACKAGE = Path(__file__).parent / "plugin_pkg"

NAMES = {
    "modality": ("gauge", "dualenc_series.series:SeriesInput"),
    "encoder": ("gauge_cnn", "dualenc_series.series:SeriesCNN"),
    "loss": ("hinge", "dualenc_series.hinge:Hinge"),
    "term": ("same_cosines", "dualenc_series.same_cosines:SameCosines"),
    "plan": ("as_it_lies", "dualenc_series.as_it_lies:AsItLies"),
    "source": ("series_csv", "dualenc_series.series_csv:SERIES_CSV"),
    "task": ("two_choices", "dualenc_series.two_choices:TwoChoices"),
}
"""Part → its name, and the same as ``pkg.mod:Name``."""


def install(folder: Path) -> Path:
    """The package installed into a folder as pip does it, with its entry points."""
    source = folder / "source"
    shutil.copytree(PACKAGE, source)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--no-index", "--target", str(folder / "site"), str(source)], check=True)
    return folder / "site"


def lay(folder: Path) -> Path:
    """The package's code alone, which nobody installed."""
    shutil.copytree(PACKAGE / "dualenc_series", folder / "dualenc_series")
    return folder


def environment(*paths: Path, **more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("DUALENC_PLUGINS", "DUALENC_CACHE")}
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {**env, **fixed, "PYTHONPATH": os.pathsep.join([*map(str, paths), PYTHONPATH]), **more}


def write_series(folder: Path, count: int = 48) -> Path:
    """Vibrations of three axes as .csv: one axis swings, and the caption says which and how fast."""
    folder.mkdir()
    noise = torch.Generator().manual_seed(0)
    for i in range(count):
        axis, rate = i % 3, 1 + i // 3 % 8
        x = 0.1 * torch.randn(96, 3, generator=noise)
        x[:, axis] += torch.sin(2 * math.pi * rate * torch.arange(96) / 96 + i)
        lines = [",".join(f"{v:.4f}" for v in row) for row in x.tolist()]
        text = "\n".join([f"# a swing of {rate} Hz along {'xyz'[axis]}, number {i}", *lines])
        (folder / f"{i:03d}.csv").write_text(text + "\n", encoding="utf-8")
    return folder


def recipe(folder: Path, shards: str, form: str) -> Path:
    """A recipe of series and text, its parts named as ``form`` says: entry, plugins or reference."""
    at = 1 if form == "reference" else 0
    plugins = "plugins: [dualenc_series.register]\n" if form == "plugins" else ""
    path = folder / f"{form}.yaml"
    path.write_text(
        f"""name: {form}
{plugins}seed: 3
modalities:
  series: {{kind: "{NAMES["modality"][at]}", encoder: {{name: "{NAMES["encoder"][at]}", width: 8}}}}
  text:
    input: {{tokenizer: "clip-bpe:8192", context_length: 16}}
    encoder: {{name: own/transformer, width: 16, layers: 1, heads: 2}}
embed_dim: 16
loss: {{name: "{NAMES["loss"][at]}", margin: 0.3}}
data:
  sources: [{{name: swings, shards: "{shards}"}}]
  sampling: {{name: "{NAMES["plan"][at]}", start: 5}}
  workers: 1
batch: {{size: 16}}
budget: {{steps: 6}}
optim: {{lr: 1e-3}}
schedule: {{name: constant, warmup_samples: 0}}
checkpoint: {{every_steps: 3}}
engine: {{threads: 1}}
tracking: {{log_every: 1, sample_ids: true}}
""",
        encoding="utf-8",
    )
    return path


def task(folder: Path, shards: str, form: str) -> Path:
    """A task on the shards, or on the very files they were packed from."""
    path = folder / f"task_{form}.yaml"
    plugins = "plugins: [dualenc_series.register]\n" if form == "plugins" else ""
    sources = {
        "entry": f'kind: {NAMES["source"][0]}, path: "{folder / "csv"}"',
        "plugins": f'kind: shards, path: "{shards}", members: {{series: [series.npy]}}',
        "reference": f'kind: "{NAMES["source"][1]}", path: "{folder / "csv"}"',
    }
    path.write_text(
        f"""kind: "{NAMES["task"][1 if form == "reference" else 0]}"
{plugins}step: 2
modalities: [series, text]
source: {{{sources[form]}}}
""",
        encoding="utf-8",
    )
    return path


def trained(world: World, path: str, recipe: str, parts: list[list[str]]) -> list[dict[str, Tensor]]:
    """The parameters after each of several runs in this process group; whole on rank 0. ``path``: of the package."""
    sys.path.insert(0, path)
    out = []
    for overrides in parts:
        loaded = load_recipe(recipe, overrides)
        folder = run_folder(loaded)
        if world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        barrier(world)
        run = Run(loaded, folder, world, None)
        run.train()
        run.close()
        out.append(run.parts.engine.model_state())
    return out


def difference(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative difference of any parameter, and its name."""
    assert set(got) == set(want)
    return max((float((got[k] - v).abs().max() / v.abs().max().clamp(min=1e-12)), k) for k, v in want.items())


def first_batches(world: Any = None) -> None:
    """Batches that spawned and forked workers make, printed as digests. Run by ``python -c``."""
    import hashlib

    from dualenc.data.loader import Loader
    from dualenc.model import build_bundle

    loaded = load_recipe(sys.argv[1])
    bundle = build_bundle(loaded)
    for method in ("fork", "spawn"):
        loader = Loader(loaded.data, bundle.inputs, loaded.pairs, seed=3, batch_size=8, start_method=method)
        loader.stop_step = 2
        rows = [hashlib.sha256(b.inputs["series"].numpy().tobytes()).hexdigest()[:16] + b.keys[0] for b in loader]
        print(method, *rows, flush=True)


# --- many commands, one import of torch ----------------------------------------------------------------------------


class Server:
    """A process that has imported torch and dualenc, but no plugin, and forks for each command: as if started anew."""

    def __init__(self, folder: Path, *paths: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from _plugin_jobs import serve\nserve()"],
            env=environment(*paths),
            cwd=folder,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, arguments: list[str], env: dict[str, str], path: str = "") -> tuple[int, str]:
        """Exit code and output of one command."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([arguments, env, path]) + "\n")
        self.process.stdin.flush()
        code, said = json.loads(self.process.stdout.readline())
        return code, said

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    import dualenc.cli
    import dualenc.encoders
    import dualenc.train.loop  # noqa: F401

    for line in sys.stdin:
        arguments, env, path = json.loads(line)
        with tempfile.TemporaryFile("w+") as out:
            pid = os.fork()
            if pid == 0:
                os.environ.update(env)
                sys.path[:0] = [path] if path else []
                _run(arguments, out.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            out.seek(0)
            print(json.dumps([code, out.read()]), flush=True)


def _run(arguments: list[str], out: int) -> None:
    """In the fork: what ``python -m dualenc`` does, then the end of the process."""
    from dualenc.cli import main

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["dualenc", *arguments]
    code: Any = 1
    try:
        main()
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:  # noqa: BLE001 – printed, and the exit code says it
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
