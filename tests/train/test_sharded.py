"""Sharded saves: written by every rank, read by any engine on any number of ranks, never seen half-written."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import _runs
import _sharded
from _runs import ENGINES, RECIPE, few_samples, losses, order
from _spawn import spawn, start

from dualenc.checkpoint import save as ckpt
from dualenc.config import load_recipe
from dualenc.distributed.world import World
from dualenc.errors import CheckpointError
from dualenc.model import load_model

torch.set_num_threads(1)
JOBS = Path(_sharded.__file__)
CHAIN: list[tuple[int, list[str]]] = [(2, ["FSDP2", "ZeRO 2"]), (1, ["one process"]), (2, ["DDP"]), (4, ["ZeRO 3"])]
STEPS = 3
ALWAYS = ["checkpoint.sharded=true", "checkpoint.keep=9", "optim.ema_samples=256", "data.workers=0"]


# --- what auto means: no processes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "parameters", "world_size", "sharded"),
    [
        ([*ENGINES["FSDP2"]], 10**9, 8, True),
        ([*ENGINES["FSDP2"]], 10**8, 8, False),  # small: one file
        ([*ENGINES["FSDP2"]], 10**9, 1, False),  # nothing is cut
        ([*ENGINES["ZeRO 1"]], 10**9, 8, True),
        ([*ENGINES["ZeRO 0"]], 10**9, 8, False),  # rank 0 has it all
        ([*ENGINES["DDP"]], 10**9, 8, False),
        ([*ENGINES["DDP"], "checkpoint.sharded=true"], 10, 2, True),
        ([*ENGINES["ZeRO 3"], "checkpoint.sharded=false"], 10**11, 8, False),
        ([*ENGINES["ZeRO 3"], "optim.name=sgd"], 8 * 10**8, 8, False),  # 6.4 GB; with two moments 9.6
        ([*ENGINES["ZeRO 3"]], 8 * 10**8, 8, True),
    ],
)
def test_auto_shards_what_is_cut_and_large(
    overrides: list[str], parameters: int, world_size: int, sharded: bool
) -> None:
    assert ckpt.is_sharded(load_recipe(RECIPE, overrides), parameters, parameters, world_size) is sharded


# --- one run over four launches ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def always(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*ALWAYS, few_samples(tmp_path_factory.mktemp("few") / "data", (96,))]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, always: list[str]) -> dict[str, Any]:
    """The run of every test below: three steps each under FSDP2, ZeRO 2, one process, DDP, ZeRO 3 on 4 ranks."""
    folder = tmp_path_factory.mktemp("chain")
    found: dict[str, list[dict[str, Any]]] = {}
    end = 0
    for world_size, engines in CHAIN:
        parts = []
        for name in engines:
            end += STEPS
            parts.append([*always, *ENGINES.get(name, []), f"budget.steps={end}", f"out={folder}/run"])
        ranks = (
            [_sharded.chained(World(), parts)]
            if world_size == 1
            else spawn(JOBS, "chained", world_size, {"parts": parts})
        )
        found |= {name: [rank[i] for rank in ranks] for i, name in enumerate(engines)}
    return {"folder": folder, "found": found, "end": end}


def save_of(chain: dict[str, Any], step: int) -> Path:
    return ckpt.folder_of(chain["folder"] / "run", step)


@pytest.mark.dist
@pytest.mark.slow
def test_the_loss_curve_is_that_of_an_unbroken_run(chain: dict[str, Any], always: list[str]) -> None:
    one = chain["folder"] / "one"
    _runs.segments(World(), [[*always, f"budget.steps={chain['end']}", f"out={one}"]])
    a, b = np.array(losses(one)), np.array(losses(chain["folder"] / "run"))
    print(f"largest difference of a loss: {np.abs(a - b).max():.1e}")
    assert len(a) == chain["end"]
    assert np.abs(a - b).max() < 1e-5
    assert order(chain["folder"] / "run") == order(one)


@pytest.mark.dist
@pytest.mark.slow
def test_what_is_loaded_and_saved_is_the_collected_state_bit_for_bit(chain: dict[str, Any]) -> None:
    """Weights, both moments and the moving average, each time after another engine's save was read."""
    for i, (name, ranks) in enumerate(chain["found"].items()):
        for what in ("loaded", "saved") if i else ("saved",):
            assert ranks[0][what]["compared"] > 40, (name, what)
            assert (ranks[0][what]["wrong"], ranks[0][what]["unknown"]) == (0, 0), (name, what)


