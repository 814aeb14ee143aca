"""What runs the step: one small protocol, two engines. The rest of the project does not know which one it has."""

from __future__ import annotations

import torch
from torch import nn

from dualenc.config import EngineConfig, Optim
from dualenc.distributed.world import World
from dualenc.engine.protocol import Engine, Stepped
from dualenc.engine.schedule import lr_factor

__all__ = ["Engine", "Stepped", "build_engine", "lr_factor"]


def set_tf32(allowed: bool | None) -> None:
    """Let fp32 matrix products and convolutions on CUDA run in TF32, or not; None changes nothing."""
    if allowed is not None:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


def build_engine(
    config: EngineConfig, optim: Optim, model: nn.Module, world: World, find_unused: bool = True
) -> Engine:
    """The engine a recipe asks for, around ``model`` (changed in place; its weights must be equal on all ranks).

    Args:
        find_unused: what ``engine.find_unused: auto`` means: whether there may be parameters without a gradient.

    Raises:
        ConfigError: if settings do not go together, or deepspeed is asked for and not installed.
    """
    set_tf32(config.tf32)
    if config.kind == "deepspeed":
        from dualenc.engine.deepspeed_engine import DeepSpeedEngine

        engine: Engine = DeepSpeedEngine(config, optim, model, world)
        return engine
    from dualenc.engine.accelerate_engine import AccelerateEngine

    return AccelerateEngine(config, optim, model, world, find_unused)
