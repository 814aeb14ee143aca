"""Matrix products of the towers in float8 (torchao): the weights stay fp32, both factors are scaled and cast each time.

torchao is not a dependency: ``pip install torchao``. Micikevicius et al., arXiv 2209.05433.
"""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import nn

from dualenc.config import EngineConfig
from dualenc.encoders.tower import Tower
from dualenc.errors import ConfigError

CAPABLE = (8, 9)
"""CUDA compute capability of the first GPUs with float8 (Ada, Hopper)."""
MULTIPLE = 16
"""Both sides of a float8 product are multiples of this."""


def check_float8(config: EngineConfig, device: torch.device) -> None:
    """Refuse ``engine.float8`` where it cannot work.

    Raises:
        ConfigError: another setting does not go with it, torchao is missing, or the device has no float8.
    """
    if config.kind != "accelerate" or config.precision != "bf16":
        raise ConfigError("engine.float8: true needs engine.kind: accelerate and engine.precision: bf16")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("engine.float8: true needs torchao (pip install torchao); install it, or write false")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABLE:
        raise ConfigError(
            f"engine.float8: true needs an NVIDIA GPU of compute capability {CAPABLE[0]}.{CAPABLE[1]} or newer (L4, "
            f"H100), and this run computes on {device.type}; write false"
        )


def convert_to_float8(model: nn.Module) -> list[str]:
    """Let the linear layers of the towers multiply in float8, in place; returns their names.

    Left as they are: heads, whose outputs are compared; layers that are not trained; and widths that float8 does not
    take. Parameters and their names stay the same.
    """
    from torchao.float8 import convert_to_float8_training

    heads = {id(m) for tower in model.modules() if isinstance(tower, Tower) for m in tower.head.modules()}
    found: list[str] = []

    def takes(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or id(module) in heads or not module.weight.requires_grad:
            return False
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            return False
        found.append(name)
        return True

    towers = dict(model.named_children())["towers"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchao about torch's own names
        convert_to_float8_training(towers, module_filter_fn=takes)
    return found
