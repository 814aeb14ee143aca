"""Ranks, devices, the process group, and the few small collectives that the rest needs.

One process has no process group: every collective is then the identity. Several processes may come from torchrun,
``accelerate launch``, the ``deepspeed`` launcher (``RANK``, ``WORLD_SIZE`` …) or from ``srun`` (``SLURM_PROCID`` …).
"""

from __future__ import annotations

import datetime
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from dualenc.distributed.devices import device_of_rank
from dualenc.errors import ConfigError, DataError, DualencError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process among its peers.

    Attributes:
        rank, world_size: 0 ≤ rank < world_size, over all machines.
        local_rank: the rank on this machine.
        device: where this rank computes.
        backend: "gloo", "nccl", or None when there is no process group.
        timeout_s: how long a collective waits for the other ranks.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str | None = None
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class _Place:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


# --- start and end -----------------------------------------------------------------------------------------------


def init_world(device: str = "auto", timeout_s: float = 600.0, threads: int | None = None) -> World:
    """Join the process group that the environment describes; without one, the world is this process alone.

    Args:
        device: one of ``dualenc.distributed.devices.NAMES``.
        timeout_s: collectives that wait longer raise.
        threads: CPU threads of this process; default: torch's own, shared among the ranks of this machine.

    Raises:
        ConfigError: if the environment is incomplete, or the device is not there.
    """
    place = _place(os.environ)
    _set_threads(threads, place.local_world_size)
    where = device_of_rank(device, place.local_rank, place.world_size, _bound_by_slurm(os.environ))
    if place.world_size == 1:
        return World(device=where, timeout_s=timeout_s)
    for key, value in _launcher_variables(os.environ, place).items():
        os.environ.setdefault(key, value)  # accelerate and deepspeed read these, whoever launched us
    backend = "nccl" if where.type == "cuda" else "gloo"
    if not dist.is_initialized():
        _join(place, backend, datetime.timedelta(seconds=timeout_s), where)
    _silence_renamed_collectives()
    return World(place.rank, place.world_size, place.local_rank, where, backend, timeout_s)


def ensure_group(world: World) -> None:
    """Give a world of one a process group of one: FSDP2's mesh and DeepSpeed ask for it."""
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def close_world(world: World, clean: bool = True) -> None:
    """Leave the process group. ``clean=False`` after an error: do not wait for ranks that may be gone."""
    if not dist.is_initialized():
        return
    if clean and world.world_size > 1:
        barrier(world)
    dist.destroy_process_group()


