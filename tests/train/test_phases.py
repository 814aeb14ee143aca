"""Phases: what they change and keep; killed anywhere and resumed, the same ids and parameters; on several ranks too."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from _runs import RECIPE, environment, losses, newest, order, rows
from _spawn import spawn

from dualenc.checkpoint import save as ckpt
from dualenc.config import dump_yaml, load_recipe, phase_recipes
from dualenc.distributed.world import World, barrier
from dualenc.encoders.released.migrations import resize_grid
from dualenc.errors import ConfigError
from dualenc.model import build_bundle
from dualenc.train.loop import train
from dualenc.train.phases import check_models, timeline
from dualenc_evals.pages.run import write_report

BASE = [
    "modalities.image.input.size=32",
    "modalities.image.encoder={name: own/vit, patch: 8, width: 32, layers: 2, heads: 2}",
    "modalities.text.encoder={name: own/transformer, width: 32, layers: 2, heads: 2}",
    "embed_dim=32",
    "batch={size: 16}",
    "budget.steps=9",
    "eval.tasks=[]",
    "engine.threads=1",
    "data.workers=0",
    "checkpoint={every_steps: null, every_minutes: null, keep: 9}",
    "tracking={log_every: 1, sample_ids: true}",
    "schedule={name: cosine, warmup_samples: 32}",
]
LIT = "modalities.image.lock=true"
PHASES = (
    "phases=[{at: 48 samples, modalities.image.lock: false, modalities: {image: {input: {size: 48}}}, "
    "modalities.text.input.context_length: 40, schedule: {name: constant, warmup_samples: 32}, "
    "data.batches: by_source}, "
    "{at: 6 steps, loss: [info_nce, {name: layers, weight: 0.1}]}]"
)


def recipe_of(*more: str) -> Any:
    return load_recipe(RECIPE, [*BASE, *more])


# --- recipes -------------------------------------------------------------------------------------------------------


def test_each_phase_is_a_recipe_built_on_the_one_before() -> None:
    recipe = recipe_of(LIT, PHASES)
    base, unlocked, last = phase_recipes(recipe)
    assert (base.modalities["image"].lock, base.modalities["image"].input["size"]) == (True, 32)
    assert (unlocked.modalities["image"].lock, unlocked.modalities["image"].input["size"]) == (False, 48)
    assert unlocked.modalities["text"].encoder == base.modalities["text"].encoder
    assert (base.data.batches, unlocked.data.batches.name, last.data.batches.name) == (None, "by_source", "by_source")
    assert (unlocked.loss.name, last.loss.name, last.modalities["image"].lock) == ("info_nce", "sum", False)
    assert "phases" not in dump_yaml(base)
    assert "batches" not in dump_yaml(base)
    assert phase_recipes(load_recipe_of(dump_yaml(recipe))) == phase_recipes(recipe)
    spans = timeline(recipe)
    assert [(s.start, s.stop, s.data_from, s.data_phase, s.schedule) for s in spans] == [
        (0, 3, 0, 0, (0, 3)), (3, 6, 3, 1, (3, 9)), (6, 9, 3, 1, (3, 9))
    ]  # fmt: skip
    assert [s.data_seed == recipe.seed for s in spans] == [True, False, False]
    (whole, trained), (larger, all_of_it), _ = check_models(recipe)
    assert trained < whole < larger == all_of_it


SIZES = "phases=[{at: 48 samples, batch.size: 32}, {at: 160 samples, batch: {size: 8, micro: 4}, optim.lr: 5e-4}]"


@pytest.mark.parametrize(
    ("budget", "phases", "steps", "samples"),
    [
        ("budget={samples: 200}", SIZES, [0, 3, 6, 13], [0, 48, 144, 200]),
        ("budget.steps=9", SIZES, [0, 3, 6, 9], [0, 48, 144, 168]),
        ("budget={samples: 200}", "phases=[{at: 50 %, batch.size: 32}]", [0, 6, 9], [0, 96, 192]),
        ("budget.steps=8", "phases=[{at: 50 %, batch.size: 32}, {at: 6 steps}]", [0, 4, 6, 8], [0, 64, 128, 192]),
    ],
)
def test_batches_of_other_sizes_are_counted_in_samples(
    budget: str, phases: str, steps: list[int], samples: list[int]
) -> None:
    spans = timeline(recipe_of(budget, phases))
    assert [s.start for s in spans] + [spans[-1].stop] == steps
    assert [s.samples for s in spans] + [spans[-1].total_samples] == samples
    for s in spans:  # the data are left alone, so their order goes on where it was, and so does the schedule
        assert (s.data_phase, s.data_offset + (s.start - s.data_from) * s.recipe.batch.size) == (0, s.samples)
        assert s.rates == (0, samples[-1])
    again = timeline(recipe_of(budget, "data.batches=by_source", phases))
    assert [(s.data_phase, s.data_offset) for s in again][:2] == [(0, 0), (1, 0)], "batches are composed anew"


def load_recipe_of(text: str) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "r.yaml").write_text(text)
        return load_recipe(Path(folder) / "r.yaml")


@pytest.mark.parametrize(
    ("at", "step"),
    [("'48 samples'", 3), ("50", 3), ("'1_60 samples'", 10), ("2 steps", 2), ("50 %", 6), ("1 epochs", 244)],
)
def test_where_a_phase_begins(at: str, step: int) -> None:
    budget = "budget.steps=300" if step > 12 else "budget.steps=12"
    assert [s.start for s in timeline(recipe_of(budget, f"phases=[{{at: {at}}}]"))] == [0, step]


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ("[{at: 5 stpes}]", "phases.0.at: write where the phase begins as '1_000_000 samples'"),
        ("[{at: 3 steps, seed: 1}]", "phases.0: a phase cannot change seed"),
        ("[{at: 3 steps, los: siglip}]", "a phase cannot change los. Did you mean 'loss'"),
        ("[{at: 3 steps, batch: {size: 7, micro: 8}}]", "batch.micro"),
        (
            "[{at: 3 steps, batch: {size: 32}}], 'optim.trajectory={mean: 0.5, std: 0.1}'",
            "phases.0.batch.size: 32 differs from the 16",
        ),
        ("[{at: 3 steps, optim.name: sgd}]", "phases.0.optim.name: 'sgd' differs from the 'adamw'"),
        ("[{at: 3 steps, optim.lr: -1}]", r"optim.lr: .*got -1 \(in phases.0\)"),
        (
            "[{at: 3 steps, modalities.audio.lock: true}]",
            r"modalities.audio.encoder: this key is needed \(in phases.0\)",
        ),
        ("[{at: 3 steps, modalities.image.encoder.name: own/convnet}]", "encoder"),
        (
            "[{at: 3 steps}, {at: 2 steps}]",
            "phases.1.at: '2 steps' is step 2 .*not after phase 1, which begins at step 3",
        ),
        ("[{at: 2 samples}]", "phases.0.at: '2 samples' is step 0 .*not after the first step"),
        ("[{at: 9 steps}]", "phases.0.at: '9 steps' is step 9, but the run ends after 9 steps"),
        ("[{at: 3 steps, modalities.image.encoder.width: 64}]", r"has shape \[16, 32\] before a phase and \[16, 64\]"),
        ("[{at: 3 steps, loss: info_nec}]", "Did you mean 'info_nce'"),
        ("[{at: 3 steps, data.batches: by_sorce}]", "data.batches: There is no batch plan 'by_sorce'. Did you mean"),
    ],
)
def test_a_phase_that_cannot_be_is_refused_before_the_first_step(phases: str, said: str) -> None:
    from dualenc.train.check import check_recipe

    with pytest.raises(ConfigError, match=said):
        check_recipe(recipe_of(*[x.strip("'") for x in f"phases={phases}".split(", '")]))


def test_zero_says_that_it_cannot_unlock() -> None:
    from dualenc.train.check import check_recipe

    with pytest.raises(ConfigError, match=r"phases.0.modalities.image.lock: DeepSpeed's ZeRO 2 counts the steps"):
        check_recipe(recipe_of(LIT, "phases=[{at: 3 steps, modalities.image: {lock: false}}]", "engine.kind=deepspeed"))


# --- runs on one rank ----------------------------------------------------------------------------------------------


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:010d}"
    heads = folder / "weights.safetensors"
    return load_file(str(heads if heads.is_file() else folder / "model" / "model.safetensors"))


def optimizer(run: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    folder = run / "checkpoints" / f"step-{step:010d}"
    return load_file(str(folder / "optimizer.safetensors")), json.loads((folder / "state.json").read_text())[
        "optimizer"
    ]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("phases") / "unbroken"
    train(recipe_of(LIT, PHASES, f"out={run}"))
    return run


@pytest.mark.slow
def test_a_phase_that_changes_nothing_changes_nothing(tmp_path: Path) -> None:
    train(recipe_of(f"out={tmp_path / 'plain'}"))
    train(recipe_of(f"out={tmp_path / 'null'}", "phases=[{at: 4 steps, optim.lr: 1e-3}]"))
    assert order(tmp_path / "plain") == order(tmp_path / "null")
    assert losses(tmp_path / "plain") == losses(tmp_path / "null")
    assert same(weights(tmp_path / "plain", 9), weights(tmp_path / "null", 9))
    assert same(optimizer(tmp_path / "plain", 9)[0], optimizer(tmp_path / "null", 9)[0])


def test_what_goes_on_and_what_begins(unbroken: Path) -> None:
    start = build_bundle(recipe_of(LIT)).model.state_dict()
    locked, crossed, end = weights(unbroken, 3), weights(unbroken, 6), weights(unbroken, 9)
    image = [k for k in start if k.startswith("towers.image.")]
    assert all(torch.equal(locked[k], start[k]) for k in image)
    assert all(not torch.equal(locked[k], crossed[k]) for k in image if "positions" not in k and "attn" not in k)
    # The optimizer: nothing of the locked tower before; unlocked weights have counted their own steps.
    before, after = optimizer(unbroken, 3), optimizer(unbroken, 6)
    assert not [k for k in before[0] if k.startswith("towers.image.trunk")]
    steps = {k: v["step"] for k, v in after[1]["scalars"].items()}
    assert {v for k, v in steps.items() if k.startswith("towers.image.")} == {3}
    assert {v for k, v in steps.items() if k.startswith("towers.text.") and "positions" not in k} == {6}
    assert steps["towers.text.positions"] == 3, "another shape: its moments begin at zero"
    assert [k for k in end if k.startswith("heads.")]
    assert not [k for k in crossed if k.startswith("heads.")]
    marks = [(r["step"], r["phase"]) for r in rows(unbroken / "metrics.jsonl") if "phase" in r]
    assert marks == [(0, 0), (3, 1), (6, 2)]
    rates = {r["step"]: r["lr"] for r in rows(unbroken / "metrics.jsonl") if "lr" in r}
    assert rates[4] == 0, "its schedule begins with its own warm-up"
    assert rates[9] == rates[7] == rates[6] == 1e-3, "and goes on where a phase says nothing of it"
    assert "phases" in (newest(unbroken) / "recipe.yaml").read_text()
    page = write_report(unbroken, unbroken.parent / "report.html").read_text()
    assert [f">phase {k}<" in page for k in range(4)] == [False, True, True, False]


@pytest.mark.slow
def test_a_batch_of_another_size_reads_on_in_the_same_order(tmp_path: Path) -> None:
    """16 · 3 + 32 · 3 + 8 · 3 samples are those of a run in batches of 24; resumed inside a phase, bit for bit."""
    import shutil

    given = ["tracking.sample_ids=true", "schedule={name: cosine, warmup_samples: 16}", "checkpoint.every_steps=5"]
    run = tmp_path / "sizes"
    train(recipe_of(*given, SIZES, f"out={run}"))
    train(recipe_of(*given, "batch.size=24", "budget.steps=7", f"out={tmp_path / 'plain'}"))
    found = order(run)
    assert [len(ids) for ids in found] == [16] * 3 + [32] * 3 + [8] * 3
    chain = itertools.chain.from_iterable
    assert list(chain(found)) == list(chain(order(tmp_path / "plain")))
    rates = {r["step"]: (r["samples_seen"], r["lr"]) for r in rows(run / "metrics.jsonl") if "lr" in r}
    assert [rates[k][0] for k in (3, 4, 6, 7, 9)] == [48, 80, 144, 152, 168]
    assert rates[7][1] < rates[6][1] / 2 / 2, "half the rate, further along the cosine"
    whole = weights(run, 9)
    for step in (6, 9):
        shutil.rmtree(run / "checkpoints" / f"step-{step:010d}")
    train(recipe_of(*given, SIZES, f"out={run}"))  # resumed at 5
    assert order(run) == found
    assert same(weights(run, 9), whole)


def test_positions_are_fitted(tmp_path: Path) -> None:
    # With a learning rate of almost nothing, the weights after the change are those before it, positions apart.
    change = "{at: 1 steps, modalities.image.input.size: 48, modalities.text.input.context_length: 40}"
    train(recipe_of(f"out={tmp_path}", "budget.steps=2", "optim={lr: 1e-12, weight_decay: 0}", f"phases=[{change}]"))
    before, after = weights(tmp_path, 1), weights(tmp_path, 2)
    grid = resize_grid(before["towers.image.trunk.positions"], 36)
    torch.testing.assert_close(after["towers.image.trunk.positions"], grid, atol=1e-6, rtol=0)
    text = after["towers.text.positions"]
    assert text.shape == (40, 32)
    torch.testing.assert_close(text[:32], before["towers.text.positions"], atol=1e-6, rtol=0)
    assert float(text[32:].std()) > 0


@pytest.mark.slow
def test_later_phases_may_change_and_begun_ones_may_not(unbroken: Path, tmp_path: Path) -> None:
    import shutil

    from dualenc.errors import CheckpointError

    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    for step in (6, 9):
        shutil.rmtree(run / "checkpoints" / f"step-{step:010d}")
    with pytest.raises(CheckpointError, match="loss"):
        train(recipe_of(LIT, PHASES, "loss.name=dcl", f"out={run}"))
    later = PHASES.replace("{name: layers, weight: 0.1}", "{name: koleo, weight: 0.1}")
    train(recipe_of(LIT, later, f"out={run}"))  # resumed at 3: phase 2 has not begun
    assert any("koleo" in k for r in rows(run / "metrics.jsonl") for k in r)
    with pytest.raises(CheckpointError, match=r"phases\.1\.loss"):
        train(recipe_of(LIT, PHASES, f"out={run}"))


KILLED = """
import os, signal, sys
from dualenc.checkpoint import save as ckpt
from dualenc.train import loop
import test_phases

