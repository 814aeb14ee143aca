"""SIGKILL at seeded random moments of everything that writes; the same command again must give an unbroken run's bytes.

``python tests/faults/kill_matrix.py [--kills N] [--seed S] [KIND …]`` goes round the kinds of :data:`KINDS` until N
kills are done, and prints a table. Processes are forked from this one, which has imported everything: a start costs
milliseconds. Every rank is killed, as the launcher's death does it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import random
import signal
import socket
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart" / "quickstart.yaml"
SHARD = ROOT / "recipes" / "quickstart" / "data" / "train-000000.tar"
TIMEOUT_S = 240.0

SMALL = [
    "modalities.image.encoder.widths=[8,16,32]",
    "modalities.text.encoder.width=32",
    "modalities.text.encoder.layers=1",
    "modalities.text.encoder.heads=2",
    "modalities.text.input.tokenizer=clip-bpe:1024",
    "embed_dim=16",
    "batch.size=16",
    "budget.steps=8",
    "checkpoint.every_steps=2",
    "engine.threads=1",
    "engine.device=cpu",
    "tracking.log_every=1",
    "tracking.sample_ids=true",
    "schedule.warmup_samples=32",
    "out=run",
]
"""Of every training; the run's folder is ``run`` in the folder that the command is started in."""

MODULES = "modules.txt"
"""Where an unbroken run writes down what it imported on its way, for the parent to import before the next fork."""

TIMED = ("samples_per_s", "data_wait_share", "tflops_per_s", "mfu", "peak_memory")
"""Numbers of a metrics line that say how fast the machine was."""


@dataclass(frozen=True)
class Kind:
    """A command and what it leaves.

    Attributes:
        command: arguments of ``dualenc``; ``{inputs}`` stands for the folder made by :func:`make_inputs`.
        result: the folder a command was started in → name → bytes that must be the same.
        ranks: processes.
        at_save: kill while a save is being written, not at any moment.
        by_files: every second time, kill when some number of files has been written, not at any moment.
    """

    command: list[str]
    result: Callable[[Path], dict[str, bytes]]
    ranks: int = 1
    at_save: bool = False
    by_files: bool = False


# --- what a command leaves -----------------------------------------------------------------------------------------


