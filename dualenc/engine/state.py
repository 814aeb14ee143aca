"""Optimizer state by parameter name: the form that saves have, whatever engine and world size wrote them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dualenc.errors import CheckpointError

State = tuple[dict[str, Tensor], dict[str, Any]]


def collect(
    name: str,
    parameters: Mapping[str, Tensor],
    state_of: Callable[[Tensor], Mapping[str, Any]],
    whole: Callable[[Tensor, Tensor], Tensor],
    keep: bool,
) -> State:
    """Gather the state of every parameter that has one.

    Args:
        name: the optimizer's name, written down so that another one refuses the state.
        parameters: trainable parameters by name.
        state_of: a parameter's state, key → tensor of (a piece of) its shape, or a scalar.
        whole: (parameter, piece) → the whole tensor; all ranks call it in the same order.
        keep: whether this rank keeps the tensors (rank 0 does).
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, float]] = {}
    for key, p in parameters.items():
        for field, value in sorted(state_of(p).items()):
            if value is None:
                continue
            if isinstance(value, Tensor) and value.ndim > 0:
                collected = whole(p, value)
                if keep:
                    tensors[f"{key}/{field}"] = collected.detach().cpu().clone()
            else:
                scalars.setdefault(key, {})[field] = float(value)
    return tensors, {"name": name, "scalars": scalars}


def check(name: str, parameters: Mapping[str, Any], tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Refuse state of another optimizer or of other parameters.

    Raises:
        CheckpointError: naming the optimizer or the first parameter that does not fit.
    """
    if not tensors and not info.get("scalars"):
        return
    if info.get("name") != name:
        raise CheckpointError(f"The saved optimizer state is of {info.get('name')!r}, the recipe says {name!r}")
    for key, tensor in tensors.items():
        parameter, _, field = key.rpartition("/")
        if parameter not in parameters:
            raise CheckpointError(f"The saved optimizer state has {parameter}, which is not trained here (locked?)")
        wanted = list(parameters[parameter])
        if list(tensor.shape) != wanted:
            raise CheckpointError(f"The saved {field} of {parameter} has shape {list(tensor.shape)}, not {wanted}")


def of_parameter(
    key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The saved tensors and scalars of one parameter."""
    mine = {k.rpartition("/")[2]: t for k, t in tensors.items() if k.rpartition("/")[0] == key}
    return mine, dict(info.get("scalars", {}).get(key, {}))


def step_tensor(value: float, group: Mapping[str, Any], device: torch.device) -> Tensor:
    """A step count as torch's optimizers hold it: on the device if fused or capturable, else on the CPU."""
    on_device = bool(group.get("fused") or group.get("capturable"))
    return torch.tensor(value, dtype=torch.float32, device=device if on_device else torch.device("cpu"))