@pytest.mark.dist
@pytest.mark.slow
def test_every_rank_writes_its_share_and_says_so_in_the_manifest(chain: dict[str, Any]) -> None:
    for step, (world_size, name) in enumerate(((w, n) for w, names in CHAIN for n in names), 1):
        want = {
            f"{stem}-{r + 1:05d}-of-{world_size:05d}.safetensors"
            for stem in ("model/model", "optimizer", "weights")
            for r in range(world_size)
        }
        assert set(chain["found"][name][0]["files"]) == want
        manifest = json.loads((save_of(chain, step * STEPS) / ckpt.MANIFEST).read_text())
        assert {f for f in manifest if f.endswith(".safetensors")} == want
        sizes = [rank["own"]["bytes"] for rank in chain["found"][name]]
        assert max(sizes) < 1.35 * sum(sizes) / len(sizes), f"{name}: the writing is not shared: {sizes}"


@pytest.mark.dist
@pytest.mark.slow
def test_no_rank_gathers_the_state(chain: dict[str, Any]) -> None:
    """A sharded save brings into memory the rank's own pieces and nothing larger; a whole one all of the state."""
    for name in ("FSDP2", "ZeRO 2", "ZeRO 3"):
        ranks = chain["found"][name]
        whole = sum(rank["own"]["bytes"] for rank in ranks)
        for rank in ranks:
            print(f"{name}: state {whole}, own {rank['own']}, sharded save {rank['sharded']}, whole {rank['whole']}")
            assert rank["sharded"]["bytes"] <= rank["own"]["bytes"] + 4096, name  # 4096: counts that ranks exchange
            assert rank["sharded"]["largest"] <= max(rank["own"]["largest"], 1024), name
        assert ranks[0]["whole"]["bytes"] > whole, f"{name}: the count sees no gathering"
        assert ranks[0]["whole"]["largest"] > max(rank["sharded"]["largest"] for rank in ranks), name