where, out = sys.argv[1:]
calls = [0]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if where == "building":
    build = loop.build
    def second(*given, **named):
        calls[0] += 1
        if calls[0] == 2:
            die()
        return build(*given, **named)
    loop.build = second
elif where == "writing":
    ckpt.Saver._finish = die  # all is written but the manifest
loop.train(test_phases.recipe_of(test_phases.LIT, test_phases.PHASES, f"out={out}"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["building", "writing"])
def test_kill_9_in_the_middle_of_the_change(where: str, unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = f"{Path(__file__).parent}{os.pathsep}{environment()['PYTHONPATH']}"
    done = subprocess.run([sys.executable, "-c", KILLED, where, str(run)], env=environment(PYTHONPATH=path))
    assert done.returncode == -signal.SIGKILL
    finished = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
    assert finished == (["step-0000000003"] if where == "building" else [])
    train(recipe_of(LIT, PHASES, f"out={run}"))
    assert order(run) == order(unbroken)
    assert losses(run) == losses(unbroken)
    assert same(weights(run, 9), weights(unbroken, 9))
    assert same(optimizer(run, 9)[0], optimizer(unbroken, 9)[0])
    assert [r["phase"] for r in rows(run / "metrics.jsonl") if "phase" in r] == [0, 1, 2]


# --- several ranks -------------------------------------------------------------------------------------------------


def on_ranks(world: World, runs: dict[str, list[str]]) -> None:
    """Whole runs, one after another, in this process group."""
    from dualenc.train import loop

    for out, overrides in runs.items():
        recipe = recipe_of(*overrides, f"out={out}")
        with loop._folder(loop.run_folder(recipe), world):
            loop.run_phases(recipe, loop.run_folder(recipe), world)


REMEMBERING = [
    "loss=[{name: moco, queue: 40, decay: 0.9}, {name: fastclip, rho: 2, weight: 0.5}]",
    "optim={name: sgd, lr: 0.05, weight_decay: 0}",
    "phases=[{at: 3 steps, batch.size: 32}, {at: 6 steps, optim.lr: 0.02, data.batches: by_source}]",
    "checkpoint.every_steps=7",  # inside the last phase
]
OTHER = {
    "DDP": ["engine.parallel=ddp"],
    "FSDP2": ["engine.parallel=fsdp2"],
    "ZeRO 1": ["engine.kind=deepspeed", "engine.zero_stage=1"],
}


def resumed(world: World, runs: dict[str, list[str]]) -> None:
    """Each run by its first engine, cut off after step 7, then to its end by the second."""
    for out, (first, second) in runs.items():
        on_ranks(world, {out: [*REMEMBERING, *OTHER[first]]})
        if second:
            forget(world, Path(out))
            on_ranks(world, {out: [*REMEMBERING, *OTHER[second]]})


def forget(world: World, run: Path) -> None:
    """Remove the checkpoint at the end."""
    import shutil

    if world.rank == 0:
        shutil.rmtree(run / "checkpoints" / f"step-{9:010d}")
    barrier(world)


def finished(world: World, runs: list[str]) -> None:
    """Runs that were cut off, by DDP."""
    on_ranks(world, {out: [*REMEMBERING, *OTHER["DDP"]] for out in runs})


@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.extra
def test_a_resume_inside_a_phase_on_another_world_size_and_engine(tmp_path: Path) -> None:
    """A loss with a queue, slow towers and numbers for each sample, in phases that change the batch and its plan."""
    import shutil

    train(recipe_of(*REMEMBERING, f"out={tmp_path / 'whole'}"))
    made = {f"{a}, {b}": [a, b] for a, b in (("DDP", "ZeRO 1"), ("ZeRO 1", "FSDP2"), ("FSDP2", "DDP"))}
    made |= {"DDP, then others": ["DDP", ""]}
    spawn(__file__, "resumed", 2, {"runs": {str(tmp_path / k): v for k, v in made.items()}}, timeout_s=500)
    forget(World(), tmp_path / "DDP, then others")
    for name in ("DDP, then one process", "DDP, then 4 ranks"):
        shutil.copytree(tmp_path / "DDP, then others", tmp_path / name)
    shutil.rmtree(tmp_path / "DDP, then others")
    train(recipe_of(*REMEMBERING, f"out={tmp_path / 'DDP, then one process'}"))
    spawn(__file__, "finished", 4, {"runs": [str(tmp_path / "DDP, then 4 ranks")]}, timeout_s=300)
    whole = tmp_path / "whole"
    want = {**weights(whole, 9), **ckpt.loss_memory(newest(whole)).all()}
    off = {}
    for run in sorted(p for p in tmp_path.iterdir() if p.name != "whole"):
        assert order(run) == order(whole), run.name
        got = {**weights(run, 9), **ckpt.loss_memory(newest(run)).all()}
        assert got.keys() == want.keys()
        off[run.name] = max(relative(got[k], x) for k, x in want.items())
    assert len(off) == 5
    assert {k: x for k, x in off.items() if not x <= 1e-5} == {}, off


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest finite entry; infinite where one is not finite alone."""
    x, y = want.double(), got.double()
    scale = x[x.isfinite()].abs().max().clamp(min=1e-3) if x.isfinite().any() else torch.tensor(1.0)
    off = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs() / scale)
    return float(off.nan_to_num(nan=float("inf")).max()) if off.numel() else 0.0


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_two_ranks_and_sharded_engines_do_what_one_does(unbroken: Path, tmp_path: Path) -> None:
    same_towers = "phases=[{at: 3 steps, data.batches: by_source, optim.lr: 5e-4}, {at: 6 steps, loss: dcl}]"
    zero = ["engine.kind=deepspeed", "engine.zero_stage=2"]
    train(recipe_of(same_towers, f"out={tmp_path / 'one'}"))
    runs = {
        "DDP": [LIT, PHASES, "engine.parallel=ddp"],
        "FSDP2 sharded": [LIT, PHASES, "engine.parallel=fsdp2", "checkpoint.sharded=true"],
        "ZeRO 2": [same_towers, *zero],
    }
    spawn(__file__, "on_ranks", 2, {"runs": {str(tmp_path / k): v for k, v in runs.items()}}, timeout_s=500)
    for name in runs:
        run, one = tmp_path / name, tmp_path / "one" if "ZeRO" in name else unbroken
        assert order(run) == order(one), name
        torch.testing.assert_close(losses(run), losses(one), atol=2e-5, rtol=0)
        if "sharded" not in name:
            assert all(torch.allclose(x, weights(one, 9)[k], atol=3e-4) for k, x in weights(run, 9).items()), name