def _join(place: _Place, backend: str, timeout: datetime.timedelta, device: torch.device) -> None:
    env = os.environ
    agent_holds_store = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store: Store = TCPStore(
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            place.world_size,
            is_master=place.rank == 0 and not agent_holds_store,
            timeout=timeout,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as e:
        raise DualencError(
            f"Rank {place.rank} cannot reach the other ranks at {env['MASTER_ADDR']}:{env['MASTER_PORT']} within "
            f"{timeout.total_seconds():.0f} s: {_first_line(e)}"
        ) from e
    # After a restart the launcher's store still holds the addresses of the dead attempt: each has its own key space.
    # A store of rank 0 is new at each start, and the count is no name for it: a machine that came back counts from 0.
    attempt = f"/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}" if agent_holds_store else ""
    store = PrefixStore(f"dualenc/{env.get('TORCHELASTIC_RUN_ID', 'run')}{attempt}", store)
    dist.init_process_group(
        backend,
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
        device_id=device if backend == "nccl" else None,
    )


def _place(env: Mapping[str, str]) -> _Place:
    if "WORLD_SIZE" in env:
        world_size = _number(env, "WORLD_SIZE")
        if world_size > 1 and "RANK" not in env:
            raise ConfigError("WORLD_SIZE is set but RANK is not: start with torchrun, or unset WORLD_SIZE")
        rank = _number(env, "RANK", 0)
        local_world = _number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", world_size))
        return _Place(rank, world_size, _number(env, "LOCAL_RANK", rank % local_world), local_world)
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:  # set inside srun only, not in the batch script
        world_size = _number(env, "SLURM_STEP_NUM_TASKS")
        per_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        local_world = int(per_node.group()) if per_node else world_size
        return _Place(_number(env, "SLURM_PROCID"), world_size, _number(env, "SLURM_LOCALID", 0), local_world)
    return _Place(0, 1, 0, 1)


def _launcher_variables(env: Mapping[str, str], place: _Place) -> dict[str, str]:
    """The torchrun variables of this rank; under srun the address is the first node, the port from the job's id."""
    host, port = "127.0.0.1", 29500
    if "SLURM_STEP_NUM_TASKS" in env:
        host = first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", host)))
        port = 20000 + (_number(env, "SLURM_JOB_ID", 0) * 16 + _number(env, "SLURM_STEP_ID", 0)) % 20000
    elif "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise ConfigError("WORLD_SIZE is above 1, but MASTER_ADDR and MASTER_PORT are not set: start with torchrun")
    return {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list.

    >>> first_host("gpu[003-007,9],login1")
    'gpu003'
    """
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodelist)
    return "".join(g for g in match.groups() if g) if match else nodelist


def _number(env: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = env.get(key)
    if text is None and default is not None:
        return default
    if text is None or not text.lstrip("-").isdigit():
        raise ConfigError(f"The environment variable {key} must be an integer, got {text!r}")
    return int(text)


def _bound_by_slurm(env: Mapping[str, str]) -> bool:
    """Whether srun (not torchrun inside a job) shows every task devices of its own: ``srun --gpus-per-task=1``."""
    by_srun = "SLURM_STEP_NUM_TASKS" in env and "TORCHELASTIC_RUN_ID" not in env
    return by_srun and ("SLURM_GPUS_PER_TASK" in env or "SLURM_TRES_PER_TASK" in env)


def _set_threads(threads: int | None, local_world_size: int) -> None:
    if threads is None and local_world_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # torchrun sets OMP_NUM_THREADS=1 when nobody did: share the cores instead.
        threads = max(1, len(os.sched_getaffinity(0)) // local_world_size)
    if threads is not None:
        torch.set_num_threads(threads)


def _silence_renamed_collectives() -> None:
    """torch 2.14 renames all_gather_into_tensor and says so at every call; older torch has only that name."""
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*(all_gather|reduce_scatter).*")


# --- small collectives -------------------------------------------------------------------------------------------


def world_size() -> int:
    """Number of ranks in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_of_ranks(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The mean over ranks of each tensor, in one reduction; without gradient."""
    if world_size() == 1:
        return list(tensors)
    flat = torch.cat([t.detach().flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    return [x.view_as(t) for x, t in zip(torch.split(flat, [t.numel() for t in tensors]), tensors, strict=True)]


def rank() -> int:
    """This process's rank in the process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def current_world() -> World:
    """The existing process group as a world; a world of one if there is none. It starts nothing."""
    if world_size() == 1:
        return World()
    backend = dist.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
    return World(rank(), world_size(), int(os.environ.get("LOCAL_RANK", rank())), device, backend)


def all_reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """Sum ``tensor`` (any shape, on any device) over ranks; returns a new tensor on the tensor's device."""
    out = tensor.detach().clone()
    if world.world_size == 1:
        return out
    moved = out.to(world.device)
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def sum_dict(values: Mapping[str, float], world: World) -> dict[str, float]:
    """Sum floats by key over ranks, in fp64; every rank must hold the same keys in the same order."""
    total = all_reduce_sum(torch.tensor(list(values.values()), dtype=torch.float64), world)
    return dict(zip(values, total.tolist(), strict=True))


def any_true(flag: bool, world: World) -> bool:
    """True on all ranks if it is true on any."""
    return bool(all_reduce_sum(torch.tensor(float(flag)), world) > 0)


def all_gather_object(value: T, world: World) -> list[T]:
    """Every rank's ``value``, in rank order. Small Python objects only: they travel as bytes among our own ranks."""
    if world.world_size == 1:
        return [value]
    out: list[Any] = [None] * world.world_size
    dist.all_gather_object(out, value)
    return out


def broadcast_object(value: T, world: World, source: int = 0) -> T:
    """The ``value`` of rank ``source`` on every rank."""
    if world.world_size == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=source, device=world.device)
    result: T = box[0]
    return result


def agree(make: Callable[[], T], world: World) -> T:
    """Run ``make`` on every rank; an error meant for the user on any rank is raised on all.

    Without this one rank would leave (a file missing on its machine) and the others wait for it until timeout.

    Raises:
        DualencError: this rank's own; on the others a DataError that names the rank.
    """
    result: list[T] = []
    error: DualencError | None = None
    try:
        result.append(make())
    except DualencError as e:
        error = e
    messages = all_gather_object(None if error is None else str(error), world)
    if error is not None:
        raise error
    for other, message in enumerate(messages):
        if message is not None:
            raise DataError(f"rank {other}: {message}")
    return result[0]


def barrier(world: World) -> None:
    """Wait for every rank.

    Raises:
        DualencError: naming the ranks that did not come in ``world.timeout_s`` seconds (gloo; NCCL aborts by itself).
    """
    if world.world_size == 1:
        return
    if world.backend != "gloo":
        dist.barrier(device_ids=[world.device.index])
        return
    try:
        dist.monitored_barrier(timeout=datetime.timedelta(seconds=world.timeout_s), wait_all_ranks=True)
    except RuntimeError as e:
        missing = re.search(r"[Rr]anks? ([\d, ]+) failed to pass", str(e))
        who = f"Rank {missing.group(1).strip()} did not come" if missing else _first_line(e)
        raise DualencError(
            f"{who} to a barrier within {world.timeout_s:.0f} s (seen by rank {world.rank}): it stopped or hangs"
        ) from e


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