# --- using a sharded save ------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.slow
def test_eval_reads_the_shards_and_export_writes_one_file(chain: dict[str, Any], tmp_path: Path) -> None:
    from dualenc.cli import app

    save = save_of(chain, chain["end"])
    average = ckpt.average_weights(save)
    loaded = load_model(str(save))
    assert loaded.weights_hash
    state = loaded.model.state_dict()
    assert state.keys() == average.shapes.keys()
    assert all(torch.equal(x, average.whole(k)) for k, x in state.items())
    result = CliRunner().invoke(app, ["export", str(save), "--format", "safetensors", "--out", str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    exported = load_file(tmp_path / "one" / "model.safetensors")
    assert all(torch.equal(x, exported[k]) for k, x in state.items())
    again = load_model(str(tmp_path / "one"))
    assert again.provenance["step"] == chain["end"]
    damaged = shutil.copytree(save, tmp_path / "damaged") / "model" / "model-00003-of-00004.safetensors"
    damaged.unlink()
    with pytest.raises(CheckpointError, match=r"there is no 'model-00003-of-00004\.safetensors' in it"):
        load_model(str(tmp_path / "damaged"))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("how", ["deleted", "truncated", "bit flipped"])
@pytest.mark.parametrize("name", ["optimizer-00002-of-00004.safetensors", "model/model-00004-of-00004.safetensors"])
def test_a_damaged_shard_is_named_and_the_older_save_used(
    chain: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, name: str
) -> None:
    newest, older = save_of(chain, chain["end"]), save_of(chain, chain["end"] - STEPS)
    for save in (newest, older):
        shutil.copytree(save, tmp_path / "checkpoints" / save.name)
    assert ckpt.newest_good(tmp_path) == tmp_path / "checkpoints" / newest.name
    path = tmp_path / "checkpoints" / newest.name / name
    raw = path.read_bytes()
    path.unlink()
    if how != "deleted":
        path.write_bytes(raw[:-4] if how == "truncated" else raw[:-1] + bytes([raw[-1] ^ 4]))
    assert ckpt.newest_good(tmp_path) == tmp_path / "checkpoints" / older.name
    assert f"Skipping damaged checkpoint {path.parents[name.count('/')]}: {name} is " in caplog.text


# --- interrupted saves ---------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_fails_or_dies_while_writing_leaves_no_save(always: list[str], tmp_path: Path) -> None:
    """First a rank finds no room: all ranks give the save up, and say so. Then rank 0 is
    killed between two files of the second save: the next start goes on from the first and sweeps what was staged."""
    args = [*always, f"out={tmp_path}/run", "checkpoint.every_steps=1"]
    arguments = {"overrides": [*args, *ENGINES["FSDP2"], "budget.steps=3"], "out": str(tmp_path)}
    with tempfile.TemporaryDirectory() as out:
        processes = start(JOBS, "failing", 2, arguments, Path(out), 20)
        texts = [p.communicate(timeout=200)[0] for p in processes]
    said = [(tmp_path / f"said-{r}").read_text() for r in range(2)]
    full = "OSError: No space left on device"
    given_up = f"DualencError: Checkpoint step-0000000001 was not written: rank 1 failed ({full})"
    assert said == [f"{given_up}; left: []", f"{full}; left: []"]
    assert processes[0].returncode == -9, texts[0][-2000:]
    assert processes[1].returncode not in (0, -9), texts[1][-2000:]
    folder = tmp_path / "run" / "checkpoints"
    names = sorted(p.name for p in folder.iterdir())
    assert [n for n in names if n.startswith("step-")] == ["step-0000000001"]
    assert any(n.startswith(".writing-step-0000000002") for n in names), f"it was not killed while writing: {names}"
    (found,) = _runs.segments(World(), [[*args, "budget.steps=3"]])
    assert (found["began"], found["ended"]) == (1, 3)
    assert not [p for p in folder.iterdir() if p.name.startswith(".writing")]


@pytest.mark.dist
def test_rank_0_hashes_only_its_own_files_while_others_write(tmp_path: Path) -> None:
    assert spawn(JOBS, "digesting", 2, {"folder": str(tmp_path)}) == [["optimizer.safetensors", "None"], ["None"]]


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_write_in_the_background_what_they_write_otherwise(tmp_path: Path) -> None:
    """Sharded and whole, two engines: bit for bit the same files."""
    ways = {
        f"{e} {s}": [*ENGINES[e], f"checkpoint.sharded={s}"] for e in ("FSDP2", "ZeRO 2") for s in ("true", "false")
    }
    every = ["budget.steps=4", "checkpoint.every_steps=2", "checkpoint.keep=9"]
    parts = [
        [*every, *more, f"checkpoint.background={b}", f"out={tmp_path}/{name}/{b}"]
        for name, more in ways.items()
        for b in ("false", "true")
    ]
    spawn(JOBS, "plain", 2, {"parts": parts})
    for name in ways:
        a, b = (tmp_path / name / how / "checkpoints" for how in ("false", "true"))
        files = sorted(p.relative_to(a) for p in a.rglob("*.safetensors"))
        assert len(files) >= 4, name
        assert files == sorted(p.relative_to(b) for p in b.rglob("*.safetensors"))
        assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files), name
        assert all(ckpt.damaged(p) is None for p in b.iterdir())
