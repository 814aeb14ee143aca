"""Which device a name means: the one place where ``auto``, ``cuda``, ``mps`` and ``xpu`` are looked up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dualenc.errors import ConfigError

NAMES = ("auto", "cpu", "cuda", "mps", "xpu")
"""What ``engine.device`` and ``--device`` take; ``auto`` is CUDA where there is a GPU, else the CPU."""

_THERE: dict[str, Callable[[], bool]] = {
    "cpu": lambda: True,
    "cuda": lambda: torch.cuda.is_available(),
    "mps": lambda: torch.backends.mps.is_available(),
    "xpu": lambda: torch.xpu.is_available(),
}
_CALLED = {"cuda": "CUDA device", "mps": "Apple GPU (MPS)", "xpu": "Intel GPU (XPU)"}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_device(name: str, what: str = "engine.device") -> None:
    """Refuse a device that this machine lacks.

    Args:
        name: one of ``NAMES``, ``cuda:1`` …
        what: the setting that names it.

    Raises:
        ConfigError: the name is unknown, or torch sees no such device.
    """
    kind = name.partition(":")[0]
    if kind not in NAMES:
        raise ConfigError(f"unknown device {name!r}; use {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if kind != "auto" and not _THERE[kind]():
        raise ConfigError(f"{what} is {name}, but torch sees no {_CALLED[kind]}; use auto or cpu")


def resolve_device(device: torch.device | str) -> torch.device:
    """The device of one process that has all of them: ``auto`` → CUDA if there is a device, else the CPU.

    Raises:
        ConfigError: as :func:`check_device`.
    """
    name = str(device)
    check_device(name, "device")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"unknown device {name!r}; use {', '.join(NAMES[:-1])} or {NAMES[-1]}") from e


def device_of_rank(name: str, local_rank: int, ranks: int = 1, bound: bool = False) -> torch.device:
    """The device of one rank of a machine.

    Args:
        name: one of ``NAMES``.
        local_rank: its number among the ranks of this machine; ranks: how many there are in all.
        bound: each rank is shown its own CUDA devices only (``srun --gpus-per-task``): it takes the first.

    Raises:
        ConfigError: there is no such device, or too few of them; several ranks on a kind of which there is one.
    """
    check_device(name)
    if name in ("mps", "xpu"):
        if ranks > 1:
            raise ConfigError(f"engine.device: {name} trains on one rank only, and {ranks} were started; start one")
        return torch.device(name)
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    local_rank = 0 if bound else local_rank
    if local_rank >= count:
        raise ConfigError(
            f"Local rank {local_rank} has no GPU: this machine has {count}; start at most that many ranks on it"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Inside, operators that allow it compute in ``precision``; fp32: as they are."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=DTYPES[precision])


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a ``--precision`` that is unknown or that the device does not compute in.

    Raises:
        ConfigError: naming what to use.
    """
    if precision not in DTYPES:
        raise ConfigError(f"unknown --precision {precision!r}; use {', '.join(DTYPES)}")
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("--precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
