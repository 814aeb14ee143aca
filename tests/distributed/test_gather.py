"""Real processes: the small collectives, the gather's gradient, and what is said when ranks disagree or are missing."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from dualenc.distributed.world import World, _launcher_variables, _place, first_host, init_world
from dualenc.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
import _jobs
from _spawn import spawn, start

JOBS = Path(__file__).with_name("_jobs.py")


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(key, raising=False)
    if torch.distributed.is_initialized():  # a group of one that a test with FSDP2 left in this process
        torch.distributed.destroy_process_group()
    world = init_world("cpu")
    assert (world.rank, world.world_size, world.backend) == (0, 1, None)
    assert not torch.distributed.is_initialized()
    alone = _jobs.collectives(world)
    assert alone["sum"].tolist() == [1.0, 2.0]
    assert alone["objects"] == [{"rank": 0}]
    assert alone["any"] is True


@pytest.mark.dist
def test_collectives_on_two_ranks() -> None:
    for r, out in enumerate(spawn(JOBS, "collectives", 2)):
        assert out["sum"].tolist() == [3.0, 5.0]
        assert out["untouched"].tolist() == [1.0 + r, 2.0 + r]
        assert out["dict"] == {"a": 2.0, "b": 1.0}
        assert (out["any"], out["none"]) == (True, False)
        assert out["objects"] == [{"rank": 0}, {"rank": 1}]
        assert out["broadcast"] == "from 0"
        assert (out["world"], out["backend"]) == ([r, 2, r], "gloo")


@pytest.mark.dist
def test_the_gradient_of_gather_sums_over_ranks() -> None:
    for q, out in enumerate(spawn(JOBS, "gather_gradient", 2)):
        assert out["gathered"][:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
        assert out["grad"].unique().tolist() == [(1 + 2) * (q + 2.0)]


@pytest.mark.dist
def test_unequal_batches_are_refused_on_every_rank() -> None:
    for text in spawn(JOBS, "unequal_shapes", 2):
        assert "rank 0: [3, 2], rank 1: [4, 2]" in text


@pytest.mark.dist
def test_a_barrier_names_who_is_missing() -> None:
    first = spawn(JOBS, "late_rank", 2)[0]
    assert first.startswith("Rank 1 did not come to a barrier within 2 s"), first


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("how", "limit_s"), [("kill", 15), ("hang", 25)])
def test_a_lost_rank_ends_the_others_in_time_and_is_named(tmp_path: Path, how: str, limit_s: float) -> None:
    """Time-out of the group: 5 s."""
    processes = start(JOBS, "die", 2, {"how": how}, tmp_path, group_timeout_s=5)
    began = time.monotonic()
    try:
        output = processes[0].communicate(timeout=limit_s + 20)[0]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    assert processes[0].returncode == 0, output
    text = torch.load(tmp_path / "0.pt", weights_only=True)
    assert "Rank 1 stopped or hangs" in text, text
    assert time.monotonic() - began < limit_s + 10


# --- where ranks come from ---------------------------------------------------------------------------------------


def test_srun_variables() -> None:
    env = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_ID": "0",
    }
    place = _place(env)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
    got = _launcher_variables(env, place)
    assert got["MASTER_ADDR"] == "gpu03"
    assert 20000 <= int(got["MASTER_PORT"]) < 40000


def test_a_batch_script_outside_srun_is_one_process() -> None:
    assert _place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).world_size == 1


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a1", "a1"), ("a1,b2", "a1"), ("n[007-009,12]", "n007"), ("n[3,5]", "n3"), ("x-1-[2-3]", "x-1-2")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE must be an integer, got 'two'"),
    ],
)
def test_an_incomplete_environment_is_explained(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _place(env)


def test_a_missing_address_is_explained() -> None:
    env = {"WORLD_SIZE": "2", "RANK": "0"}
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        _launcher_variables(env, _place(env))


def test_cuda_is_refused_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match=r"engine\.device is cuda"):
        init_world("cuda")


def test_world_is_a_value() -> None:
    assert World() == World(device=torch.device("cpu"))
