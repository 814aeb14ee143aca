"""Optimizer state by parameter name: the form it has in checkpoints, whatever engine and world size wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dualenc.checkpoint.ranges import Piece, Stored, deal
from dualenc.errors import CheckpointError

State = tuple[dict[str, Tensor], dict[str, Any]]
StateOf = Callable[[Tensor], Mapping[str, Any]]
Fields = dict[str, str]
"""Of one parameter: field → name of the saved tensor."""


def collect(
    name: str,
    parameters: Mapping[str, Tensor],
    state_of: StateOf,
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
    for key, p, value in _tensors(parameters, state_of):
        collected = whole(p, value)
        if keep:
            tensors[key] = collected.detach().cpu().clone()
    return tensors, _info(name, parameters, state_of)


def cut(
    name: str,
    parameters: Mapping[str, Tensor],
    state_of: StateOf,
    piece: Callable[[str, Tensor, Tensor], Piece],
    dealt: tuple[int, int] | None,
) -> tuple[list[Piece], dict[str, Any]]:
    """The state that this rank writes, without collecting anything.

    Args:
        piece: (name, parameter, local state) → the flat range that this rank holds.
        dealt: (rank, world size) where all ranks hold everything and share out the writing; else None.
    """
    pieces = [piece(key, p, value) for key, p, value in _tensors(parameters, state_of)]
    mine = deal(pieces, *dealt) if dealt else [x for x in pieces if x.data.numel()]
    return mine, _info(name, parameters, state_of)


def _tensors(parameters: Mapping[str, Tensor], state_of: StateOf) -> Iterator[tuple[str, Tensor, Tensor]]:
    for key, p in parameters.items():
        for field, value in sorted(state_of(p).items()):
            if isinstance(value, Tensor) and value.ndim > 0:
                yield f"{key}/{field}", p, value


def _info(name: str, parameters: Mapping[str, Tensor], state_of: StateOf) -> dict[str, Any]:
    scalars: dict[str, dict[str, float]] = {}
    for key, p in parameters.items():
        for field, value in sorted(state_of(p).items()):
            if value is not None and not (isinstance(value, Tensor) and value.ndim > 0):
                scalars.setdefault(key, {})[field] = float(value)
    return {"name": name, "scalars": scalars}


def check(name: str, parameters: Mapping[str, Any], saved: Stored, info: Mapping[str, Any]) -> dict[str, Fields]:
    """The saved tensors of every parameter; refuse state of another optimizer or of other parameters.

    Raises:
        CheckpointError: naming the optimizer or the first parameter that does not fit.
    """
    out: dict[str, Fields] = {}
    if not saved.shapes and not info.get("scalars"):
        return out
    if info.get("name") != name:
        raise CheckpointError(
            f"The saved optimizer state is of {info.get('name')!r}, but the recipe has optim.name: {name!r}"
        )
    for key, shape in saved.shapes.items():
        parameter, _, field = key.rpartition("/")
        if parameter not in parameters:
            raise CheckpointError(
                f"The saved optimizer state has {parameter}, which is not trained here; is its tower locked?"
            )
        wanted = list(parameters[parameter])
        if list(shape) != wanted:
            raise CheckpointError(
                f"The saved {field} of {parameter} has shape {list(shape)}, but the model needs {wanted}"
            )
        out.setdefault(parameter, {})[field] = key
    return out


def scalars_of(key: str, info: Mapping[str, Any]) -> dict[str, float]:
    """The saved scalars of one parameter."""
    return dict(info.get("scalars", {}).get(key, {}))


def step_tensor(value: float, group: Mapping[str, Any], device: torch.device) -> Tensor:
    """A step count as torch's optimizers hold it: on the device if fused or capturable, else on the CPU."""
    on_device = bool(group.get("fused") or group.get("capturable"))
    return torch.tensor(value, dtype=torch.float32, device=device if on_device else torch.device("cpu"))
