"""The engine protocol: all that the rest of the project knows about an engine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dualenc.checkpoint.ranges import Piece, Stored
from dualenc.config import EngineConfig
from dualenc.distributed.world import World
from dualenc.encoders.tower import repeated as repeated
from dualenc.engine.float8 import check_float8, convert_to_float8
from dualenc.errors import ConfigError

Outputs = Mapping[str, Mapping[str, Tensor]]
"""What the model's forward returns: ``features``, ``frozen``, ``logit_scale``, ``logit_bias``, each by name."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """One optimizer step: the norm of the averaged gradient before clipping, and whether the step was skipped.

    Both are scalar tensors on the device, ``skipped`` a bool. A step is skipped when that norm is not finite. It is
    a norm of reduced gradients, equal on all ranks, so all ranks decide alike.
    """

    grad_norm: Tensor
    skipped: Tensor


@runtime_checkable
class Switchable(Protocol):
    """A model whose towers can trade time for memory."""

    def set_grad_checkpointing(self, enable: bool | int = True) -> None:
        """Keep fewer activations and recompute them in the backward; a number N: in every N-th block."""
        ...

    def set_channels_last(self) -> None:
        """Put convolutional towers in channels-last layout."""
        ...

    def compile_towers(self, blocks: bool = False) -> None:
        """Run each tower, or each of its repeated ``blocks``, through ``torch.compile``."""
        ...


class Engine(Protocol):
    """Runs forward, backward and optimizer step. All ranks call the same methods in the same order.

    ``module`` is the model itself; ``device`` where inputs have to be; ``lr`` the current main learning rate.
    Parameter gradients are averaged over ranks and nothing else is scaled.
    """

    world: World
    device: torch.device
    module: nn.Module
    lr: float

    def forward(self, inputs: Mapping[str, Any]) -> Outputs:
        """Run the model (under autocast where the recipe asks for bf16); the one way to run it."""
        ...

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around one forward and its backward: gradients of all but the ``last`` are added up without reduction."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``; reduce over ranks unless inside ``accumulating(last=False)``."""
        ...

    def step(self) -> Stepped:
        """Clip, update the weights unless the gradient is not finite, and clear the gradients."""
        ...

    def set_lr_factor(self, factor: float) -> None:
        """Set every group's learning rate to ``factor`` times its peak."""
        ...

    def train(self) -> None:
        """Training mode."""
        ...

    def eval(self) -> None:
        """Evaluation mode."""
        ...

    def model_state(self) -> dict[str, Tensor]:
        """Whole weights and buffers by name on the CPU of rank 0; an empty dict on the others."""
        ...

    def model_pieces(self) -> list[Piece]:
        """The part of weights and buffers that this rank writes, all ranks together each element once. Nothing is
        collected; the pieces share memory with the weights."""
        ...

    def load_model_state(self, saved: Stored) -> None:
        """Set weights and buffers; every rank reads its own part only."""
        ...

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Whole optimizer state, whatever the engine: tensors ``PARAMETER/KEY`` on the CPU of rank 0 (empty on the
        others), and a small JSON-able dict with the scalars, such as step counts (on every rank)."""
        ...

    def optimizer_pieces(self) -> tuple[list[Piece], dict[str, Any]]:
        """What :meth:`optimizer_state` gives, as the pieces that this rank writes; nothing is collected."""
        ...

    def load_optimizer_state(self, saved: Stored, info: Mapping[str, Any]) -> None:
        """Set what :meth:`optimizer_state` or the pieces of any engine and world size gave; every rank reads its own
        part only."""
        ...


def check_shapes(model: nn.Module) -> None:
    """Refuse 0-D parameters, which DeepSpeed and FSDP2 cannot hold."""
    scalars = [name for name, p in model.named_parameters() if p.ndim == 0]
    if scalars:
        raise ConfigError(
            f"Parameter {scalars[0]} is 0-D, which DeepSpeed and FSDP2 cannot hold; register it with shape [1]"
        )


@torch.no_grad()
def make_contiguous(model: nn.Module) -> None:
    """Make channels-last weights contiguous: DeepSpeed reads parameters as flat runs of bytes, FSDP2 refuses others."""
    for x in [*model.parameters(), *model.buffers()]:
        # The weight of a 1×1 convolution counts as contiguous in either layout, but keeps the strides of the other one.
        x.data = x.data.contiguous().flatten().view(x.shape)


def protect_outputs(model: nn.Module) -> None:
    """Make the forward return no parameter itself (such as a bias), only values computed from it.

    DDP takes an output without history for an unused parameter, and ZeRO-3 empties parameters after the forward.
    """

    def copy_parameters(_: nn.Module, __: Any, outputs: Outputs) -> Outputs:
        return {
            group: {name: x.clone() if isinstance(x, nn.Parameter) else x for name, x in values.items()}
            for group, values in outputs.items()
        }

    model.register_forward_hook(copy_parameters)


def apply_memory_and_compile(model: nn.Module, config: EngineConfig, device: torch.device) -> None:
    """Switch memory layout, float8, gradient checkpointing and torch.compile on in the towers, before the model is
    wrapped.

    Raises:
        ConfigError: if the model, the device or the machine cannot do what the recipe asks.
    """
    if config.float8:
        check_float8(config, device)
    wanted: dict[str, Any] = {k: v for k in SWITCHES if (v := config.model_dump()[k])}
    if wanted.get("channels_last") == "auto":
        del wanted["channels_last"]
        if device.type == "cuda" and isinstance(model, Switchable):
            model.set_channels_last()
    for key in wanted:
        if not isinstance(model, Switchable):
            raise ConfigError(f"engine.{key}: {type(model).__name__} does not support it; use false")
        if key == "channels_last":
            model.set_channels_last()
        elif key == "float8":
            convert_to_float8(model)
        elif key == "grad_checkpointing":
            model.set_grad_checkpointing(config.grad_checkpointing)
        else:
            model.compile_towers(blocks=config.compile == "blocks")


SWITCHES = ("channels_last", "float8", "grad_checkpointing", "compile")
"""Settings of the towers, in the order in which they are applied: what is compiled is what the others made of it."""