def trained(folder: Path) -> dict[str, bytes]:
    """Every file of the kept saves, metrics without speeds, sample ids, and the names of all that is in the folder."""
    run = folder / "run"
    found = {str(p.relative_to(run)): p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    found |= {p.name: p.read_bytes() for p in run.glob("samples-rank*.jsonl")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [json.dumps({k: v for k, v in line.items() if k not in TIMED}) for line in lines]
    return found | {"metrics.jsonl": "\n".join(kept).encode(), "names": _names(run)}


def written(folder: Path) -> dict[str, bytes]:
    """Every file below ``out``."""
    out = folder / "out"
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def evaluated(folder: Path) -> dict[str, bytes]:
    """results.json without ``run`` (when, and on how many ranks), and the kept features."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    del results["run"]
    kept = {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "cache").rglob("*.safetensors")}
    return kept | {"results.json": json.dumps(results, ensure_ascii=False, indent=1).encode()}


def _names(folder: Path) -> bytes:
    return "\n".join(sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))).encode()


TRAIN = ["train", str(RECIPE), *SMALL, "data.sources=[{{name: few, shards: '{inputs}/few-*.tar'}}]"]
EVAL = ["eval.tasks=['{inputs}/pictures.yaml']", "eval.every_steps=4", "eval.at_start=true"]
PLAIN = ["eval.tasks=[]", "data.workers=0"]
SHARDED = [*PLAIN, "checkpoint.sharded=true"]
ZERO_2 = [*SHARDED, "engine.kind=deepspeed", "engine.zero_stage=2"]
FSDP2 = [*SHARDED, "engine.parallel=fsdp2"]

KINDS = {
    "train, 1 rank, with evaluation": Kind([*TRAIN, *EVAL], trained),
    "train, 1 rank, during a save": Kind([*TRAIN, *PLAIN], trained, at_save=True),
    "train, 2 ranks DDP": Kind([*TRAIN, *PLAIN], trained, 2),
    "train, 2 ranks FSDP2, sharded": Kind([*TRAIN, *FSDP2], trained, 2),
    "train, 2 ranks FSDP2, during a sharded save": Kind([*TRAIN, *FSDP2], trained, 2, at_save=True),
    "train, 2 ranks ZeRO 2, sharded": Kind([*TRAIN, *ZERO_2], trained, 2),
    "train, 2 ranks ZeRO 2, during a sharded save": Kind([*TRAIN, *ZERO_2], trained, 2, at_save=True),
    "shards build": Kind(
        ["shards", "build", "folder", "--out", "out", "path={inputs}/pictures", "shard_samples=16", "overwrite=true"],
        written,
        by_files=True,
    ),
    "embed, 1 rank": Kind(["embed", "{inputs}/model", "{inputs}/few-*.tar", "--out", "out"], written, by_files=True),
    "embed, 2 ranks": Kind(
        ["embed", "{inputs}/model", "{inputs}/few-*.tar", "--out", "out"], written, 2, by_files=True
    ),
    "eval --resume": Kind(
        [
            *("eval", "{inputs}/model", "--task", "{inputs}/pictures.yaml", "--task", "{inputs}/others.yaml"),
            *("--out", "results.json", "--cache", "cache", "--batch-size", "4", "--resume"),
        ],
        evaluated,
        by_files=True,
    ),
}


# --- inputs --------------------------------------------------------------------------------------------------------


def make_inputs(folder: Path) -> None:
    """Shards, a folder of pictures with captions, two tasks and a model, all small."""
    with tarfile.open(SHARD) as src:
        groups = itertools.groupby(src, key=lambda m: m.name.split(".")[0])
        samples = [[(m.name, _read(src, m)) for m in members] for _, members in itertools.islice(groups, 144)]
    for name, part in (("few-0", samples[:32]), ("few-1", samples[32:64]), ("few-2", samples[64:96])):
        _write_tar(folder / f"{name}.tar", part)
    _write_tar(folder / "pictures.tar", samples[96:128])
    _write_tar(folder / "others.tar", samples[112:144])
    for task in ("pictures", "others"):
        text = f"kind: retrieval\nidentical: merge\nsource: {{kind: shards, path: ./{task}.tar}}\n"
        (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
    (folder / "pictures").mkdir()
    for name, raw in itertools.chain.from_iterable(samples[:48]):
        if not name.endswith(".json"):
            (folder / "pictures" / name).write_bytes(raw)
        else:
            (folder / "pictures" / name).write_bytes(raw)
    made = run(Kind([*TRAIN, *PLAIN, "budget.steps=2"], trained), folder, folder / "made")
    if made != 0:
        raise SystemExit(f"the model could not be trained ({made}): {(folder / 'made' / 'said.txt').read_text()}")
    (folder / "made" / "run").rename(folder / "model")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file is not None else b""


def _write_tar(path: Path, samples: list[list[tuple[str, bytes]]]) -> None:
    import io

    with tarfile.open(path, "w") as tar:
        for name, raw in itertools.chain.from_iterable(samples):
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


# --- running and killing -------------------------------------------------------------------------------------------


def run(kind: Kind, inputs: Path, folder: Path, moment: Callable[[Path], bool] | None = None) -> int | None:
    """Run a command to its end in ``folder``: its exit code. With ``moment``, kill it once that is true; None then."""
    folder.mkdir(exist_ok=True)
    command = [a.format(inputs=inputs) for a in kind.command]
    ranks = _start(command, folder, kind.ranks)
    ended: dict[int, int] = {}
    deadline = time.monotonic() + TIMEOUT_S
    killed = False
    while len(ended) < len(ranks):
        for pid in set(ranks) - set(ended):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[pid] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() > deadline
        if not killed and ((moment is not None and not ended and moment(folder)) or late or any(ended.values())):
            killed = not ended
            for pid in set(ranks) - set(ended):
                os.kill(pid, signal.SIGKILL)
            if late:
                raise SystemExit(f"{command}: no end in {TIMEOUT_S:.0f} s: {_tail(folder)}")
        time.sleep(0.002)
    return None if killed else next((c for c in ended.values() if c), 0)


def _start(command: list[str], folder: Path, world_size: int) -> list[int]:
    """Fork the ranks, as ``dualenc launch`` would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [_fork(command, folder, rank, world_size, port) for rank in range(world_size)]


def _fork(command: list[str], folder: Path, rank: int, world_size: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        said = os.open("said.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ["OMP_NUM_THREADS"] = "1"
        if world_size > 1:
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            os.environ.update({k: str(v) for k, v in where.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        from dualenc.cli import main

        sys.argv = ["dualenc", *command]
        main()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:  # noqa: BLE001 – the child must not go on as a copy of this process
        traceback.print_exc()
    finally:
        if "whole-" in folder.name and rank == 0:
            Path(MODULES).write_text("\n".join(sys.modules), encoding="utf-8")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tail(folder: Path) -> str:
    return (folder / "said.txt").read_text(encoding="utf-8", errors="replace")[-2000:]


# --- the matrix ----------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """One kind's row of the table.

    Attributes:
        late: commands that had ended before the kill came; they count as none.
        seconds: of an unbroken run.
        files: how many it leaves.
        where: what the kill found: number of saves (trainings) or files.
    """

    whole: dict[str, bytes]
    seconds: float
    files: int
    kills: int = 0
    late: int = 0
    differences: list[str] = field(default_factory=list)
    where: Counter[str] = field(default_factory=Counter)


def unbroken(name: str, inputs: Path, folder: Path) -> Cell:
    """The run to compare with; a second one must be the same, or there is nothing to compare."""
    kind, results, seconds = KINDS[name], [], 0.0
    for k in range(2):
        began = time.monotonic()
        code = run(kind, inputs, folder / f"whole-{k}")
        seconds = time.monotonic() - began
        if code != 0:
            raise SystemExit(f"{name}: the unbroken run ended with {code}: {_tail(folder / f'whole-{k}')}")
        results.append(kind.result(folder / f"whole-{k}"))
        import_all(folder / f"whole-{k}" / MODULES)
    if differing(*results):
        raise SystemExit(f"{name}: two unbroken runs differ in {differing(*results)}")
    return Cell(results[0], seconds, _files(folder / "whole-0"))


def import_all(listed: Path) -> None:
    """Import what a process had imported at its end, as far as modules can be imported by their name."""
    for name in listed.read_text(encoding="utf-8").split():
        if name.split(".")[0] in ("torch", "PIL", "deepspeed", "networkx", "triton", "dualenc", "dualenc_evals"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    if threading.active_count() > 1:
        raise SystemExit(f"importing started threads, which a fork loses: {threading.enumerate()}")


def differing(a: dict[str, bytes], b: dict[str, bytes]) -> list[str]:
    """Names that one of the two lacks, or whose bytes differ."""
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def kill_once(name: str, cell: Cell, inputs: Path, folder: Path, rng: random.Random) -> None:
    """Kill at a random moment, run the same command to its end, compare."""
    kind = KINDS[name]
    if kind.at_save:
        moment = at_a_save(rng)
    elif kind.result is trained and rng.random() < 0.5:
        moment = at_lines(rng.randint(0, cell.whole["metrics.jsonl"].count(b"\n") + 1), rng.uniform(0, 0.05))
    elif kind.by_files and rng.random() < 0.5:
        moment = at_files(rng.randint(1, cell.files), rng.uniform(0, 0.02))
    else:
        moment = after(rng.uniform(0, cell.seconds))
    began = time.monotonic()
    code = run(kind, inputs, folder, moment)
    if code == 0:
        cell.late += 1
        cell.seconds = min(cell.seconds, time.monotonic() - began)  # the machine is less busy than it was
        return
    if code is not None:
        cell.kills += 1
        cell.differences.append(f"{folder.name}: ended with {code} before the kill: {_tail(folder)}")
        return
    cell.kills += 1
    cell.where[_state(folder)] += 1
    code = run(kind, inputs, folder)
    if code != 0:
        cell.differences.append(f"{folder.name}: after the kill it ended with {code}: {_tail(folder)}")
        return
    wrong = differing(cell.whole, kind.result(folder))
    if wrong:
        cell.differences.append(f"{folder.name}: differs in {', '.join(wrong)}")


def _state(folder: Path) -> str:
    """Where a kill came, for the table: saves finished and begun, or files there."""
    saves = folder / "run" / "checkpoints"
    if (folder / "run").is_dir():
        names = [p.name for p in saves.iterdir()] if saves.is_dir() else []
        step = max((int(n[5:]) for n in names if n.startswith("step-")), default=0)
        return f"save {step}" + (" +" if any(n.startswith(".writing") for n in names) else "")
    return f"{_files(folder)} files"


def _files(folder: Path) -> int:
    return sum(p.is_file() and p.name not in ("said.txt", MODULES) for p in folder.rglob("*"))


def after(seconds: float) -> Callable[[Path], bool]:
    """True once so many seconds have passed."""
    until = time.monotonic() + seconds
    return lambda _: time.monotonic() >= until


def at_files(count: int, wait: float) -> Callable[[Path], bool]:
    """True so many seconds after there are so many files."""
    return _later(lambda folder: _files(folder) >= count, wait)


def at_lines(count: int, wait: float) -> Callable[[Path], bool]:
    """True so many seconds after metrics.jsonl has so many lines."""

    def there(folder: Path) -> bool:
        metrics = folder / "run" / "metrics.jsonl"
        return metrics.is_file() and metrics.read_bytes().count(b"\n") >= count

    return _later(there, wait)


def _later(reached: Callable[[Path], bool], wait: float) -> Callable[[Path], bool]:
    seen = [0.0]

    def moment(folder: Path) -> bool:
        if not seen[0] and reached(folder):
            seen[0] = time.monotonic()
        return bool(seen[0]) and time.monotonic() >= seen[0] + wait

    return moment


def at_a_save(rng: random.Random) -> Callable[[Path], bool]:
    """True at a random moment of up to 40 ms after one of the saves was begun."""
    name = f".writing-step-{rng.choice((2, 4, 6, 8)):010d}"

    def there(folder: Path) -> bool:
        saves = folder / "run" / "checkpoints"
        return saves.is_dir() and any(p.name.startswith(name) for p in saves.iterdir())

    return _later(there, rng.uniform(0, 0.04))


USED = ("accelerate", "deepspeed", "dualenc.api.runs", "dualenc.cli", "dualenc.engine.accelerate_engine")
USED += ("dualenc.engine.deepspeed_engine", "dualenc.features.of_shards", "dualenc.train.loop")
USED += ("dualenc_data_tools.build", "dualenc_evals.harness")


def import_everything() -> None:
    """What the forked processes use, so that none of them imports it."""
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    import torch

    for name in USED:
        importlib.import_module(name)
    torch.set_num_threads(1)


def matrix(names: list[str], kills: int, seed: int, folder: Path, report: Callable[[str], None]) -> dict[str, Cell]:
    """Go round the kinds until there are ``kills`` in all."""
    import_everything()
    inputs = folder / "inputs"
    inputs.mkdir()
    make_inputs(inputs)
    cells: dict[str, Cell] = {}
    for number, name in _round(names):
        if sum(c.kills for c in cells.values()) >= kills:
            return cells
        place = folder / f"{list(KINDS).index(name):02d}"
        if name not in cells:
            place.mkdir()
            cells[name] = unbroken(name, inputs, place)
        cell, before = cells[name], len(cells[name].differences)
        kill_once(name, cell, inputs, place / f"killed-{number}", random.Random(f"{seed} {name} {number}"))
        for line in cell.differences[before:]:
            report(f"DIFFERENT: {name} {line}")
        if number % 5 == 4 and name == names[-1]:
            report(table(cells))
    return cells


def _round(names: list[str]) -> Iterator[tuple[int, str]]:
    return ((number, name) for number in itertools.count() for name in names)


def table(cells: dict[str, Cell]) -> str:
    """Kills, commands that ended first, differences, and where the kills came."""
    rows = [f"{'':46}{'kills':>6}{'late':>6}{'differ':>8}  where they came"]
    for name, c in cells.items():
        where = ", ".join(f"{k}: {v}" for k, v in sorted(c.where.items()))
        rows.append(f"{name:46}{c.kills:6}{c.late:6}{len(c.differences):8}  {where}")
    kills, wrong = (sum(x) for x in zip(*((c.kills, len(c.differences)) for c in cells.values()), strict=True))
    return "\n".join([*rows, f"{kills} kills, {wrong} differences"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=220)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("kinds", nargs="*", help=f"of: {'; '.join(KINDS)}")
    asked = parser.parse_args()
    for path in (".", "evals", "data_tools"):
        sys.path.insert(0, str(ROOT / path))
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kill-matrix-"))
    cells = matrix(asked.kinds or list(KINDS), asked.kills, asked.seed, folder, lambda t: print(t, flush=True))
    print(f"{table(cells)}\n{time.monotonic() - began:.0f} s; everything is in {folder}")
    raise SystemExit(any(c.differences for c in cells.values()))


if __name__ == "__main__":
    main()
